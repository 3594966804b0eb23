"""What the engine may rely on, whichever backend runs: one suite for all implementations."""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from tests.backends.batches import ALL, batch_of, bits
from tests.checkpoints.tiny import write_tiny

from trivec.backends.fake import FakeBackend
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.ports import Backend
from trivec.core.types import Output

DIMENSIONS = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder: Path = tmp_path_factory.mktemp("contract")
    write_tiny(folder / "model", hidden=DIMENSIONS, position_count=700)
    return open_checkpoint(str(folder / "model"), cache_dir=folder / "cache")


@pytest.fixture(
    scope="module",
    params=[
        "fake",
        "openvino-fp32",
        "openvino-int8",
        *(["ray"] if find_spec("ray") else []),
        pytest.param(
            "torch-fp32",
            marks=[
                pytest.mark.reference,
                pytest.mark.skipif(not find_spec("torch"), reason="torch is not installed"),
            ],
        ),
    ],
)
def backend(
    request: pytest.FixtureRequest, checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Backend]:
    name, _, precision = str(request.param).partition("-")
    made: Backend
    if name == "ray":
        from tests.cluster.handles import handle_backend

        inner = FakeBackend(dimensions=DIMENSIONS, outputs=ALL, slot_count=2)
        with handle_backend(inner) as made:
            yield made
        return
    if name == "fake":
        made = FakeBackend(dimensions=DIMENSIONS, outputs=ALL, slot_count=2)
    elif name == "openvino":
        from trivec.backends.openvino import OpenVinoBackend

        cache = tmp_path_factory.mktemp("prepared")
        made = OpenVinoBackend.load(checkpoint, precision=precision, cores=2, cache_dir=cache)
    else:
        from trivec.backends.torch.backend import TorchBackend

        made = TorchBackend.load(checkpoint, precision=precision, device="cpu")
    yield made
    made.close()


def texts(count: int = 12) -> list[list[int]]:
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, 60, count).tolist()
    return [[0, *draw.integers(4, 1900, n - 2).tolist(), 2] for n in lengths]


def test_offers_at_least_one_slot_and_a_budget(backend: Backend) -> None:
    assert backend.slot_count >= 1
    assert backend.budget.tokens_max >= 1


def test_answers_one_row_a_sequence_in_the_order_given(backend: Backend) -> None:
    ids = texts()
    forward = backend.run(batch_of(ids, ALL), slot=0)
    backward = backend.run(batch_of(ids[::-1], ALL), slot=0)
    assert forward.dense.shape == (len(ids), DIMENSIONS)
    assert forward.dense.dtype == np.float32
    for i in range(len(ids)):
        np.testing.assert_allclose(
            forward.dense[i], backward.dense[len(ids) - 1 - i], atol=1e-5, rtol=0
        )


def test_fills_exactly_the_outputs_each_sequence_asked_for(backend: Backend) -> None:
    asked = [Output.DENSE, Output.SPARSE, Output.MULTI, ALL]
    found = backend.run(batch_of(texts(4), asked), slot=0)
    assert [one is not None for one in found.sparse] == [False, True, False, True]
    assert [one is not None for one in found.multi] == [False, False, True, True]


def test_what_a_mean_leaves_out_changes_that_sequence_alone(backend: Backend) -> None:
    plain = batch_of(texts(3))
    found = backend.run(plain, slot=0)
    skipping = backend.run(replace(plain, skip=np.array([0, 1, 0], np.int32)), slot=0)
    same = [bits(found, i) == bits(skipping, i) for i in range(3)]
    assert same == [True, False, True]  # with CLS pooling the first token that is left counts


def test_multi_has_one_row_fewer_than_tokens_and_sparse_ids_ascend(backend: Backend) -> None:
    ids = texts()
    found = backend.run(batch_of(ids, ALL), slot=0)
    for i, sequence in enumerate(ids):
        multi, sparse = found.multi[i], found.sparse[i]
        assert multi is not None
        assert sparse is not None
        assert multi.shape == (len(sequence) - 1, DIMENSIONS)
        assert multi.dtype == np.float32
        assert sparse.weights.dtype == np.float32
        assert np.all(np.diff(sparse.token_ids) > 0)
        assert np.all(sparse.weights > 0)
        assert not {0, 1, 2, 3} & set(sparse.token_ids.tolist())


def test_a_sequence_longer_than_the_budget_still_runs_alone(backend: Backend) -> None:
    draw = np.random.default_rng(1)
    long = [0, *draw.integers(4, 1900, 648).tolist(), 2]
    found = backend.run(batch_of([long], ALL), slot=0)
    assert found.dense.shape == (1, DIMENSIONS)
    assert np.isfinite(found.dense).all()


def test_every_slot_gives_the_same_bits(backend: Backend) -> None:
    batch = batch_of(texts(), ALL)
    first = backend.run(batch, slot=0)
    for slot in range(1, backend.slot_count):
        other = backend.run(batch, slot=slot)
        assert [bits(first, i) for i in range(len(first))] == [
            bits(other, i) for i in range(len(other))
        ]


def test_run_exact_answers_as_run_does_only_nearer(backend: Backend) -> None:
    batch = batch_of(texts(4), ALL)
    found, exact = backend.run(batch, slot=0), backend.run_exact(batch, slot=0)
    cosines = found.dense @ exact.dense.T
    assert exact.dense.shape == found.dense.shape
    assert cosines.argmax(axis=1).tolist() == [0, 1, 2, 3]
    assert cosines.diagonal().min() >= 0.9  # int8 that no certificate passed, on any CPU


def test_the_answer_is_the_callers_to_keep(backend: Backend) -> None:
    """The next batch must not write into the vectors of the one before."""
    batch = batch_of(texts(3), ALL)
    found = backend.run(batch, slot=0)
    before = [bits(found, i) for i in range(3)]
    backend.run(batch_of(texts(12)[3:], ALL), slot=0)
    assert [bits(found, i) for i in range(3)] == before
