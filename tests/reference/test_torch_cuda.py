# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""On a real GPU: every precision against fp32 on the CPU, graphs against eager, slots at once.

Skipped where there is none, which includes the machines that run the checks today; whoever has one
runs these before trusting figures.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
pytest.importorskip("transformers", reason="the reference is transformers")

from tests.reference.torch_checkpoint import (
    ALL,
    XLM_ROBERTA,
    Tiny,
    alone,
    random_batch,
    write_tiny,
)

from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.device import TorchOptions
from trivec.core.types import Batch, Output, Vectors

pytestmark = pytest.mark.reference

BATCHES = {
    "one-text": [9],
    "a-small-batch-that-a-graph-holds": [5, 40, 3, 17, 64],
    "a-batch-beyond-every-graph": [300, 2, 1_700, 512, 33, 65, 4_000],
    "the-longest-text": [8_192],
}
COSINE_MIN = {"fp32": 0.999999, "bf16": 0.995, "fp16": 0.9995}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"), XLM_ROBERTA)


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16"])
def on_gpu(tiny: Tiny, request: pytest.FixtureRequest) -> Iterator[TorchBackend]:
    loaded = TorchBackend.load(tiny.checkpoint, precision=request.param, device="cuda:0")
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def on_cpu(tiny: Tiny) -> TorchBackend:
    return TorchBackend.load(tiny.checkpoint, precision="fp32", device="cpu")


def assert_near(found: Vectors, expected: Vectors, cosine_min: float) -> None:
    assert ((found.dense * expected.dense).sum(1) >= cosine_min).all()
    for ours, theirs in zip(found.multi, expected.multi, strict=True):
        if ours is not None and theirs is not None and len(ours):
            assert ((ours * theirs).sum(1) >= cosine_min).all()
    for term, other in zip(found.sparse, expected.sparse, strict=True):
        if term is not None and other is not None:
            weights = dict(zip(term.token_ids.tolist(), term.weights.tolist(), strict=True))
            for token_id, weight in zip(other.token_ids.tolist(), other.weights, strict=True):
                assert abs(weights.get(token_id, 0.0) - weight) <= 0.05 * max(weight, 1.0)


@pytest.mark.parametrize("lengths", [pytest.param(v, id=k) for k, v in BATCHES.items()])
def test_every_vector_is_near_the_cpu_s_at_fp32(
    on_gpu: TorchBackend, on_cpu: TorchBackend, lengths: list[int]
) -> None:
    batch = random_batch(lengths, XLM_ROBERTA)
    found, expected = on_gpu.run(batch, slot=0), on_cpu.run(batch, slot=0)
    assert_near(found, expected, COSINE_MIN[on_gpu.precision])
    if on_gpu.precision == "fp32":
        np.testing.assert_allclose(found.dense, expected.dense, atol=1e-4, rtol=0)


def test_a_text_is_itself_beside_others(on_gpu: TorchBackend) -> None:
    batch = random_batch([5, 300, 64, 1_000, 2], XLM_ROBERTA, ALL)
    together = on_gpu.run(batch, slot=0)
    for i in range(len(batch)):
        by_itself = on_gpu.run(alone(batch, i), slot=0)
        assert together.dense[i] @ by_itself.dense[0] >= 0.9995


def test_graphs_change_nothing(tiny: Tiny) -> None:
    eager = TorchBackend.load(
        tiny.checkpoint,
        precision="bf16",
        device="cuda:0",
        options=TorchOptions(graph_tokens_max=0, compiled=False),
    )
    replayed = TorchBackend.load(tiny.checkpoint, precision="bf16", device="cuda:0")
    for lengths in ([3], [5, 9, 30], [200, 100], [7] * 40, [1_000, 1_000]):
        batch = random_batch(lengths, XLM_ROBERTA)
        assert_near(replayed.run(batch, slot=0), eager.run(batch, slot=0), 0.9995)


def test_slots_at_once_keep_their_batches_apart(on_gpu: TorchBackend) -> None:
    batches = [random_batch([20 + i, 300 - i], XLM_ROBERTA, Output.DENSE, i) for i in range(24)]
    expected = [on_gpu.run(batch, slot=0).dense for batch in batches]

    def run(slot: int) -> list[bool]:
        mine = range(slot, len(batches), on_gpu.slot_count)
        return [
            bool(((on_gpu.run(batches[i], slot=slot).dense * expected[i]).sum(1) > 0.9995).all())
            for i in mine
        ]

    with ThreadPoolExecutor(on_gpu.slot_count) as slots:
        assert all(all(one) for one in slots.map(run, range(on_gpu.slot_count)))


def test_memory_does_not_grow_with_the_batches(on_gpu: TorchBackend) -> None:
    batch: Batch = random_batch([500] * 20, XLM_ROBERTA)
    on_gpu.run(batch, slot=0)
    before = torch.cuda.memory_allocated()
    for _ in range(10):
        on_gpu.run(batch, slot=0)
    assert torch.cuda.memory_allocated() <= before
