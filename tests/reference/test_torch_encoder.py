# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""The torch backend against transformers, against itself alone, and against its plain twins."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from tests.reference.torch_checkpoint import (
    ALL,
    BERT,
    XLM_ROBERTA,
    Tiny,
    alone,
    random_batch,
    transformers_hidden,
    write_tiny,
)

from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.device import TorchOptions
from trivec.backends.torch.ops import BatchShape, PackedBatch, load_encoder, pack
from trivec.core.types import Batch, Float32Array, Output, Vectors
from trivec.models.pooling import HiddenRows, Pooler, Pooling

pytestmark = pytest.mark.reference

MIXED = [1, 2, 3, 17, 64, 65, 5, 200]


@pytest.fixture(scope="module")
def m3(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("m3"), XLM_ROBERTA)


@pytest.fixture(scope="module")
def backend(m3: Tiny) -> Iterator[TorchBackend]:
    loaded = TorchBackend.load(m3.checkpoint, precision="fp32", device="cpu")
    yield loaded
    loaded.close()


def unit(rows: Float32Array) -> Float32Array:
    found: Float32Array = rows / np.linalg.norm(rows, axis=-1, keepdims=True)
    return found


def expected_from_transformers(tiny: Tiny, batch: Batch) -> Vectors:
    """MODELS.md's formulas, row by row and token by token, on transformers' hidden states."""
    from trivec.core.types import SparseVector

    heads = tiny.checkpoint.heads
    assert heads is not None
    dense, sparse, multi = [], [], []
    for i in range(len(batch)):
        ids = alone(batch, i).token_ids
        hidden = transformers_hidden(tiny, ids)
        dense.append(unit(hidden[0]))
        best: dict[int, float] = {}
        for token_id, row in zip(ids.tolist(), hidden, strict=True):
            weight = max(float(heads.sparse_weight[0] @ row + heads.sparse_bias[0]), 0.0)
            if token_id not in heads.ignored_token_ids and weight > best.get(token_id, 0.0):
                best[token_id] = weight
        terms = sorted(best.items())
        sparse.append(
            SparseVector(
                np.array([term for term, _ in terms], np.int32),
                np.array([weight for _, weight in terms], np.float32),
            )
        )
        multi.append(unit(hidden[1:] @ heads.multi_weight.T + heads.multi_bias))
    return Vectors.of(np.stack(dense), tuple(sparse), tuple(multi))


def assert_close(found: Vectors, expected: Vectors, atol: float) -> None:
    assert np.isfinite(found.dense).all()
    np.testing.assert_allclose(found.dense, expected.dense, atol=atol, rtol=0)
    for ours, theirs in zip(found.sparse, expected.sparse, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
            np.testing.assert_allclose(ours.weights, theirs.weights, atol=atol, rtol=0)
    for rows, their_rows in zip(found.multi, expected.multi, strict=True):
        assert (rows is None) == (their_rows is None)
        if rows is not None and their_rows is not None:
            np.testing.assert_allclose(rows, their_rows, atol=atol, rtol=0)


@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1], id="one-token"),
        pytest.param(MIXED, id="mixed-lengths-in-one-batch"),
        pytest.param([31, 32, 33, 32, 32], id="lengths-around-a-block"),
        pytest.param([8_192], id="the-longest-text"),
        pytest.param([4_099, 2], id="a-long-text-beside-a-short-one"),
    ],
)
def test_all_three_vectors_equal_transformers_at_fp32(
    m3: Tiny, backend: TorchBackend, lengths: list[int]
) -> None:
    batch = random_batch(lengths, XLM_ROBERTA)
    assert_close(backend.run(batch, slot=0), expected_from_transformers(m3, batch), 1e-4)


def test_the_mean_pooled_bert_with_token_types_equals_transformers(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path, BERT, pooling=Pooling.MEAN, heads=False)
    backend = TorchBackend.load(tiny.checkpoint, precision="fp32", device="cpu")
    batch = random_batch([1, 9, 128, 500], BERT, Output.DENSE)
    types = (np.arange(batch.token_count) % 2).astype(np.int32)
    batch = replace(batch, token_types=types)
    found = backend.run(batch, slot=0)
    for i in range(len(batch)):
        one = alone(batch, i)
        hidden = transformers_hidden(tiny, one.token_ids, one.token_types)
        np.testing.assert_allclose(found.dense[i], unit(hidden.mean(0)), atol=1e-4, rtol=0)
    assert found.sparse == (None,) * 4
    assert found.multi == (None,) * 4


def test_a_model_that_does_not_normalise_returns_what_pooling_gave(tmp_path: Path) -> None:
    tiny = write_tiny(tmp_path, BERT, pooling=Pooling.CLS, heads=False)
    checkpoint = replace(tiny.checkpoint, normalize=False)
    batch = random_batch([20], BERT, Output.DENSE)
    found = TorchBackend.load(checkpoint, precision="fp32", device="cpu").run(batch, slot=0)
    hidden = transformers_hidden(tiny, batch.token_ids)
    np.testing.assert_allclose(found.dense[0], hidden[0], atol=1e-4, rtol=0)
    assert abs(np.linalg.norm(found.dense[0]) - 1) > 0.1


