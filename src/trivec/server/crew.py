"""A small parent that forks those who serve, and starts each again when it dies or hangs.

Mostly that is one process. With `api_processes` it is several that speak HTTP and one that drives
the device, which goes when they need it no more. The parent imports no engine and serves nothing: it
passes signals on, listens to heartbeats, and holds every listening socket, so that connections and
calls to the engine wait through a restart instead of being refused.
"""

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

from trivec.server.supervisor import READY_BEAT, SAME_REQUEST_S, Ending, Heart, Leave, verdict

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED = (signal.SIGUSR1, signal.SIGUSR2)  # their default would kill with all that is in flight
INTERRUPTED = 128 + signal.SIGINT  # the exit code after a second Ctrl-C
SECOND_CHANCE_S = 1.0  # after a pause of the whole machine beats may be late


@dataclass(frozen=True, slots=True)
class Post:
    """One place in the crew, whichever process fills it."""

    name: str
    serve: Callable[[Heart], int]
    listener: socket.socket  # the one its process keeps; it lets go of the others'


class _Member:
    """The process on a post: at most one at a time."""

    def __init__(self, post: Post) -> None:
        self.post = post
        self.pid = 0  # 0 while there is none
        self.beat_read = self.leash_write = -1
        self.deadline_s = 0.0  # by when its heart must have beaten
        self.is_doubted = False  # it missed a deadline, and has its second chance
        self.was_ready = self.ever_ready = False
        self.failed_starts = 0
        self.due_s: float | None = 0.0  # when to start one; None: not

    def bear(self, others: Sequence["_Member"], *, not_ours: Sequence[int]) -> None:
        """Fork the process, with `STOPS` held. *others* and *not_ours* are what it lets go of."""
        self.beat_read, beat_write = os.pipe()
        leash_read, self.leash_write = os.pipe()
        os.set_blocking(beat_write, False)
        self.was_ready, self.due_s = False, None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()  # Ctrl-C is the parent's alone
            signal.set_wakeup_fd(-1)
            for number in (*STOPS, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            ignore_early()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
            for fd in (*not_ours, self.beat_read, self.leash_write):
                os.close(fd)
            for other in others:
                other.let_go()
            os._exit(self.post.serve(Heart(beat_write, leash_read)))
        os.close(beat_write)
        os.close(leash_read)

    def let_go(self) -> None:
        """In a sibling's process: close what is this member's."""
        self.post.listener.close()
        if self.pid:
            os.close(self.beat_read)
            os.close(self.leash_write)

    def signal(self, number: signal.Signals) -> None:
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def bury(self) -> int:
        """Wait for the process that has ended; its exit code, or 128 + the signal."""
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        os.close(self.beat_read)
        os.close(self.leash_write)
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


def ignore_early() -> None:
    """Until a process has handlers of its own, none of these signals may kill it."""
    for number in (signal.SIGHUP, *IGNORED):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _stops_held() -> Iterator[None]:
    """Let signals to stop wait until the block's end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


class Crew:
    """Runs a process on every post until asked to stop, or until one of them cannot go on."""

    def __init__(
        self,
        posts: Sequence[Post],
        *,
        engine: Post | None = None,
        heartbeat_s_max: float,
        say: Callable[[str], None],
    ) -> None:
        """*engine* stays until those on the other *posts* have drained."""
        self._drained_first = [_Member(post) for post in posts]
        self._engine = None if engine is None else _Member(engine)
        self._members = [*([self._engine] if self._engine else []), *self._drained_first]
        self._heartbeat_s_max = heartbeat_s_max
        self._say = say
        self._asked = False
        self._interrupted_at_s: float | None = None
        self._exit_code = 0
        self._wake_read, self._wake_write = os.pipe()

    def run(self) -> int:
        """Supervise until the end; the exit code to leave with."""
        with self._signals():
            while True:
                now_s = time.monotonic()
                for member in self._members:
                    if member.due_s is not None and now_s >= member.due_s:
                        self._start(member)
                living = [member for member in self._members if member.pid]
                if self._asked and not living:
                    return self._exit_code
                if self._asked and self._engine and living == [self._engine]:
                    self._engine.signal(signal.SIGTERM)
                self._listen(living, until_s=self._next_look_s())
                self._reap_orphans()

    def _start(self, member: _Member) -> None:
        others = [one for one in self._members if one is not member]
        with _stops_held():  # one that comes meanwhile is heard when the process has its number
            if self._asked:
                return
            member.bear(others, not_ours=(self._wake_read, self._wake_write))
        member.deadline_s = time.monotonic() + self._heartbeat_s_max
        member.is_doubted = False

    def _reap_orphans(self) -> None:
        """Take the status of ended processes that are not ours: as PID 1 we inherit all orphans.

        One of ours is left to `bury`, which follows at once: its pipe has closed.
        """
        ours = {member.pid for member in self._members}
        with contextlib.suppress(ChildProcessError):
            while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                if found.si_pid in ours:
                    return
                os.waitpid(found.si_pid, os.WNOHANG)

    def _next_look_s(self) -> float:
        looks = [one.deadline_s for one in self._members if one.pid]
        looks += [one.due_s for one in self._members if one.due_s is not None]
        return min(looks, default=time.monotonic())

    def _listen(self, living: Sequence[_Member], *, until_s: float) -> None:
        """Hear every heart until *until_s*, and act on those that ended or are silent."""
        by_fd = {member.beat_read: member for member in living}
        patience_s = max(until_s - time.monotonic(), 0.0)
        readable, _, _ = select.select((self._wake_read, *by_fd), (), (), patience_s)
        if self._wake_read in readable:
            os.read(self._wake_read, 4096)
        for fd, member in by_fd.items():
            if fd in readable:
                self._hear(member, os.read(fd, 4096))
            elif time.monotonic() >= member.deadline_s:
                self._doubt(member)

    def _hear(self, member: _Member, beats: bytes) -> None:
        if beats:
            member.was_ready = member.was_ready or READY_BEAT in beats
            member.deadline_s = time.monotonic() + self._heartbeat_s_max
            member.is_doubted = False
            return
        ending = Ending(member.bury(), member.was_ready, self._asked)
        member.ever_ready = member.ever_ready or ending.was_ready
        decision = verdict(ending, failed_starts=member.failed_starts, ever_ready=member.ever_ready)
        name = member.post.name
        if isinstance(decision, Leave):
            self._exit_code = self._exit_code or decision.exit_code
            if not self._asked:  # without it the others are of no use
                self._stop()
            return
        member.failed_starts = decision.failed_starts
        member.due_s = time.monotonic() + decision.after_s
        self._say(
            f"The {name} process ended with {ending.exit_code}; it is started again"
            + (f" in {decision.after_s:.0f} s." if decision.after_s else ".")
        )

    def _doubt(self, member: _Member) -> None:
        """After a pause of the whole machine beats may be late; after a second chance they are not."""
        if not member.is_doubted:
            member.is_doubted = True
            member.deadline_s = time.monotonic() + SECOND_CHANCE_S
            return
        self._say(
            f"The {member.post.name} process has not answered for "
            f"{self._heartbeat_s_max:.0f} s; it is killed."
        )
        member.deadline_s = time.monotonic() + self._heartbeat_s_max
        member.signal(signal.SIGKILL)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in STOPS:
            signal.signal(number, self._ask)
        signal.signal(signal.SIGHUP, self._pass_on)
        for number in IGNORED:
            signal.signal(number, self._ignore)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)  # wakes `_listen`
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self._stop(signal.SIGTERM)
            return
        now_s = time.monotonic()
        if self._interrupted_at_s is None:
            self._interrupted_at_s = now_s
            self._stop(signal.SIGINT)
        elif (
            now_s - self._interrupted_at_s >= SAME_REQUEST_S
        ):  # whatever it is doing, and though it may hang
            self._exit_code = INTERRUPTED
            for member in self._members:
                member.signal(signal.SIGKILL)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        for member in self._drained_first:
            member.signal(signal.SIGHUP)

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        self._say(f"trivec: {signal.Signals(number).name} means nothing here; it is ignored.")

    def _stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask those who drain first to stop, and let go of the sockets that they will close."""
        self._asked = True
        for member in self._members:
            member.due_s = None
        for member in self._drained_first:
            member.post.listener.close()
            member.signal(number)
