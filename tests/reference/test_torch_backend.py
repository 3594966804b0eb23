# ruff: noqa: E402 - what is imported below needs what is asked for above it
"""The torch backend's manners: memory, lost devices, second tries; and the pure choices behind it."""

import os
import re
import subprocess
import sys
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
from trivec.backends.torch import device as device_module
from trivec.backends.torch.attention import GroupedAttention
from trivec.backends.torch.backend import TorchBackend
from trivec.backends.torch.building import build
from trivec.backends.torch.device import (
    CudaDevice,
    Found,
    choose_device,
    choose_precision,
)
from trivec.backends.torch.encoder import Packed
from trivec.backends.torch.faults import is_out_of_memory, why_lost
from trivec.backends.torch.layout import Shape, first_rows_left_out, lay_out, rows_wanting
from trivec.backends.torch.model import DeviceModel, Parts
from trivec.backends.torch.trial import what_is_wrong
from trivec.backends.torch.tuning import (
    Tuning,
    graph_shape,
    graph_shapes,
    round_tokens,
    smaller,
    token_budget,
)
from trivec.core.clock import SystemClock
from trivec.core.errors import CheckpointRefused, DeviceLost, SettingInvalid
from trivec.core.types import Batch, BatchBudget, Output, Sequences, Vectors
from trivec.engine import Engine, Workers
from trivec.settings import QueueLimits

pytestmark = pytest.mark.reference

H200 = CudaDevice(0, "NVIDIA H200", (9, 0), 140 << 30)
TURING = CudaDevice(1, "Tesla T4", (7, 5), 15 << 30)
TWO = Found("2.13.0+cu130", cuda_built=True, cuda=(H200, TURING))
NO_TORCH = Found(None, cuda_built=False, cuda=())
CPU_BUILD = Found("2.13.0+cpu", cuda_built=False, cuda=())
NO_DRIVER = Found("2.13.0+cu130", cuda_built=True, cuda=())


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

    def encode(parts: Parts, packed: Packed) -> object:
        words = parts.encoder.weights["embeddings.word_embeddings.weight"]
        rows = torch.nn.functional.embedding(packed.token_ids, words)
        held.append(weakref.ref(rows))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Parts, "encode", encode)
    with pytest.raises(MemoryError) as starved:
        backend.run(random_batch([9], XLM_ROBERTA), slot=0)
    assert isinstance(starved.value.__cause__, torch.OutOfMemoryError)
    assert [one() for one in held] == [None]


