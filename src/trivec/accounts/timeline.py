"""Which instant it is for allowances and idempotency keys: a timeline that belongs to the store.

It runs on the monotonic clock plus an offset which all processes of one boot of one machine share
through the store, so a wall clock that is moved by hand moves nothing, in this process or the next.
A process that finds rows from further on (another machine) jumps forward to them and never back:
the fastest clock leads, nobody waits for a slow one.
"""

from pathlib import Path
from uuid import uuid4

from trivec.core.ports import Clock

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Timeline:
    """Touched by the writer's thread only."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_us = self.offset_proposed_us()

    def now_us(self) -> int:
        return self._monotonic_us() + self._offset_us

    def offset_proposed_us(self) -> int:
        """The offset to use when the store has none for this boot: that of the wall clock."""
        return int(self._clock.wall_s() * 1_000_000) - self._monotonic_us()

    def agree(self, offset_us: int) -> None:
        """Take the offset that the store holds for this boot."""
        self._offset_us = offset_us

    def catch_up(self, seen_us: int) -> None:
        """Another process was at *seen_us* already: go on from there."""
        self._offset_us += max(0, seen_us - self.now_us())

    def _monotonic_us(self) -> int:
        return int(self._clock.now_s() * 1_000_000)


def boot_id() -> str:
    """Equal for all processes between two boots of this machine, where the system tells."""
    try:
        return BOOT_ID.read_text("ascii").strip()
    except OSError:  # no such file on macOS: a process is then alone on its timeline
        return str(uuid4())
