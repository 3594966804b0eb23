"""What every observer owes: hear any event, on any thread, and never raise, block or answer."""

import io
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import structlog
from tests.telemetry.events import batch, loaded, request

from trivec.core.events import (
    Event,
    PhaseChanged,
    RequestServed,
    RowNotFinite,
)
from trivec.core.ports import Observer
from trivec.telemetry import (
    Metrics,
    ObserverQueue,
    Observers,
    RequestLog,
    Tracing,
    configure_log,
    finish_log,
)

EVENTS: tuple[Event, ...] = (
    request(),
    request(status=500, code="internal_error", model=None, key_id=None),
    request(route="nowhere", method="BREW", status=999, traceparent="not a trace"),
    batch(),
    batch(failed=True, tokens=9000),
    RowNotFinite("m", recovered=False),
    loaded(),
    loaded(),
    PhaseChanged("stopped", "signal"),
    PhaseChanged("unheard of", ""),
)


class Heard:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def observe(self, event: Event) -> None:
        self.events.append(event)


class Broken:
    def observe(self, event: Event) -> None:
        raise RuntimeError("this observer is broken")


def tracing() -> Observer:
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra `tracing`")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    return Tracing(SimpleSpanProcessor(InMemorySpanExporter()))


@pytest.fixture(autouse=True)
def log_output(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What stands in the log once it is finished."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    configure_log("json")
    yield out
    finish_log()
    structlog.reset_defaults()


OBSERVERS: list[object] = [
    pytest.param(Metrics, id="metrics"),
    pytest.param(RequestLog, id="the-request-log"),
    pytest.param(lambda: Observers(Metrics(), RequestLog()), id="several-at-once"),
    pytest.param(lambda: Observers(Broken()), id="several-with-a-broken-one"),
    pytest.param(lambda: ObserverQueue(Observers(Metrics(), RequestLog())), id="a-queue-of-them"),
    pytest.param(Observers, id="none-at-all"),
    pytest.param(tracing, id="tracing"),
]


@pytest.mark.parametrize("make", OBSERVERS)
@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_any_event_is_heard_without_an_answer_or_an_error(
    make: Callable[[], Observer], event: Event
) -> None:
    observer = make()
    answer: object = observer.observe(event)  # type: ignore[func-returns-value]
    assert answer is None


@pytest.mark.parametrize("make", OBSERVERS)
def test_many_threads_may_speak_at_once(make: Callable[[], Observer]) -> None:
    observer = make()
    failures: list[BaseException] = []

    def speak() -> None:
        try:
            for event in EVENTS * 20:
                observer.observe(event)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=speak) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_no_event_of_many_threads_is_lost_or_counted_twice() -> None:
    metrics = Metrics()

    def speak() -> None:
        for _ in range(500):
            metrics.observe(request())

    threads = [threading.Thread(target=speak) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    line = 'trivec_requests_total{method="POST",route="/embeddings",status="2xx"} 4000.0'
    assert line in metrics.page().decode().splitlines()


def test_a_broken_observer_spoils_nothing_and_is_reported_once(log_output: io.StringIO) -> None:
    before, after = Heard(), Heard()
    observers = Observers(before, Broken(), after)
    for event in EVENTS:
        observers.observe(event)
    finish_log()
    assert before.events == after.events == list(EVENTS)
    assert log_output.getvalue().count("observer_failed") == 1
    assert "this observer is broken" in log_output.getvalue()


def test_a_request_never_carries_text_vectors_or_a_key() -> None:
    """The event has no field that could: so neither line, page nor span can leak one.

    `message` is the catalogue's of a refusal: it repeats at most a field's or a model's name or value,
    and only a terminal shows it.
    """
    assert set(RequestServed.__slots__) == {
        "client_request_id", "code", "compute_s", "duration_s", "encode_s", "ended_s", "input_count",
        "key_id", "message", "method", "model", "prefix", "queue_s", "request_bytes", "request_id",
        "response_bytes", "route", "status", "token_count", "tokenize_s", "traceparent",
    }  # fmt: skip
