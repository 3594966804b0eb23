# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""The torch backend's manners: memory, lost devices, second tries, slots."""

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the torch backend needs torch")
pytest.importorskip("transformers", reason="the reference is transformers")

from tests.engine.rig import Listener, card
from tests.reference.torch_checkpoint import (
    XLM_ROBERTA,
    Tiny,
    alone,
    random_batch,
    transformers_hidden,
    write_tiny,
)

from trivec.backends.torch import backend as backend_module
from trivec.backends.torch.backend import DeviceModel, TorchBackend
from trivec.backends.torch.device import CudaDevice, Hardware
from trivec.backends.torch.graphs import DeviceStream
from trivec.backends.torch.heads import DeviceHeads
from trivec.backends.torch.ops import BlockOps, Encoder, PackedBatch
from trivec.core.clock import SystemClock
from trivec.core.errors import CheckpointRefused, DeviceLost, SettingInvalid
from trivec.core.types import Batch, Output, Sequences, Vectors
from trivec.engine import Engine, Workers
from trivec.settings import QueueLimits

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return write_tiny(tmp_path_factory.mktemp("tiny"), XLM_ROBERTA)


@pytest.fixture
def backend(tiny: Tiny) -> TorchBackend:
    return TorchBackend.load(tiny.checkpoint, precision="auto", device="cpu")


def failing_above(
    monkeypatch: pytest.MonkeyPatch, tokens_max: int, error: Callable[[], Exception]
) -> list[int]:
    """Let every device fail with *error* on batches of more than *tokens_max*; note what ran."""
    ran: list[int] = []
    plain = DeviceModel.run

    def run(model: DeviceModel, batch: Batch) -> Vectors:
        ran.append(batch.token_count)
        if batch.token_count > tokens_max:
            raise error()
        return plain(model, batch)

    monkeypatch.setattr(DeviceModel, "run", run)
    return ran


def test_out_of_memory_is_said_in_the_engine_s_word_and_the_next_batch_runs(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine halves on `MemoryError` and remembers; that is tested where it is done."""
    failing_above(monkeypatch, 60, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(MemoryError, match="cpu is out of memory"):
        backend.run(random_batch([61], XLM_ROBERTA), slot=0)
    assert len(backend.run(random_batch([60], XLM_ROBERTA), slot=0)) == 1


def test_what_a_batch_without_memory_held_is_free_while_its_error_is_still_at_hand(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine runs the halves while it holds the error, and the error holds every frame."""
    held: list[weakref.ref[object]] = []

    def encode(encoder: Encoder, packed: PackedBatch) -> object:
        words = encoder.weights["embeddings.word_embeddings.weight"]
        rows = torch.nn.functional.embedding(packed.token_ids, words)
        held.append(weakref.ref(rows))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Encoder, "__call__", encode)
    with pytest.raises(MemoryError) as starved:
        backend.run(random_batch([9], XLM_ROBERTA), slot=0)
    assert isinstance(starved.value.__cause__, torch.OutOfMemoryError)
    assert [one() for one in held] == [None]