async def test_a_request_that_does_not_fit_at_once_is_answered_whole(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the engine: a batch too large for the device's memory runs in halves."""
    batch = random_batch([30, 5, 20, 25, 10, 10], XLM_ROBERTA, Output.DENSE)
    expected = backend.run(batch, slot=0)
    ran = failing_above(monkeypatch, 60, lambda: torch.OutOfMemoryError("CUDA out of memory"))
    clock, listener = SystemClock(), Listener()
    workers = Workers(1, clock=clock, observer=listener)
    engine = Engine(
        card(outputs=Output.DENSE),
        tokenizer=None,  # this test begins with ids
        backend=backend,
        workers=workers,
        bound=QueueLimits(),
        clock=clock,
        observer=listener,
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
    assert backend.budget.tokens_max <= 512


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

    def probe(_link: object) -> None:
        raise RuntimeError(words + "\nCompile with ...")

    monkeypatch.setattr("trivec.backends.torch.link.HostLink.probe", probe)
    batch = random_batch([3], XLM_ROBERTA)
    for _ in range(2):
        with pytest.raises(DeviceLost, match="cpu is lost: CUDA error: device-side assert"):
            backend.run(batch, slot=0)
    assert ran == [3], "a lost device is not called again"


def test_an_error_after_which_the_device_still_answers_is_only_the_batch_s(
    backend: TorchBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_above(monkeypatch, 5, lambda: RuntimeError("some kernel refused"))
    with pytest.raises(RuntimeError, match="some kernel refused"):
        backend.run(random_batch([9], XLM_ROBERTA), slot=0)
    assert np.isfinite(backend.run(random_batch([4], XLM_ROBERTA), slot=0).dense).all()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(torch.OutOfMemoryError("CUDA out of memory."), True, id="torch-ran-out"),
        pytest.param(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
            True,
            id="cublas-ran-out",
        ),
        pytest.param(RuntimeError("CUDA error: out of memory"), True, id="the-driver-ran-out"),
        pytest.param(RuntimeError("shape mismatch"), False, id="something-else"),
        pytest.param(MemoryError(), False, id="the-host-ran-out"),
    ],
)
def test_knows_out_of_memory_in_every_wording(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_a_device_is_lost_when_it_fails_again_on_being_asked() -> None:
    def fails() -> None:
        raise RuntimeError("CUDA error: unspecified launch failure\nmore")

    error = RuntimeError("CUDA error")
    assert why_lost(error, probe=fails) == "CUDA error: unspecified launch failure"
    assert why_lost(error, probe=lambda: None) is None
    assert why_lost(ValueError("ours"), probe=fails) is None


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
    exact, plain = backend._exact[0].parts, backend._models[0].parts
    assert exact.encoder is plain.encoder
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
    from trivec.backends.torch.encoder import TYPE, BlockOps

    rows = torch.tensor([[6e4, -6e4, 1.0, 2.0]], dtype=torch.float16)
    weights = {"norm.weight": torch.ones(4), "norm.bias": torch.zeros(4), TYPE: rows}
    ops = BlockOps(weights)
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
    assert backend.notes["device"] == "--device cpu was asked for"
    assert backend.notes["attention"].startswith("grouped")


@pytest.mark.parametrize(
    ("asked", "found", "device", "indices", "reason"),
    [
        pytest.param("auto", TWO, "cuda", (0, 1), "found 2 .NVIDIA H200, Tesla T4", id="every-gpu"),
        pytest.param("auto", NO_TORCH, "cpu", (), "torch is not installed", id="without-torch"),
        pytest.param("auto", CPU_BUILD, "cpu", (), "built without CUDA", id="a-cpu-build"),
        pytest.param("auto", NO_DRIVER, "cpu", (), "sees no CUDA device", id="without-a-driver"),
        pytest.param("cpu", TWO, "cpu", (), "asked for", id="cpu-beside-gpus"),
        pytest.param("cuda", TWO, "cuda", (0, 1), "asked for", id="cuda-takes-them-all"),
        pytest.param("cuda:1", TWO, "cuda", (1,), "cuda:1 was asked for", id="one-of-them"),
    ],
)
def test_the_device_is_chosen_with_its_reason(
    asked: str, found: Found, device: str, indices: tuple[int, ...], reason: str
) -> None:
    choice = choose_device(asked, found)
    assert (choice.device, choice.indices) == (device, indices)
    assert reason.replace(".", "(", 1) in choice.reason or reason in choice.reason


@pytest.mark.parametrize(
    ("asked", "found", "message"),
    [
        pytest.param("cuda", CPU_BUILD, "built without CUDA; use --device cpu", id="no-cuda"),
        pytest.param("cuda:2", TWO, "has 2 CUDA devices", id="one-too-many"),
        pytest.param("tpu", TWO, "unknown", id="unknown-device"),
        pytest.param("cuda:x", TWO, "unknown", id="no-number"),
    ],
)
def test_a_device_that_is_not_there_is_refused(asked: str, found: Found, message: str) -> None:
    with pytest.raises(SettingInvalid, match=message):
        choose_device(asked, found)


@pytest.mark.parametrize(
    ("asked", "device", "precision"),
    [
        pytest.param("auto", "cuda:0", "bf16", id="bf16-on-a-hopper"),
        pytest.param("auto", "cuda:1", "fp16", id="fp16-where-there-is-no-bf16"),
        pytest.param("auto", "cuda", "fp16", id="what-all-devices-can"),
        pytest.param("auto", "cpu", "fp32", id="fp32-on-cpus"),
        pytest.param("fp32", "cuda:0", "fp32", id="what-was-asked-for"),
    ],
)
def test_the_precision_follows_the_oldest_device(asked: str, device: str, precision: str) -> None:
    assert choose_precision(asked, choose_device(device, TWO), TWO).precision == precision


@pytest.mark.parametrize(
    ("asked", "device", "message"),
    [
        pytest.param("int8", "cpu", "openvino", id="int8-is-the-other-backend-s"),
        pytest.param("bf16", "cuda:1", "Tesla T4 has none", id="bf16-before-ampere"),
        pytest.param("int8-rows", "cpu", "openvino", id="a-recipe-of-cpus"),
        pytest.param("fp64", "cpu", "unknown", id="unknown-precision"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused(asked: str, device: str, message: str) -> None:
    with pytest.raises(SettingInvalid, match=message):
        choose_precision(asked, choose_device(device, TWO), TWO)


def test_finding_devices_works_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert device_module.find_devices() == NO_TORCH


def test_a_torch_without_cuda_is_not_imported_to_find_devices() -> None:
    program = (
        "import sys; from trivec.backends.torch.device import find_devices; "
        "print(find_devices().cuda_built, 'torch' in sys.modules)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    cuda_built, is_imported = said.stdout.split()
    assert is_imported == cuda_built


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        pytest.param(
            {
                "version.py": "__version__ = '9.1'\ncuda = '13.0'\n",
                "__init__.py": "raise OSError('libcudnn.so.9: cannot open shared object file')\n",
            },
            r"torch 9\.1 cannot be imported \(libcudnn\.so\.9",
            id="a-library-of-cuda-is-missing",
        ),
        pytest.param(
            {"__init__.py": "raise ImportError('undefined symbol')\n"},
            r"torch of an unknown version cannot be imported \(undefined symbol",
            id="neither-versions-nor-an-import",
        ),
        pytest.param(
            {
                "__init__.py": "from types import SimpleNamespace\n__version__ = '9.2'\n"
                "version = SimpleNamespace(cuda=None)\n"
                "cuda = SimpleNamespace(is_available=lambda: False)\n"
            },
            r"torch 9\.2 is built without CUDA",
            id="no-file-of-versions",
        ),
    ],
)
def test_a_torch_that_cannot_be_used_leaves_the_cpu_and_says_why(
    tmp_path: Path, files: dict[str, str], reason: str
) -> None:
    (tmp_path / "torch").mkdir()
    for name, text in files.items():
        (tmp_path / "torch" / name).write_text(text)
    program = (
        "from trivec.backends.torch.device import choose_device, find_devices; "
        "choice = choose_device('auto', find_devices()); print(choice.device, choice.reason)"
    )
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=True,
        text=True,
    )
    assert re.match(f"cpu auto: cpu, since {reason}", said.stdout)


def test_slots_go_round_the_devices(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices (both the CPU here), two slots each."""
    found = Found("x", cuda_built=True, cuda=(H200, H200))
    monkeypatch.setattr(backend_module, "find_devices", lambda: found)
    monkeypatch.setattr(
        backend_module,
        "build",
        lambda checkpoint, *, precision, cuda_index, tuning: build(
            checkpoint, precision=precision, cuda_index=None, tuning=tuning
        ),
    )
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


def test_a_layout_counts_positions_from_the_offset_in_every_sequence() -> None:
    batch = random_batch([2, 3], XLM_ROBERTA)
    layout = lay_out(batch, position_offset=2, shape=Shape(8, 4))
    ids, positions, types, owners = layout.words[: 4 * 8].reshape(4, 8)
    assert ids.tolist() == [*batch.token_ids.tolist(), 0, 0, 0]
    assert positions.tolist() == [2, 3, 2, 3, 4, 0, 0, 0]
    assert types.tolist() == [0] * 8
    assert owners.tolist() == [0, 0, 1, 1, 1, 2, 2, 2]
    assert layout.words[4 * 8 :].tolist() == [0, 2, 5, 8, 8]
    assert layout.lengths == (2, 3, 3, 0)


def test_rows_are_those_of_the_sequences_that_ask() -> None:
    batch = random_batch([2, 3, 1], XLM_ROBERTA, [Output.MULTI, Output.DENSE, Output.MULTI])
    rows = rows_wanting(batch, Output.MULTI)
    assert rows.tolist() == [0, 1, 5]
    assert first_rows_left_out(rows, batch.cu_seqlens).tolist() == [1]


@pytest.mark.parametrize("tokens", range(1, 2049, 13))
def test_rounded_tokens_hold_the_batch_with_little_filler(tokens: int) -> None:
    rounded = round_tokens(tokens)
    assert rounded >= tokens
    assert rounded <= max(32, 2 * tokens)
    if tokens > 256:
        assert rounded - tokens < rounded / 4


def test_a_graph_fits_every_small_batch_and_no_large_one() -> None:
    shapes = graph_shapes(512)
    assert shapes[0].token_count == 512
    assert graph_shape(12, 1, shapes) == Shape(32, 2)
    assert graph_shape(512, 2, shapes) == Shape(512, 2)
    assert graph_shape(511, 2, shapes) == Shape(512, 32), "filler needs a sequence of its own"
    assert graph_shape(513, 1, shapes) is None
    assert graph_shape(512, 257, shapes) is None


@pytest.mark.parametrize(
    ("tuning", "cuda", "free_bytes", "budget"),
    [
        pytest.param(Tuning(), True, 100 << 30, BatchBudget(16_384, 2_048), id="a-roomy-gpu"),
        pytest.param(Tuning(), True, 0, BatchBudget(8, 1), id="a-full-gpu-still-runs"),
        pytest.param(Tuning(), False, None, BatchBudget(1_024, 128), id="a-cpu"),
        pytest.param(Tuning(tokens_max=100), True, 0, BatchBudget(100, 12), id="what-was-asked"),
    ],
)
def test_the_budget_follows_the_memory(
    tuning: Tuning, cuda: bool, free_bytes: int | None, budget: BatchBudget
) -> None:
    assert token_budget(tuning, XLM_ROBERTA, cuda=cuda, free_bytes=free_bytes) == budget


def test_a_budget_shrinks_to_half_of_what_failed_and_never_grows() -> None:
    assert smaller(BatchBudget(1000, 10), 800) == BatchBudget(400, 10)
    assert smaller(BatchBudget(300, 10), 800) == BatchBudget(300, 10)
    assert smaller(BatchBudget(300, 10), 1) == BatchBudget(1, 10)


def test_a_trial_says_what_is_wrong_with_a_fast_path() -> None:
    plain = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))

    def raises() -> object:
        raise RuntimeError("no kernel image\nfor this device")

    assert what_is_wrong(plain.clone, lambda: plain) is None
    assert what_is_wrong(raises, lambda: plain) == "it raised RuntimeError: no kernel image"
    assert "minimum cosine -" in str(what_is_wrong(lambda: -plain, lambda: plain))
    assert "shape" in str(what_is_wrong(lambda: plain[:3], lambda: plain))
    assert "cosine" in str(what_is_wrong(lambda: plain * torch.nan, lambda: plain))


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


def test_grouped_attention_is_what_cpus_use(backend: TorchBackend) -> None:
    assert isinstance(backend._models[0].parts.attention, GroupedAttention)
