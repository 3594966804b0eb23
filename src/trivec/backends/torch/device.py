"""Device choice: which device, which precision, and how many tokens a batch may have there.

Pure but for `find_devices`, which asks the machine. Needs no torch to be installed.
"""

import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from trivec.core.errors import SettingInvalid
from trivec.core.types import BatchBudget
from trivec.models.ops import ModelConfig

BF16_CAPABILITY = (8, 0)  # Ampere: the first to multiply bfloat16 in hardware
PRECISIONS = ("auto", "fp32", "bf16", "fp16")

# Matrix products of 1,024-wide encoders fill a Hopper from about 8,000 rows on; twice that keeps
# the launches of a batch well under its own time, and a query never waits longer than 30 ms for it.
CUDA_TOKENS_MAX = 16_384
CPU_TOKENS_MAX = 1_024
SHORTEST_TEXT_TOKENS = 8  # sequences_max = tokens_max / this
MEMORY_SHARE_MAX = 0.5  # of what is free after the weights: the rest is for fp32 re-runs and others


@dataclass(frozen=True, slots=True)
class TorchOptions:
    """How the devices are driven. Every field changes speed or memory, none the vectors' meaning."""

    tokens_max: int | None = None  # of a batch; None: by device and free memory
    slots_per_device: int | None = None  # None: 2 on CUDA, 1 on CPU
    attention: str | None = None  # a kernel's name; None: the first that passes its check
    compiled: bool | None = None  # None: on CUDA, when its check passes
    graph_tokens_max: int | None = None  # None: 2,048 on CUDA; 0: no CUDA graphs


@dataclass(frozen=True, slots=True)
class CudaDevice:
    """A CUDA device as its driver describes it."""

    name: str
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Hardware:
    """What torch can run on besides the CPU."""

    cuda: tuple[CudaDevice, ...]  # by index
    no_cuda_reason: str = ""  # where there is none


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """Devices to run on, and why, in words for the log and for `/models`."""

    device: str  # "cpu" or "cuda"
    indices: tuple[int, ...]  # the CUDA devices; empty on the CPU
    reason: str


def find_devices() -> Hardware:
    """Ask torch, where it is installed, what it can run on. Starts the CUDA driver.

    For a torch without CUDA its version file is read instead: importing it takes 120 MiB, which a
    server that then runs on OpenVINO would hold for nothing.
    """
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return Hardware((), "torch is not installed (pip install 'trivec[gpu]')")
    build: Mapping[str, object] = {}
    version_file = Path(spec.origin).with_name("version.py")
    if version_file.exists():
        build = runpy.run_path(str(version_file))
    version = build.get("__version__", "of an unknown version")
    if build.get("cuda", "unknown") is None:
        return Hardware((), f"torch {version} is built without CUDA")

    try:
        import torch
    except (ImportError, OSError) as error:  # a library of CUDA's is missing, or not the right one
        return Hardware((), f"torch {version} cannot be imported ({error})")
    if torch.version.cuda is None:
        return Hardware((), f"torch {torch.__version__} is built without CUDA")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return Hardware((), "torch sees no CUDA device (see nvidia-smi)")
    properties = (torch.cuda.get_device_properties(index) for index in range(count))
    return Hardware(tuple(CudaDevice(one.name, (one.major, one.minor)) for one in properties))


def choose_device(asked: str, hardware: Hardware) -> DeviceChoice:
    """Choose for *asked* ("auto", "cpu", "cuda" or "cuda:N").

    Raises `SettingInvalid`, with the next step, where the asked device is not there.
    """
    if asked == "cpu":
        return DeviceChoice("cpu", (), "device cpu was asked for")
    if asked not in {"auto", "cuda"} and not asked.removeprefix("cuda:").isdigit():
        raise SettingInvalid(f"device {asked} is unknown; use auto, cpu or cuda")
    count = len(hardware.cuda)
    if not count:
        if asked == "auto":
            return DeviceChoice("cpu", (), f"auto: cpu, since {hardware.no_cuda_reason}")
        raise SettingInvalid(f"device {asked}: {hardware.no_cuda_reason}; use device cpu")
    if asked.startswith("cuda:"):
        index = int(asked.removeprefix("cuda:"))
        if index >= count:
            raise SettingInvalid(
                f"device {asked}: this machine has {count} CUDA devices, from cuda:0 on"
            )
        return DeviceChoice("cuda", (index,), f"device {asked} was asked for")
    names = ", ".join(device.name for device in hardware.cuda)
    origin = "auto" if asked == "auto" else "device cuda was asked for"
    return DeviceChoice("cuda", tuple(range(count)), f"{origin}: cuda, found {count} ({names})")


def choose_precision(asked: str, choice: DeviceChoice, hardware: Hardware) -> tuple[str, str]:
    """The precision for *asked*, one of `PRECISIONS`, on the chosen devices; and why.

    Raises `SettingInvalid` for what the devices cannot do.
    """
    if asked.startswith("int8"):
        raise SettingInvalid(
            f"precision {asked} is for the openvino backend; torch has auto, fp32, bf16 and fp16"
        )
    if asked not in PRECISIONS:
        raise SettingInvalid(f"precision {asked} is unknown; use auto, fp32, bf16 or fp16")
    devices = [hardware.cuda[index] for index in choice.indices]
    oldest = min(devices, key=lambda device: device.capability, default=None)
    has_bf16 = oldest is None or oldest.capability >= BF16_CAPABILITY
    if asked == "bf16" and oldest is not None and not has_bf16:
        raise SettingInvalid(f"precision bf16: {oldest.name} has none; use fp16 or fp32")
    if asked != "auto":
        return asked, f"precision {asked} was asked for"
    if oldest is None:
        return "fp32", "auto: fp32 is the fastest exact arithmetic of torch on CPUs"
    if not has_bf16:
        return "fp16", f"auto: fp16, since {oldest.name} has no bf16"
    return "bf16", "auto: bf16 has the range of fp32 and full matrix speed"


def token_budget(
    config: ModelConfig, *, tokens_max: int | None, cuda: bool, free_bytes: int | None
) -> BatchBudget:
    """What one batch may hold on a device with *free_bytes* left after the weights.

    *tokens_max* is what was asked for. The bytes of a token are those of the worst moment of a
    half-precision pass: in the feed-forward half, its inner rows before and after GELU (2 bytes
    each), the residual's rows in half and in fp32, queries, keys and values; then the heads' fp32
    copies, twice.
    """
    if tokens_max is None:
        tokens_max = CUDA_TOKENS_MAX if cuda else CPU_TOKENS_MAX
        if free_bytes is not None:
            encoder = 2 * 2 * config.intermediate_size + (2 + 4 + 4 + 3 * 2) * config.hidden_size
            heads = 3 * 4 * config.hidden_size
            token_bytes = max(encoder, heads) * 5 // 4  # the allocator's own rounding
            fitting = int(MEMORY_SHARE_MAX * free_bytes) // token_bytes
            tokens_max = max(min(tokens_max, fitting), SHORTEST_TEXT_TOKENS)
    return BatchBudget(tokens_max, max(tokens_max // SHORTEST_TEXT_TOKENS, 1))
