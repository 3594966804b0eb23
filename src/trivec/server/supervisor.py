"""A small parent that forks the serving process and starts it again when it dies or hangs.

It imports no engine and serves nothing: it passes signals on, listens to a heartbeat, and holds
the listening socket, so that connections wait through a restart instead of being refused.
"""

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

BEAT_EVERY_S = 1.0
BEAT, READY_BEAT = b".", b"r"
FAILED_STARTS_MAX = 5
START_REFUSED = 2  # the exit code of a setting or a model that cannot work
KILLED_BY_SIGTERM = 128 + signal.SIGTERM
SECOND_CHANCE_S = 1.0  # after a pause of the whole machine the child's beats may be late


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
    if ending.was_asked and ending.exit_code == KILLED_BY_SIGTERM:
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


class Supervisor:
    """Runs *serve* in a child process, again and again, until it is asked to stop."""

    def __init__(
        self,
        serve: Callable[[Heart], int],
        listener: socket.socket,
        *,
        heartbeat_s_max: float,
        say: Callable[[str], None],
    ) -> None:
        self._serve = serve
        self._listener = listener
        self._heartbeat_s_max = heartbeat_s_max
        self._say = say
        self._asked = False
        self._child = 0  # process id; 0 while there is none
        self._wake_read, self._wake_write = os.pipe()

    def run(self) -> int:
        """Supervise until the end; the exit code to leave with."""
        failed_starts, ever_ready = 0, False
        with self._signals():
            while True:
                ending = self._one_life()
                ever_ready = ever_ready or ending.was_ready
                decision = verdict(ending, failed_starts=failed_starts, ever_ready=ever_ready)
                if isinstance(decision, Leave):
                    return decision.exit_code
                failed_starts = decision.failed_starts
                self._say(
                    f"The server process ended with {ending.exit_code}; it is started again"
                    + (f" in {decision.after_s:.0f} s." if decision.after_s else ".")
                )
                self._wait((), decision.after_s)
                if self._asked:
                    return 0

    def _one_life(self) -> Ending:
        beat_read, beat_write = os.pipe()
        leash_read, leash_write = os.pipe()
        os.set_blocking(beat_write, False)
        self._child = os.fork()
        if self._child == 0:
            self._become_child(beat_read, leash_write)
            os._exit(self._serve(Heart(beat_write, leash_read)))
        os.close(beat_write)
        os.close(leash_read)
        if self._asked:  # while it was being born
            os.kill(self._child, signal.SIGTERM)
        try:
            was_ready = self._attend(beat_read)
            _, status = os.waitpid(self._child, 0)
        finally:
            self._child = 0
            os.close(beat_read)
            os.close(leash_write)
        code = os.waitstatus_to_exitcode(status)
        return Ending(code if code >= 0 else 128 - code, was_ready, self._asked)

    def _become_child(self, *not_ours: int) -> None:
        """Let go of the parent's things; a session of its own keeps Ctrl-C for the parent alone."""
        os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        for fd in (self._wake_read, self._wake_write, *not_ours):
            os.close(fd)

    def _attend(self, beat_read: int) -> bool:
        """Listen to the heart until it ends; whether the child was ever ready."""
        was_ready = False
        while True:
            beats = self._wait((beat_read,), self._heartbeat_s_max)
            if beats is None:
                beats = self._wait((beat_read,), SECOND_CHANCE_S)
            if beats is None:
                self._say(
                    f"The server process has not answered for {self._heartbeat_s_max:.0f} s; "
                    "it is killed."
                )
                os.kill(self._child, signal.SIGKILL)
                return was_ready
            if beats == b"":  # the pipe's other end is closed: the child has ended
                return was_ready
            was_ready = was_ready or READY_BEAT in beats

    def _wait(self, fds: tuple[int, ...], timeout_s: float) -> bytes | None:
        """What one of *fds* says, or None after *timeout_s*; a signal to stop ends a bare wait."""
        deadline = time.monotonic() + timeout_s
        while (left_s := deadline - time.monotonic()) > 0:
            readable, _, _ = select.select((self._wake_read, *fds), (), (), left_s)
            for fd in fds:
                if fd in readable:
                    return os.read(fd, 4096)
            if self._wake_read in readable:
                os.read(self._wake_read, 4096)
                if self._asked and not fds:
                    break
        return None

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the child to stop, and let go of the socket that the child will close."""
        self._asked = True
        self._listener.close()
        if self._child:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGTERM)
