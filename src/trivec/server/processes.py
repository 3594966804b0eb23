"""Exit codes, and the parent of several processes: it starts each, and again when it has died.

The parent imports no engine and serves nothing. It holds every listening socket, so that connections
wait through a restart instead of being refused. A process that hangs is for those outside to find:
`/readyz` and `/livez` tell them.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from types import FrameType

from trivec.core.errors import StartError
from trivec.settings import Settings

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
IGNORED = (signal.SIGUSR1, signal.SIGUSR2)  # their default would kill with all that is in flight
INTERRUPTED = 128 + signal.SIGINT  # the exit code after a second Ctrl-C
SAME_REQUEST_S = 0.1  # a signal sent to a whole process group may reach us twice, this close
BROKEN = 70  # EX_SOFTWARE: systemd or a container's runtime should start the service again
FAILED = 1  # an exception that no code expects
START_REFUSED = 2  # a setting or a model that cannot work, and will not after a restart
RESTARTS_MAX, RESTARTS_WITHIN_S = 5, 600.0  # more than that is no accident any more
RESTART_AFTER_S = 1.0
KILLED_BY_A_STOP = (128 + signal.SIGTERM, 128 + signal.SIGINT)

# Sockets are inherited; no thread of the parent holds a lock of ours.
_fork = multiprocessing.get_context("fork")


@dataclass(slots=True)
class ChildProcess:
    """One process of the service, whichever fills the place."""

    name: str
    serve: Callable[[], int]
    listener: socket.socket | None  # the one it keeps; it closes the others'
    process: ForkProcess | None = None
    start_at_s: float | None = 0.0  # None: it runs, or shall not any more
    start_count: int = 0

    def signal(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)


def exit_code_of(
    main: Callable[[], int],
    settings: Settings,
    *,
    say: Callable[[str], None],
    process: str | None = None,
) -> int:
    """Run *main* with a log; its exit code, whatever it raises. *process*: its name among several."""
    from trivec.telemetry import configure_log, finish_log  # slow to import, as the parent need not

    try:
        configure_log(settings.telemetry.log_format, level=settings.log_level, process=process)
        return main()
    except StartError as refusal:
        say(f"trivec: {refusal}")
        return START_REFUSED
    except BaseException:  # the outermost loop of the process; a library's panic is no Exception
        logging.getLogger("trivec").exception("the server process failed")
        return FAILED
    finally:
        finish_log()


def ignore_early_signals() -> None:
    """Until a process has handlers of its own, none of these may kill it."""
    for number in (signal.SIGHUP, *IGNORED):
        signal.signal(number, signal.SIG_IGN)


class Processes:
    """Runs *api* and *engine*, which leaves last, until told to stop or until they cannot go on."""

    def __init__(
        self, api: Sequence[ChildProcess], engine: ChildProcess, *, say: Callable[[str], None]
    ) -> None:
        self._api = api
        self._engine = engine
        self._members = [engine, *api]
        self._say = say
        self._restarts: deque[float] = deque(maxlen=RESTARTS_MAX)
        self._is_stopping = False
        self._interrupted_at_s: float | None = None
        self._exit_code = 0
        self._wake_read, self._wake_write = os.pipe()

    def run(self) -> int:
        """The exit code to leave with."""
        os.set_blocking(self._wake_write, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for number in STOPS:
            signal.signal(number, self._asked_to_stop)
        signal.signal(signal.SIGHUP, lambda _number, _frame: self._signal_api(signal.SIGHUP))
        for number in IGNORED:
            signal.signal(number, self._ignore)
        while True:
            now_s = time.monotonic()
            for member in self._members:
                if member.start_at_s is not None and now_s >= member.start_at_s:
                    self._start(member)
            running = [one.process for one in self._members if one.process is not None]
            if self._is_stopping and not running:
                signal.set_wakeup_fd(-1)
                return self._exit_code
            if self._is_stopping and running == [self._engine.process]:
                self._engine.signal(signal.SIGTERM)
            due = [one.start_at_s for one in self._members if one.start_at_s is not None]
            timeout_s = max(min(due) - now_s, 0.0) if due else None
            sentinels = [process.sentinel for process in running]
            if self._wake_read in wait([self._wake_read, *sentinels], timeout_s):
                os.read(self._wake_read, 4096)
            for member in self._members:
                if member.process is not None and member.process.exitcode is not None:
                    self._ended(member, member.process.exitcode)

    def _start(self, member: ChildProcess) -> None:
        # A stop that comes meanwhile is heard when the process has its number.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        try:
            member.start_at_s = None
            if not self._is_stopping:
                member.start_count += 1
                run = partial(self._run_child, member)
                member.process = _fork.Process(target=run, name=member.name)
                member.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def _run_child(self, member: ChildProcess) -> None:
        os.setsid()  # Ctrl-C is the parent's alone
        signal.set_wakeup_fd(-1)
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)
        ignore_early_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        for other in self._members:
            if other is not member and other.listener is not None:
                other.listener.close()
        threading.Thread(target=_leave_with_parent, name="parent", daemon=True).start()
        os._exit(member.serve())

    def _ended(self, member: ChildProcess, exit_code: int) -> None:
        """Start another process in its place; or stop all, where that would not help."""
        member.process = None
        code = exit_code if exit_code >= 0 else 128 - exit_code
        if member is self._engine and code == 0 and not self._is_stopping:
            code = BROKEN  # told to stop by somebody else
        if self._is_stopping:
            if code not in KILLED_BY_A_STOP:  # before it could drain; nothing was accepted yet
                self._exit_code = self._exit_code or code
            return
        now_s = time.monotonic()
        recent_count = sum(now_s - at_s < RESTARTS_WITHIN_S for at_s in self._restarts)
        if code == 0 or (code == START_REFUSED and member.start_count == 1):
            self._exit_code = code
        elif recent_count == RESTARTS_MAX:
            self._say(
                f"The {member.name} process ended with {code}, after {RESTARTS_MAX} restarts."
            )
            self._exit_code = BROKEN
        else:
            self._restarts.append(now_s)
            member.start_at_s = now_s + (RESTART_AFTER_S if recent_count else 0.0)
            self._say(f"The {member.name} process ended with {code}; it is started again.")
            return
        self._stop()

    def _stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Ask the API processes to drain, and let go of the sockets that they will close."""
        self._is_stopping = True
        for member in self._members:
            member.start_at_s = None
        for member in self._api:
            assert member.listener is not None
            member.listener.close()
        self._signal_api(number)

    def _signal_api(self, number: signal.Signals) -> None:
        for member in self._api:
            member.signal(number)

    def _asked_to_stop(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:
            self._stop()
            return
        now_s = time.monotonic()
        if self._interrupted_at_s is None:
            self._interrupted_at_s = now_s
            self._stop(signal.SIGINT)
        elif now_s - self._interrupted_at_s >= SAME_REQUEST_S:  # again: whatever they are doing
            self._exit_code = INTERRUPTED
            for member in self._members:
                member.signal(signal.SIGKILL)

    def _ignore(self, number: int, frame: FrameType | None) -> None:
        self._say(f"trivec: {signal.Signals(number).name} means nothing here; it is ignored.")


def _leave_with_parent() -> None:
    """End at once when the parent is gone: nobody would start this process again."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
