"""What a parent and its process tell each other, and what follows when the process ends.

The parent's side of it, the forking and the listening, is `crew`.
"""

import contextlib
import os
import signal
import threading
from dataclasses import dataclass

BEAT_EVERY_S = 1.0
SAME_REQUEST_S = 0.1  # a signal sent to a whole process group may reach us twice, this close
BEAT, READY_BEAT = b".", b"r"
FAILED_STARTS_MAX = 5
START_REFUSED = 2  # the exit code of a setting or a model that cannot work
KILLED_BY_A_STOP = (128 + signal.SIGTERM, 128 + signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Ending:
    """How one serving process ended."""

    exit_code: int  # 128 + n where signal n ended it
    was_ready: bool
    was_asked: bool  # we had passed on a signal to stop


@dataclass(frozen=True, slots=True)
class Leave:
    exit_code: int


@dataclass(frozen=True, slots=True)
class StartAgain:
    after_s: float
    failed_starts: int  # in a row, that never became ready


def verdict(ending: Ending, *, failed_starts: int, ever_ready: bool) -> Leave | StartAgain:
    """What to do once a serving process has ended.

    A process that had been ready starts again at once. One that never was waits twice as long
    each time, and after five in a row whoever supervises us shall decide.
    """
    if ending.was_asked and ending.exit_code in KILLED_BY_A_STOP:
        return Leave(0)  # asked before it had learned to drain; nothing was accepted yet
    if ending.was_asked or ending.exit_code == 0:
        return Leave(ending.exit_code)
    if ending.was_ready:
        return StartAgain(after_s=0.0, failed_starts=0)
    if ending.exit_code == START_REFUSED and not ever_ready:
        return Leave(START_REFUSED)
    failed_starts += 1
    if failed_starts >= FAILED_STARTS_MAX and not ever_ready:
        return Leave(ending.exit_code)
    return StartAgain(after_s=min(2.0 ** (failed_starts - 1), 30.0), failed_starts=failed_starts)


class Heart:
    """The serving process's end: it beats towards the parent, and stops when the parent dies."""

    def __init__(self, beat_fd: int, leash_fd: int) -> None:
        self._beat_fd = beat_fd
        self._leash_fd = leash_fd

    def tie(self) -> None:
        """From now on, leave at once when the parent is gone: nobody would start us again."""
        threading.Thread(target=self._leave_with_parent, name="leash", daemon=True).start()

    def beat(self, *, ready: bool) -> None:
        """Tell the parent that the event loop still turns. Never blocks."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._beat_fd, READY_BEAT if ready else BEAT)

    def _leave_with_parent(self) -> None:
        os.read(self._leash_fd, 1)
        os._exit(1)
