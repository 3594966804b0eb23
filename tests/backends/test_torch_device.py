"""Where the torch backend runs, at which precision and in what batches. Needs no torch."""

import sys
from pathlib import Path

import pytest

from trivec.backends.torch.device import (
    CudaDevice,
    Hardware,
    choose_device,
    choose_precision,
    find_devices,
    token_budget,
)
from trivec.core.errors import SettingInvalid
from trivec.core.types import BatchBudget
from trivec.models.ops import ModelConfig

TWO = Hardware((CudaDevice("NVIDIA H200", (9, 0)), CudaDevice("Tesla T4", (7, 5))))
NONE = Hardware((), "torch 2.13.0+cpu is built without CUDA")


@pytest.mark.parametrize(
    ("asked", "hardware", "device", "indices", "reason"),
    [
        pytest.param(
            "auto", TWO, "cuda", (0, 1), "auto: cuda, found 2 (NVIDIA H200, Tesla T4)", id="all"
        ),
        pytest.param(
            "auto", NONE, "cpu", (), f"auto: cpu, since {NONE.no_cuda_reason}", id="a-cpu-build"
        ),
        pytest.param("cpu", TWO, "cpu", (), "device cpu was asked for", id="cpu-beside-gpus"),
        pytest.param(
            "cuda",
            TWO,
            "cuda",
            (0, 1),
            "device cuda was asked for: cuda, found 2 (NVIDIA H200, Tesla T4)",
            id="cuda-takes-them-all",
        ),
        pytest.param("cuda:1", TWO, "cuda", (1,), "device cuda:1 was asked for", id="one-of-them"),
    ],
)
def test_the_device_is_chosen_with_its_reason(
    asked: str, hardware: Hardware, device: str, indices: tuple[int, ...], reason: str
) -> None:
    choice = choose_device(asked, hardware)
    assert (choice.device, choice.indices, choice.reason) == (device, indices, reason)


@pytest.mark.parametrize(
    ("asked", "hardware", "message"),
    [
        pytest.param("cuda", NONE, "built without CUDA; use device cpu", id="no-cuda"),
        pytest.param("cuda:2", TWO, "has 2 CUDA devices", id="one-too-many"),
        pytest.param("tpu", TWO, "unknown", id="unknown-device"),
        pytest.param("cuda:x", TWO, "unknown", id="no-number"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    asked: str, hardware: Hardware, message: str
) -> None:
    with pytest.raises(SettingInvalid, match=message):
        choose_device(asked, hardware)


@pytest.mark.parametrize(
    ("asked", "device", "precision"),
    [
        pytest.param("auto", "cuda:0", "bf16", id="bf16-on-a-hopper"),
        pytest.param("auto", "cuda:1", "fp16", id="fp16-where-there-is-no-bf16"),
        pytest.param("auto", "cuda", "fp16", id="what-all-devices-can"),
        pytest.param("auto", "cpu", "fp32", id="fp32-on-cpus"),
        pytest.param("fp32", "cuda:0", "fp32", id="what-was-asked-for"),
        pytest.param("bf16", "cpu", "bf16", id="bf16-on-any-cpu"),
    ],
)
def test_the_precision_follows_the_oldest_device(asked: str, device: str, precision: str) -> None:
    assert choose_precision(asked, choose_device(device, TWO), TWO)[0] == precision


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


def test_devices_are_found_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert find_devices() == Hardware((), "torch is not installed (pip install 'trivec[gpu]')")


FAKE_CUDA = """
from types import SimpleNamespace
__version__ = '9.2'
version = SimpleNamespace(cuda={built})
cuda = SimpleNamespace(
    is_available=lambda: {count} > 0,
    device_count=lambda: {count},
    get_device_properties=lambda i: SimpleNamespace(name=f'GPU {{i}}', major=9, minor=i),
)
"""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param(
            {
                "version.py": "__version__ = '9.1'\ncuda = '13.0'\n",
                "__init__.py": "raise OSError('libcudnn.so.9: cannot open shared object file')\n",
            },
            "torch 9.1 cannot be imported (libcudnn.so.9: cannot open shared object file)",
            id="a-library-of-cuda-is-missing",
        ),
        pytest.param(
            {"__init__.py": "raise ImportError('undefined symbol')\n"},
            "torch of an unknown version cannot be imported (undefined symbol)",
            id="neither-versions-nor-an-import",
        ),
        pytest.param(
            {
                "version.py": "__version__ = '9.3+cpu'\ncuda = None\n",
                "__init__.py": "raise OSError('imported')\n",
            },
            "torch 9.3+cpu is built without CUDA",
            id="a-cpu-build-is-not-imported",
        ),
        pytest.param(
            {"__init__.py": FAKE_CUDA.format(built=None, count=0)},
            "torch 9.2 is built without CUDA",
            id="a-cpu-build-without-a-version-file",
        ),
        pytest.param(
            {"__init__.py": FAKE_CUDA.format(built="'13.0'", count=0)},
            "torch sees no CUDA device (see nvidia-smi)",
            id="no-driver",
        ),
        pytest.param(
            {"__init__.py": FAKE_CUDA.format(built="'13.0'", count=2)},
            (CudaDevice("GPU 0", (9, 0)), CudaDevice("GPU 1", (9, 1))),
            id="two-devices",
        ),
    ],
)
def test_what_torch_can_run_on_is_found_or_said_why_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    expected: str | tuple[CudaDevice, ...],
) -> None:
    (tmp_path / "torch").mkdir()
    for name, text in files.items():
        (tmp_path / "torch" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)  # what is there now comes back afterwards
    del sys.modules["torch"]
    hardware = find_devices()
    assert hardware == (Hardware((), expected) if isinstance(expected, str) else Hardware(expected))


@pytest.mark.parametrize(
    ("tokens_max", "cuda", "free_bytes", "budget"),
    [
        pytest.param(None, True, 100 << 30, BatchBudget(16_384, 2_048), id="a-roomy-gpu"),
        pytest.param(None, True, 0, BatchBudget(8, 1), id="a-full-gpu-still-runs"),
        pytest.param(None, True, 3_000_000, BatchBudget(721, 90), id="half-of-what-is-free"),
        pytest.param(None, False, None, BatchBudget(1_024, 128), id="a-cpu"),
        pytest.param(100, True, 0, BatchBudget(100, 12), id="what-was-asked"),
    ],
)
def test_the_batch_budget_follows_the_memory(
    tokens_max: int | None, cuda: bool, free_bytes: int | None, budget: BatchBudget
) -> None:
    config = ModelConfig("bert", 64, 2, 4, 160, 300, 512, position_offset=0, pad_token_id=0)
    found = token_budget(config, tokens_max=tokens_max, cuda=cuda, free_bytes=free_bytes)
    assert found == budget
