"""What a GPU measurement has found so far, kept in a file as it comes: a time limit loses nothing."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


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