def test_a_batch_whose_results_are_awaited_holds_no_memory_of_the_device(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next batch, launched by another thread meanwhile, may have it."""
    held: list[weakref.ref[object]] = []
    plain = Encoder.__call__

    def encode(encoder: Encoder, packed: PackedBatch) -> object:
        hidden = plain(encoder, packed)
        held.append(weakref.ref(hidden))
        return hidden

    def vectors(*_: object) -> None:
        assert [one() for one in held] == [None]

    monkeypatch.setattr(Encoder, "__call__", encode)
    monkeypatch.setattr(DeviceHeads, "vectors", vectors)
    backend.run(random_batch([9], XLM_ROBERTA), slot=0)
    assert held


async def test_a_request_that_does_not_fit_at_once_is_answered_whole(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the engine: a batch too large for the device's memory runs in halves."""
    batch = random_batch([30, 5, 20, 25, 10, 10], XLM_ROBERTA, Output.DENSE)
    expected = backend.run(batch, slot=0)
    ran = failing_above(monkeypatch, 60, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    workers = Workers(1, clock=SystemClock(), observer=Listener())
    engine = Engine(
        card(outputs=Output.DENSE),
        tokenizer=None,  # this test begins with ids
        backend=backend,
        workers=workers,
        limits=QueueLimits(),
    )
    workers.start()
    try:
        reply = await engine.embed(Sequences(batch.token_ids, batch.cu_seqlens), Output.DENSE)
    finally:
        await workers.stop(1.0)
    assert max(ran) > 60, "the whole of it was tried first"
    np.testing.assert_allclose(reply.vectors.dense, expected.dense, atol=1e-5)


def test_memory_that_is_short_at_the_start_is_learned_before_the_first_request(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_above(monkeypatch, 300, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    backend = TorchBackend.load(tiny.checkpoint, precision="auto", device="cpu")
    assert backend.budget.tokens_max == 256, "half of half of 1,024"


def test_a_device_too_small_for_one_text_is_refused_at_the_start(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_above(monkeypatch, 0, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(SettingInvalid, match="no memory for one text of 16 tokens"):
        TorchBackend.load(tiny.checkpoint, precision="auto", device="cpu")


def test_a_lost_device_is_said_once_and_stays_lost(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "CUDA error: device-side assert triggered"
    ran = failing_above(monkeypatch, 0, lambda: RuntimeError(words))

    def synchronize(_stream: object) -> None:
        raise RuntimeError(words + "\nCompile with ...")

    monkeypatch.setattr(DeviceStream, "synchronize", synchronize)
    batch = random_batch([3], XLM_ROBERTA)
    for _ in range(2):
        with pytest.raises(DeviceLost, match="cpu is lost: CUDA error: device-side assert"):
            backend.run(batch, slot=0)
    assert ran == [3], "a lost device is not called again"


@pytest.mark.parametrize(
    ("error", "means"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory."), MemoryError, id="torch-s"),
        pytest.param(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            MemoryError,
            id="cublas-s",
        ),
        pytest.param(RuntimeError("CUDA error: out of memory"), MemoryError, id="the-driver-s"),
        pytest.param(RuntimeError("shape mismatch"), RuntimeError, id="another-runtime-error"),
        pytest.param(ValueError("ours"), ValueError, id="an-error-of-ours"),
    ],
)
def test_knows_out_of_memory_in_every_wording(
    backend: TorchBackend,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    means: type[Exception],
) -> None:
    failing_above(monkeypatch, 5, lambda: error)
    with pytest.raises(means) as raised:
        backend.run(random_batch([9], XLM_ROBERTA), slot=0)
    assert raised.type is means
    assert np.isfinite(backend.run(random_batch([4], XLM_ROBERTA), slot=0).dense).all()


def test_run_exact_is_fp32_whatever_the_precision(tiny: Tiny) -> None:
    halved = TorchBackend.load(tiny.checkpoint, precision="bf16", device="cpu")
    batch = random_batch([12, 40], XLM_ROBERTA, Output.DENSE)
    expected = np.stack([transformers_hidden(tiny, alone(batch, i).token_ids)[0] for i in range(2)])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    exact = halved.run_exact(batch, slot=0)
    np.testing.assert_allclose(exact.dense, expected, atol=1e-4, rtol=0)
    assert np.abs(halved.run(batch, slot=0).dense - expected).max() > 1e-3


def test_run_exact_of_an_fp32_model_shares_its_weights(backend: TorchBackend) -> None:
    backend.run_exact(random_batch([4], XLM_ROBERTA), slot=0)
    exact, plain = backend._exact[0].encoder, backend._models[0].encoder
    assert exact.weights is plain.weights
    assert exact.attention.name == "reference"


def test_fp16_recovers_a_row_that_leaves_its_range(tmp_path: Path) -> None:
    """Weights that overflow fp16: the row is not finite, and `run_exact` mends it."""
    tiny = write_tiny(tmp_path, XLM_ROBERTA, scale=60.0)
    halved = TorchBackend.load(tiny.checkpoint, precision="fp16", device="cpu")
    batch = random_batch([8, 30], XLM_ROBERTA)
    assert not np.isfinite(halved.run(batch, slot=0).dense).all()
    exact = halved.run_exact(batch, slot=0)
    assert np.isfinite(exact.dense).all()
    np.testing.assert_allclose(np.linalg.norm(exact.dense, axis=1), 1, atol=1e-6)


def test_fp16_sums_its_residuals_in_fp32(tmp_path: Path) -> None:
    """Two terms within fp16's range whose sum is not: LayerNorm must see the sum."""
    rows = torch.tensor([[6e4, -6e4, 1.0, 2.0]], dtype=torch.float16)
    ops = BlockOps({"norm.weight": torch.ones(4), "norm.bias": torch.zeros(4)}, torch.float16)
    found = ops.layer_norm(ops.add(rows, rows), "norm", eps=1e-5)
    assert found.dtype == torch.float16
    assert torch.isfinite(found).all()
    torch.testing.assert_close(
        found.float()[0, :2], torch.tensor([2**0.5, -(2**0.5)]), atol=1e-3, rtol=0
    )


def test_close_lets_go_of_the_weights(backend: TorchBackend) -> None:
    backend.close()
    assert backend.slot_count == 0


def test_a_checkpoint_with_a_tensor_of_no_use_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    tiny = write_tiny(tmp_path, XLM_ROBERTA)
    extra = {**tiny.weights, "encoder.layer.0.surprise": np.zeros(3, np.float32)}
    save_file(extra, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointRefused, match="surprise"):
        TorchBackend.load(tiny.checkpoint, precision="fp32", device="cpu")


def test_notes_say_what_was_chosen_and_why(backend: TorchBackend) -> None:
    assert backend.precision == "fp32"
    assert set(backend.notes) == {"device", "precision", "attention", "compiled", "cuda_graphs"}
    assert backend.notes["device"] == "device cpu was asked for"
    assert backend.notes["attention"].startswith("grouped")


def test_slots_go_round_the_devices(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices (both the CPU here), two slots each."""
    h200 = CudaDevice("NVIDIA H200", (9, 0))
    monkeypatch.setattr(backend_module, "find_devices", lambda: Hardware((h200, h200)))
    monkeypatch.setattr(backend_module, "DeviceStream", lambda _: DeviceStream(torch.device("cpu")))
    backend = TorchBackend.load(tiny.checkpoint, precision="auto", device="auto")
    assert backend.slot_count == 4
    assert backend.precision == "bf16"
    ran: list[int] = []
    plain = DeviceModel.run

    def run(model: DeviceModel, batch: Batch) -> Vectors:
        ran.append(backend._models.index(model))
        return plain(model, batch)

    monkeypatch.setattr(DeviceModel, "run", run)
    for slot in range(4):
        backend.run(random_batch([3], XLM_ROBERTA), slot=slot)
    assert ran == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        pytest.param(random_batch([8_193], XLM_ROBERTA), "too long", id="a-text-too-long"),
        pytest.param(
            random_batch([4], replace(XLM_ROBERTA, vocab_size=9_999)), "beyond", id="an-id"
        ),
    ],
)
def test_a_bad_index_stops_on_the_host(backend: TorchBackend, batch: Batch, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        backend.run(batch, slot=0)
