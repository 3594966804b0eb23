"""The time that a GPU measurement may take, and what it has found so far, kept in a file as it comes.

A time limit from outside loses nothing, and one of its own leaves out what would end too late.
"""

import json
import signal
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

# Seconds that each part is let have at full size on one GPU, starting a second server included.
PART_S: Mapping[str, float] = MappingProxyType(
    {"engine": 110.0, "host": 15.0, "peers": 60.0, "http": 170.0, "nan_zoo": 60.0}
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


class Record:
    """Figures by part. The file is whole at every moment; the line says what is not in it."""

    def __init__(self, file: Path, parts: list[str]) -> None:
        self._file = file
        self._to_come = list(parts)
        self._figures: dict[str, Any] = {"benchmark": "gpu"}

    def put(self, name: str, figures: Any) -> None:
        """Keep *figures*; those of a part under way may come again, fuller."""
        self._figures[name] = figures
        self._file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._file.with_suffix(".new")
        fresh.write_text(json.dumps(self._whole(), indent=1) + "\n")
        fresh.replace(self._file)

    def finish(self, name: str, figures: Any) -> None:
        self._to_come.remove(name)
        self.put(name, figures)

    @property
    def to_come(self) -> list[str]:
        """Parts that are not finished, in their order."""
        return list(self._to_come)

    def line(self) -> str:
        return json.dumps(self._whole())

    def _whole(self) -> dict[str, Any]:
        return {**self._figures, "unfinished": self._to_come}


@contextmanager
def printed_whatever_happens(record: Record) -> Iterator[None]:
    """Print the one line at the end of the block, also of one that raises or is told to stop."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        print(record.line(), flush=True)