def test_a_text_gets_the_same_vectors_alone_and_beside_others(backend: TorchBackend) -> None:
    batch = random_batch([*MIXED, 1_500], XLM_ROBERTA)
    together = backend.run(batch, slot=0)
    for i in range(len(batch)):
        by_itself = backend.run(alone(batch, i), slot=0)
        one = Vectors.of(
            together.dense[i : i + 1], together.sparse[i : i + 1], together.multi[i : i + 1]
        )
        assert_close(one, by_itself, 1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_near_fp32_and_near_itself_alone(
    m3: Tiny, backend: TorchBackend, precision: str
) -> None:
    halved = TorchBackend.load(m3.checkpoint, precision=precision, device="cpu")
    batch = random_batch(MIXED, XLM_ROBERTA)
    found = halved.run(batch, slot=0)
    assert found.dense.dtype == np.float32
    exact = backend.run(batch, slot=0)
    assert ((found.dense * exact.dense).sum(1) > 0.995).all()
    for i in range(len(batch)):
        by_itself = halved.run(alone(batch, i), slot=0)
        assert by_itself.dense[0] @ found.dense[i] >= 0.9995


def test_each_sequence_gets_what_it_asked_for_and_no_more(backend: TorchBackend) -> None:
    asked = [
        Output.DENSE,
        Output.DENSE | Output.MULTI,
        Output.SPARSE,
        ALL,
        Output.DENSE,
        Output.DENSE | Output.SPARSE,
    ]
    lengths = [7, 1, 12, 5, 6, 9]
    mixed = backend.run(random_batch(lengths, XLM_ROBERTA, asked), slot=0)
    everything = backend.run(random_batch(lengths, XLM_ROBERTA, ALL), slot=0)
    assert [one is not None for one in mixed.sparse] == [Output.SPARSE in one for one in asked]
    assert [one is not None for one in mixed.multi] == [Output.MULTI in one for one in asked]
    masked = Vectors.of(
        everything.dense,
        tuple(
            one if Output.SPARSE in wanted else None
            for one, wanted in zip(everything.sparse, asked, strict=True)
        ),
        tuple(
            one if Output.MULTI in wanted else None
            for one, wanted in zip(everything.multi, asked, strict=True)
        ),
    )
    assert_close(mixed, masked, 1e-6)
    assert mixed.multi[1] is not None
    assert mixed.multi[1].shape == (0, XLM_ROBERTA.hidden_size)


def test_a_row_that_is_not_finite_is_handed_up_as_such(tmp_path: Path) -> None:
    """Whoever checks rows must see the NaN in every kind of vector; neighbours stay sound."""
    tiny = write_tiny(tmp_path, XLM_ROBERTA)
    backend = TorchBackend.load(tiny.checkpoint, precision="fp32", device="cpu")
    with torch.inference_mode():
        backend._models[0].encoder.weights["embeddings.word_embeddings.weight"][17] = float("nan")
    batch = random_batch([6, 6], XLM_ROBERTA)
    batch.token_ids[batch.token_ids == 17] = 18
    batch.token_ids[2] = 17
    found = backend.run(batch, slot=0)
    assert np.isnan(found.dense[0]).all()
    assert found.sparse[0] is not None
    assert np.isnan(found.sparse[0].weights).any()
    assert found.multi[0] is not None
    assert np.isnan(found.multi[0]).any()
    assert np.isfinite(found.dense[1]).all()


@pytest.mark.parametrize("pooling", list(Pooling), ids=lambda one: f"{one.value}-pooling")
def test_the_heads_on_the_device_equal_their_numpy_twin(tmp_path: Path, pooling: Pooling) -> None:
    """The same hidden states through `models/pooling.py` and through the device's heads."""
    checkpoint = write_tiny(tmp_path, XLM_ROBERTA, pooling=pooling).checkpoint
    asked = [ALL, Output.DENSE, Output.SPARSE, Output.MULTI, ALL, ALL]
    batch = random_batch([40, 5, 33, 7, 1, 2], XLM_ROBERTA, asked)
    backend = TorchBackend.load(checkpoint, precision="fp32", device="cpu")
    buffer, lengths = pack(batch, position_offset=2)
    with torch.inference_mode():
        packed = PackedBatch.view(torch.from_numpy(buffer), lengths)
        hidden = backend._models[0].encoder(packed).numpy()
    rows = HiddenRows(hidden, batch.token_ids, batch.cu_seqlens, batch.outputs)
    twin = Pooler(checkpoint.pooling, checkpoint.normalize, checkpoint.heads)
    assert_close(backend.run(batch, slot=0), twin.vectors(rows), 1e-6)


def test_filler_of_a_captured_shape_changes_no_real_row(m3: Tiny) -> None:
    """What CUDA graphs run: the batch rounded up, by the plain encoder on the CPU."""
    encoder = load_encoder(m3.checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    batch = random_batch([5, 40, 3], XLM_ROBERTA)

    def hidden(shape: BatchShape | None) -> object:
        buffer, lengths = pack(batch, position_offset=2, shape=shape)
        with torch.inference_mode():
            return encoder(PackedBatch.view(torch.from_numpy(buffer), lengths))[: batch.token_count]

    exact, filled = hidden(None), hidden(BatchShape(64, 32))
    full = hidden(BatchShape(batch.token_count, 32))
    torch.testing.assert_close(filled, exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(full, exact, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_half_equals_its_eager_twin_at_every_token_count(m3: Tiny) -> None:
    """One compilation for every layer and count, by the check that a device makes at start.

    One of the check's counts is this model's width, which must not be taken for the same number.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = TorchBackend.load(
        m3.checkpoint, precision="fp32", device="cpu", options=TorchOptions(compiled=True)
    )
    assert backend.notes["compiled"] == "yes"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    plain = TorchBackend.load(m3.checkpoint, precision="fp32", device="cpu")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([3], [17, 5], MIXED):
            batch = random_batch(lengths, XLM_ROBERTA)
            with ThreadPoolExecutor(1) as worker:  # a slot's thread is never the one that loaded
                found = worker.submit(backend.run, batch, slot=0).result()
            assert_close(found, plain.run(batch, slot=0), 1e-5)
