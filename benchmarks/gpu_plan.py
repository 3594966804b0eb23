"""How large a GPU measurement is, and the little that all its parts share."""

import argparse
import sys
from dataclasses import dataclass

import torch

LENGTHS = (32, 128, 512, 2048, 8192)


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
