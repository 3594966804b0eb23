# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""The torch backend against transformers, against itself alone, and against its plain twins."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

from trivec.backends.torch.attention import (
    Attention,
    GroupedAttention,
    PackedAttention,
    ReferenceAttention,
    Spans,
    choose_attention,
    group_lengths,
    packed_forms,
)
from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.encoder import run_block
from trivec.backends.torch.graphs import unpack
from trivec.backends.torch.layout import Shape, lay_out
from trivec.backends.torch.link import HostLink
from trivec.backends.torch.tuning import Tuning
from trivec.backends.torch.weights import load_encoder
from trivec.core.types import Batch, Float32Array, Output, Vectors
from trivec.models.ops import AttentionSpec
from trivec.models.pooling import HiddenRows, Pooling, Readout

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
    encoder = backend._models[0].parts.encoder
    with torch.inference_mode():
        encoder.weights["embeddings.word_embeddings.weight"][17] = float("nan")
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


def spec_of(query: Any) -> AttentionSpec:
    return AttentionSpec(query.shape[1], query.shape[2], query.shape[1])


def varlen_on_cpu(
    query: Any, key: Any, value: Any, starts: Any, _starts: Any, longest: int,
    _longest: int, num_splits: int | None = None,
) -> object:  # fmt: skip
    """What torch's varlen_attn computes, since its kernel is CUDA's only."""
    assert num_splits == 1, "splitting keys would let neighbours in"
    lengths = torch.diff(starts).tolist()
    assert max(lengths) <= longest
    attend = ReferenceAttention().over(Spans(starts, tuple(lengths)))
    return attend(query, key, value, spec_of(query)), "log-sum-exp"


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(GroupedAttention(), id="grouped"),
        pytest.param(PackedAttention("varlen", varlen_on_cpu, num_splits=1), id="packed-kernel"),
    ],
)
def test_every_form_of_attention_equals_the_reference(form: Attention) -> None:
    lengths = (1, 30, 33, 30, 30, 0, 200, 31, 2)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    spans = Spans(starts, lengths)
    qkv = torch.randn(sum(lengths), 3, 4, 16, generator=torch.Generator().manual_seed(3))
    expected = ReferenceAttention().over(spans)(qkv[:, 0], qkv[:, 1], qkv[:, 2], spec_of(qkv[:, 0]))
    torch.testing.assert_close(
        form.over(spans)(qkv[:, 0], qkv[:, 1], qkv[:, 2], spec_of(qkv[:, 0])),
        expected,
        atol=1e-5,
        rtol=0,
    )


def test_attention_reads_its_own_sequence_and_no_other() -> None:
    """The reference itself, against softmax(q k' / sqrt(d)) v written out."""
    qkv = torch.randn(5, 3, 2, 8, generator=torch.Generator().manual_seed(4))
    spans = Spans(torch.tensor([0, 2, 5], dtype=torch.int32), (2, 3))
    found = ReferenceAttention().over(spans)(qkv[:, 0], qkv[:, 1], qkv[:, 2], spec_of(qkv[:, 0]))
    for first, last in ((0, 2), (2, 5)):
        for head in range(2):
            query, key, value = (qkv[first:last, part, head] for part in range(3))
            expected = torch.softmax(query @ key.T / 8**0.5, -1) @ value
            torch.testing.assert_close(found[first:last, head], expected, atol=1e-6, rtol=0)


def test_groups_hold_like_lengths_and_every_sequence_once() -> None:
    lengths = [10, 100, 12, 0, 99, 13, 1]
    groups = group_lengths(lengths, 1.25)
    assert groups == [[6], [0, 2], [5], [4, 1]]


@pytest.mark.parametrize("pooling", list(Pooling), ids=lambda one: f"{one.value}-pooling")
def test_the_heads_on_the_device_equal_their_numpy_twin(tmp_path: Path, pooling: Pooling) -> None:
    """The same hidden states through `models/pooling.py` and through the device's heads."""
    checkpoint = write_tiny(tmp_path, XLM_ROBERTA, pooling=pooling).checkpoint
    asked = [ALL, Output.DENSE, Output.SPARSE, Output.MULTI, ALL, ALL]
    batch = random_batch([40, 5, 33, 7, 1, 2], XLM_ROBERTA, asked)
    backend = TorchBackend.load(checkpoint, precision="fp32", device="cpu")
    parts = backend._models[0].parts
    layout = lay_out(batch, position_offset=2)
    with torch.inference_mode():
        packed = unpack(torch.from_numpy(layout.words), layout.shape, layout.lengths)
        hidden = parts.encode(packed).numpy()
    rows = HiddenRows(hidden, batch.token_ids, batch.cu_seqlens, batch.outputs)
    twin = Readout(checkpoint.pooling, checkpoint.normalize, checkpoint.heads)
    assert_close(backend.run(batch, slot=0), twin.vectors(rows), 1e-6)


