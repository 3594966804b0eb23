"""A clock that stands still until a test moves it, and an event loop that a test moves ahead."""

import asyncio


class HandClock:
    """`Clock` for tests: both times advance by exactly what `move` is told."""

    def __init__(self, *, now_s: float = 1_000.0, wall_s: float = 1_700_000_000.0) -> None:
        self._now_s = now_s
        self._wall_s = wall_s

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._wall_s

    def move(self, seconds: float) -> None:
        assert seconds >= 0, "a monotonic clock never runs backwards"
        self._now_s += seconds
        self._wall_s += seconds

    def set_wall_by(self, seconds: float) -> None:
        """Somebody sets the wall clock; no time goes by."""
        self._wall_s += seconds


class HandLoop(asyncio.SelectorEventLoop):
    """An event loop whose timers come due when a test says so, however long the machine takes.

    Its time goes by, too, so what a test waits for must be far away until `move` brings it near.
    """

    _ahead_s = 0.0

    def time(self) -> float:
        return super().time() + self._ahead_s

    def move(self, seconds: float) -> None:
        """Call it on the loop's own thread."""
        assert seconds >= 0, "a monotonic clock never runs backwards"
        self._ahead_s += seconds
