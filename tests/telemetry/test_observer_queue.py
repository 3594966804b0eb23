"""The queue before the observers: off the event loop, in order, and nothing lost."""

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.telemetry.events import batch, request

from trivec.core.events import Event, PhaseChanged
from trivec.telemetry import Metrics, ObserverQueue
from trivec.telemetry import __name__ as module

WAIT_S = 60.0  # then something hangs


class Held:
    """An observer that keeps events and the names of the threads that told it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.threads: set[str] = set()
        self.heard = threading.Event()

    def observe(self, event: Event) -> None:
        self.events.append(event)
        self.threads.add(threading.current_thread().name)
        self.heard.set()


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def queue(held: Held) -> Iterator[ObserverQueue]:
    with closing(ObserverQueue(held)) as queue:
        yield queue


def test_a_request_is_passed_on_by_another_thread(queue: ObserverQueue, held: Held) -> None:
    queue.observe(request())
    assert held.heard.wait(WAIT_S)
    assert held.threads == {"trivec-observer"}


def test_other_events_are_passed_on_at_once_after_those_before_them(
    queue: ObserverQueue, held: Held
) -> None:
    told: list[Event] = [request(), batch(), PhaseChanged("ready", "ok")]
    for event in told:
        queue.observe(event)
    assert held.events == told


def test_what_waits_is_passed_on_when_asked_for_and_at_the_end(held: Held) -> None:
    queue = ObserverQueue(held)
    queue.observe(request())
    queue.flush()
    assert len(held.events) == 1
    queue.observe(request())
    queue.close()
    assert len(held.events) == 2
    queue.observe(request())  # one that is answered when all else has ended
    assert len(held.events) == 3


def test_what_waits_is_bounded_and_none_is_lost(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{module}.WAITING_MAX", 8)
    monkeypatch.setattr(f"{module}.GATHER_S", WAIT_S)  # the thread passes nothing on by itself
    queue = ObserverQueue(held)
    for _ in range(20):
        queue.observe(request())
    assert len(held.events) == 18
    queue.close()
    assert len(held.events) == 20


def test_a_page_counts_requests_that_were_on_their_way() -> None:
    metrics = Metrics()
    with closing(ObserverQueue(metrics)) as queue:
        metrics.catch_up = queue.flush
        queue.observe(request())
        line = 'trivec_requests_total{method="POST",route="/embeddings",status="2xx"} 1.0'
        assert line in metrics.page().decode().splitlines()
