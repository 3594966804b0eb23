"""The parent of several processes where a signal comes at the worst moment."""

import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from trivec.server.processes import IGNORED, STOPS, ChildProcess, Processes

SIGNALS = (*STOPS, *IGNORED, signal.SIGHUP)


@pytest.fixture
def own_signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def ends_at_once() -> int:
    return 0


def lives_long() -> int:
    signal.pause()
    return 0


def processes(listener: socket.socket, api: Callable[[], int], said: list[str]) -> Processes:
    return Processes(
        [ChildProcess("api-1", api, listener)],
        ChildProcess("engine", lives_long, None),
        say=said.append,
    )


@pytest.mark.usefixtures("own_signals")
def test_a_stop_that_reaches_a_process_at_its_start_ends_that_one_and_nobody_else(
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
    with socket.socket() as listener:
        assert processes(listener, ends_at_once, said).run() == 0
    assert said == ["The api-1 process ended with 143; it is started again."]
    assert len(forks) == 3


@pytest.mark.usefixtures("own_signals")
def test_a_stop_during_a_start_ends_what_was_started_and_starts_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forks, said = list[int](), list[str]()
    fork = os.fork

    def asked_meanwhile() -> int:
        signal.raise_signal(signal.SIGTERM)
        forks.append(pid := fork())
        return pid

    monkeypatch.setattr(os, "fork", asked_meanwhile)
    with socket.socket() as listener:
        assert processes(listener, lives_long, said).run() == 0
    assert len(forks) == 1
    assert said == []
