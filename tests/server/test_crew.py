"""The parent of several processes where a signal comes at the worst moment."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from trivec.server.crew import IGNORED, STOPS, Crew, Post
from trivec.server.supervisor import Heart

SIGNALS = (*STOPS, *IGNORED, signal.SIGHUP, signal.SIGCHLD)


@pytest.fixture
def own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ends_at_once(heart: Heart) -> int:
    return 0


def lives_long(heart: Heart) -> int:
    heart.beat(ready=True)
    signal.pause()
    return 0


@pytest.mark.usefixtures("own_signals")
def test_a_stop_that_reaches_a_process_at_its_birth_ends_that_one_and_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C does, between the fork and the new process's own handlers."""
    forks, said = list[int](), list[str]()
    fork = os.fork

    def forked_in_a_storm() -> int:
        forks.append(pid := fork())
        if pid == 0 and len(forks) == 2:
            signal.raise_signal(signal.SIGTERM)
        return pid

    monkeypatch.setattr(os, "fork", forked_in_a_storm)
    with socket.socket() as calls, socket.socket() as listener:
        crew = Crew(
            [Post("api-1", ends_at_once, listener)],
            engine=Post("engine", lives_long, calls),
            heartbeat_s_max=30,
            say=said.append,
        )
        assert crew.run() == 0
    assert said == ["The api-1 process ended with 143; it is started again in 1 s."]
    assert len(forks) == 3


@pytest.mark.usefixtures("own_signals")
def test_a_stop_during_a_birth_ends_what_is_born_and_starts_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forks = list[int]()
    fork = os.fork

    def asked_meanwhile() -> int:
        signal.raise_signal(signal.SIGTERM)
        forks.append(pid := fork())
        return pid

    monkeypatch.setattr(os, "fork", asked_meanwhile)
    with socket.socket() as calls, socket.socket() as listener:
        crew = Crew(
            [Post("api-1", lives_long, listener)],
            engine=Post("engine", lives_long, calls),
            heartbeat_s_max=30,
            say=pytest.fail,
        )
        assert crew.run() == 0
    assert len(forks) == 1


ORPHANS = """
import ctypes, os, signal, socket
from trivec.server.crew import Crew, Post
assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER: orphans become ours
parent, (seen, told) = os.getpid(), os.pipe()

def leaves_an_orphan(heart):
    heart.beat(ready=True)
    middle = os.fork()
    if middle == 0:
        orphan = os.fork()
        if orphan == 0:
            while os.getppid() != parent:
                os.sched_yield()
            os.write(told, b"%d" % os.getpid())
            os._exit(7)
        os._exit(0)
    os.waitpid(middle, 0)
    orphan = int(os.read(seen, 100))
    while os.path.exists(f"/proc/{orphan}"):  # a zombie has an entry, too
        os.sched_yield()
    os.kill(parent, signal.SIGTERM)
    return 0

with socket.socket() as listener:
    crew = Crew([Post("server", leaves_an_orphan, listener)], heartbeat_s_max=3600, say=print)
    os._exit(crew.run())
"""


def test_a_parent_that_is_pid_1_reaps_orphans_and_keeps_its_own_childrens_codes() -> None:
    ended = subprocess.run([sys.executable, "-c", ORPHANS], timeout=60, check=False)
    assert ended.returncode == 0
