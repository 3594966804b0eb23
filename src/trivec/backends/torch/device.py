"""Which device, and which arithmetic on it: pure choices that say their reason.

Asking the machine (`find_devices`) is apart from choosing, and works where torch is not installed.
"""

import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from trivec.core.errors import SettingInvalid

BF16_CAPABILITY = (8, 0)  # Ampere: the first to multiply bfloat16 in hardware


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """One CUDA device as its driver describes it."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Found:
    """What this machine has for torch to run on."""

    torch_version: str | None  # None: torch is not installed
    cuda_built: bool
    cuda: tuple[CudaDevice, ...]
    fault: str | None = None  # why torch, which is installed, cannot be imported


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """Devices to run on, and why, in words for the log and for `/models`."""

    device: str  # "cpu" or "cuda"
    indices: tuple[int, ...]  # the CUDA devices; empty on the CPU
    reason: str


@dataclass(frozen=True, slots=True)
class PrecisionChoice:
    """Arithmetic of the encoder, and why."""

    precision: str  # "fp32", "bf16" or "fp16"
    reason: str


def find_devices() -> Found:
    """Ask torch, where it is installed, what it can run on. Starts the CUDA driver.

    A torch without CUDA is asked by its file of versions alone: importing it takes 120 MiB, which a
    server that then runs on OpenVINO would hold for nothing.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return Found(torch_version=None, cuda_built=False, cuda=())
    build = _build_of(Path(spec.origin))
    version = str(build.get("__version__", "of an unknown version"))
    if build.get("cuda", "perhaps") is None:
        return Found(torch_version=version, cuda_built=False, cuda=())

    try:
        import torch
    except (ImportError, OSError) as fault:  # a library of CUDA's is missing, or not the right one
        return Found(torch_version=version, cuda_built=True, cuda=(), fault=str(fault))

    properties = [
        torch.cuda.get_device_properties(index)
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    return Found(
        torch_version=str(torch.__version__),
        cuda_built=torch.version.cuda is not None,
        cuda=tuple(
            CudaDevice(index, one.name, (one.major, one.minor), one.total_memory)
            for index, one in enumerate(properties)
        ),
    )


def _build_of(package: Path) -> Mapping[str, object]:
    """What torch's file of versions says; nothing where this build of it has none."""
    try:
        return runpy.run_path(str(package.with_name("version.py")))
    except OSError:
        return {}


def choose_device(asked: str, found: Found) -> DeviceChoice:
    """Choose for *asked* ("auto", "cpu", "cuda" or "cuda:N") among what was *found*.

    Raises `SettingInvalid`, with the next step, where the asked device is not there.
    """
    if asked == "cpu":
        return DeviceChoice("cpu", (), "--device cpu was asked for")
    if asked not in {"auto", "cuda"} and not asked.removeprefix("cuda:").isdigit():
        raise SettingInvalid(f"--device {asked} is unknown; use auto, cpu, cuda or cuda:N")
    missing = _why_no_cuda(found)
    if missing is not None:
        if asked == "auto":
            return DeviceChoice("cpu", (), f"auto: cpu, since {missing}")
        raise SettingInvalid(f"--device {asked}: {missing}; use --device cpu")
    if asked.startswith("cuda:"):
        index = int(asked.removeprefix("cuda:"))
        if index >= len(found.cuda):
            raise SettingInvalid(
                f"--device {asked}: this machine has {len(found.cuda)} CUDA devices, from cuda:0 on"
            )
        return DeviceChoice("cuda", (index,), f"--device {asked} was asked for")
    names = ", ".join(one.name for one in found.cuda)
    how = "auto" if asked == "auto" else "--device cuda was asked for"
    indices = tuple(one.index for one in found.cuda)
    return DeviceChoice("cuda", indices, f"{how}: cuda, found {len(indices)} ({names})")


def _why_no_cuda(found: Found) -> str | None:
    if found.torch_version is None:
        return "torch is not installed (pip install 'trivec[gpu]')"
    if found.fault is not None:
        return f"torch {found.torch_version} cannot be imported ({found.fault})"
    if not found.cuda_built:
        return f"torch {found.torch_version} is built without CUDA"
    if not found.cuda:
        return "torch sees no CUDA device (see nvidia-smi)"
    return None


def choose_precision(asked: str, choice: DeviceChoice, found: Found) -> PrecisionChoice:
    """The arithmetic for *asked* ("auto", "fp32", "bf16", "fp16") on the chosen devices.

    Raises `SettingInvalid` for what the devices cannot do.
    """
    if asked.startswith("int8"):
        raise SettingInvalid(
            f"--precision {asked} is for the openvino backend; torch has auto, fp32, bf16 and fp16"
        )
    if asked not in {"auto", "fp32", "bf16", "fp16"}:
        raise SettingInvalid(f"--precision {asked} is unknown; use auto, fp32, bf16 or fp16")
    oldest = min(
        (found.cuda[index] for index in choice.indices),
        key=lambda one: one.capability,
        default=None,
    )
    if asked != "auto":
        if asked == "bf16" and oldest is not None and oldest.capability < BF16_CAPABILITY:
            raise SettingInvalid(f"--precision bf16: {oldest.name} has none; use fp16 or fp32")
        return PrecisionChoice(asked, f"--precision {asked} was asked for")
    if oldest is None:
        return PrecisionChoice(
            "fp32", "auto: fp32 is the fastest exact arithmetic of torch on CPUs"
        )
    if oldest.capability < BF16_CAPABILITY:
        return PrecisionChoice("fp16", f"auto: fp16, since {oldest.name} has no bf16")
    return PrecisionChoice("bf16", "auto: bf16 has the range of fp32 and full matrix speed")
