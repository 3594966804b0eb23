"""How large a GPU measurement is, and the little that all its parts share."""

import argparse
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

LENGTHS = (32, 128, 512, 2048, 8192)

# Seconds that each part is let have at full size on one GPU, starting a second server included.
PART_S: Mapping[str, float] = MappingProxyType(
    {"engine": 110.0, "host": 15.0, "peers": 60.0, "http": 170.0, "nan_zoo": 60.0}
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How large and how long everything is."""

    is_small: bool
    layers: int
    seconds: float  # of one measurement
    repeats: int
    lengths: tuple[int, ...]
    matmul_rows: int
    nan_length_max: int

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Plan":
        if arguments.small:
            return cls(True, 2, 1.0, 2, LENGTHS[:3], 512, 256)
        return cls(
            False, arguments.layers, arguments.seconds, arguments.repeats, LENGTHS, 16_384, 8_192
        )


class Hourglass:
    """What is left of the time that the whole run may take."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.perf_counter() + seconds

    @property
    def left_s(self) -> float:
        return self._end_s - time.perf_counter()

    def has(self, seconds: float, *, then: Collection[str] = ()) -> bool:
        """Whether *seconds* are left beside what the parts to come *then* need."""
        return self.left_s >= seconds + sum(PART_S[name] for name in then)


def talk(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def device_name() -> str:
    return str(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def finish_device() -> None:
    """Wait for all that was launched: launches return before the device has done anything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