@pytest.mark.parametrize(
    ("refused", "chosen"),
    [
        pytest.param({}, "flash-attn-3", id="takes-the-fastest-that-is-there"),
        pytest.param({"flash-attn-3": "no such device"}, "varlen", id="then-torch-s-own"),
        pytest.param(
            {"flash-attn-3": "x", "varlen": "wrong numbers", "flash-attn-2": "y"},
            "grouped",
            id="then-the-padded-form",
        ),
    ],
)
def test_attention_is_chosen_by_trial_and_says_why(
    monkeypatch: pytest.MonkeyPatch, refused: dict[str, str], chosen: str
) -> None:
    from trivec.backends.torch import attention

    def named(name: str) -> tuple[Attention, ...]:
        packed = PackedAttention(name, varlen_on_cpu)
        return (GroupedAttention() if name == "grouped" else packed,)

    monkeypatch.setattr(attention, "forms_named", named)
    choice = choose_attention(None, trial=lambda form: refused.get(form.name), has_packed=True)
    assert choice.attention.name == chosen
    assert choice.reason.startswith(chosen)
    for name, why in refused.items():
        assert f"not {name}: {why}" in choice.reason


def varlen_of_flash_attention_2(
    query: object, key: object, value: object, starts: object, _starts: object, longest: int,
    _longest: int, num_splits: int | None = None,
) -> object:  # fmt: skip
    """Stock torch 2.13: the word is known, and refused by the only kernel that is built in."""
    if num_splits is not None:
        raise RuntimeError("num_splits requires FA3. Register FA3 first")
    return varlen_on_cpu(query, key, value, starts, _starts, longest, _longest, num_splits=1)


def test_torch_s_own_kernel_is_kept_where_it_refuses_to_be_told_of_splits(
    m3: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trivec.backends.torch.trial import try_attention

    encoder = load_encoder(m3.checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    module = SimpleNamespace(varlen_attn=varlen_of_flash_attention_2)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    choice = choose_attention(
        None, trial=lambda form: try_attention(form, encoder), has_packed=True
    )
    assert choice.attention.name == "varlen (no num_splits)"
    assert choice.attention.is_capturable
    assert "not varlen: it raised RuntimeError: num_splits requires FA3" in choice.reason


def test_a_kernel_that_may_split_keys_is_never_run_untold() -> None:
    told = packed_forms("flash-attn-3", varlen_of_flash_attention_2)
    assert [form.name for form in told] == ["flash-attn-3"]


def test_a_device_without_packed_kernels_never_tries_them() -> None:
    tried: list[str] = []

    def trial(form: Attention) -> str | None:
        tried.append(form.name)
        return None

    choose_attention(None, trial=trial, has_packed=False)
    assert tried == ["grouped"]


def test_filler_of_a_captured_shape_changes_no_real_row(m3: Tiny) -> None:
    """What CUDA graphs run: the layout rounded up, by the plain encoder on the CPU."""
    encoder = load_encoder(m3.checkpoint, device=torch.device("cpu"), dtype=torch.float32)
    batch = random_batch([5, 40, 3], XLM_ROBERTA)
    link = HostLink()

    def hidden(shape: Shape | None) -> object:
        layout = lay_out(batch, position_offset=2, shape=shape)
        packed = unpack(link.up(layout.words), layout.shape, layout.lengths)
        return encoder(packed, GroupedAttention())[: batch.token_count]

    with link.entered():
        exact, filled = hidden(None), hidden(Shape(64, 32))
        full = hidden(Shape(batch.token_count, 32))
    torch.testing.assert_close(filled, exact, atol=1e-5, rtol=0)
    torch.testing.assert_close(full, exact, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_compiled_half_equals_its_eager_twin_at_every_token_count(m3: Tiny) -> None:
    """One compilation for every layer and count, by the trial that a device runs at start.

    One of the trial's counts is this model's width, which must not be taken for the same number.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    backend = TorchBackend.load(
        m3.checkpoint, precision="fp32", device="cpu", tuning=Tuning(compiled=True)
    )
    assert backend.notes["compiled"] == "yes"
    assert backend._models[0].parts.run is not run_block
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    plain = TorchBackend.load(m3.checkpoint, precision="fp32", device="cpu")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ([3], [17, 5], MIXED):
            batch = random_batch(lengths, XLM_ROBERTA)
            with ThreadPoolExecutor(1) as worker:  # a slot's thread is never the one that loaded
                found = worker.submit(backend.run, batch, slot=0).result()
            assert_close(found, plain.run(batch, slot=0), 1e-5)
