"""How large a GPU measurement is, the time it may take, and what it has found so far, kept in a file.

A time limit from outside loses nothing; one of its own leaves out what would end too late.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

LENGTHS = (32, 128, 512, 2048, 8192)
# Seconds that each part is let have at full size on one GPU, starting a second server included.
PART_S: Mapping[str, float] = MappingProxyType(
    {"engine": 110.0, "host": 15.0, "peers": 60.0, "http": 170.0, "nan_zoo": 60.0}
)


def talk(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


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
    device: str
    precision: str
    api_processes: int | None  # None: half the cores

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Plan":
        asked = (arguments.device, arguments.precision, arguments.api_processes)
        if arguments.small:
            return cls(True, 2, 1.0, 2, LENGTHS[:3], 512, 256, *asked)
        measured = (arguments.layers, arguments.seconds, arguments.repeats)
        return cls(False, *measured, LENGTHS, 16_384, 8_192, *asked)


class TimeBudget:
    """What is left of the time that the whole run may take."""

    def __init__(self, seconds: float) -> None:
        self._end_s = time.perf_counter() + seconds

    @property
    def left_s(self) -> float:
        return self._end_s - time.perf_counter()

    def has(self, seconds: float, *, then: Collection[str] = ()) -> bool:
        """Whether *seconds* are left beside what the parts to come *then* need."""
        return self.left_s >= seconds + sum(PART_S[name] for name in then)


class Record:
    """Figures by part. The file is whole at every moment; the line says what is not in it."""

    def __init__(self, file: Path, parts: list[str]) -> None:
        self._file = file
        self.to_come = list(parts)  # parts that are not finished, in their order
        self._figures: dict[str, Any] = {"benchmark": "gpu"}

    def put(self, name: str, figures: Any) -> None:
        """Keep *figures*; those of a part under way may come again, fuller."""
        self._figures[name] = figures
        self._file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(self._whole(), indent=1) + "\n")
        fresh.replace(self._file)

    def finish(self, name: str, figures: Any) -> None:
        self.to_come.remove(name)
        self.put(name, figures)

    def _whole(self) -> dict[str, Any]:
        return {**self._figures, "unfinished": self.to_come}

    @contextmanager
    def printed_whatever_happens(self) -> Iterator[None]:
        """Print one JSON line at the end of the block, also of one that raises or is told to stop."""

        def stop(number: int, _frame: FrameType | None) -> None:
            raise SystemExit(128 + number)

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            print(json.dumps(self._whole()), flush=True)
