"""The parent of several processes where a signal comes at the worst moment."""

import os
import signal
import socket
from collections.abc import Iterator

import pytest

from trivec.server.crew import STOPS, Crew, Post
from trivec.server.supervisor import Heart


@pytest.fixture
def own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPS}
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
