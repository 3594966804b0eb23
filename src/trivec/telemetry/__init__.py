"""Telemetry: metrics, the log and traces, each an `Observer` of the events of `core.events`.

No event holds text, vectors or keys, so neither a metric, a line nor a span can.
"""

from collections import deque
from threading import Event as Flag
from threading import RLock, Thread

import structlog

from trivec.core.events import BatchRan, Event, RequestServed
from trivec.core.ports import Observer
from trivec.telemetry.logging import RequestLog, configure_log, finish_log, lines_dropped
from trivec.telemetry.metrics import Metrics, merged_pages
from trivec.telemetry.tracing import Tracing

__all__ = [
    "Metrics",
    "ObserverQueue",
    "Observers",
    "RequestLog",
    "Tracing",
    "configure_log",
    "finish_log",
    "lines_dropped",
    "merged_pages",
]

GATHER_S = 0.02  # an event waits this long for others: many events, one wake-up
WAITING_MAX = 4096  # events; who tells of more does the work


class Observers:
    """An `Observer` that passes each event to several, in order. Called from any thread.

    One that fails keeps nothing from the rest, and its first failure alone is logged: a line from
    inside every request would flood the log.
    """

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self._failed: set[int] = set()  # indices; a race costs at most a second line

    def observe(self, event: Event) -> None:
        for index, observer in enumerate(self._observers):
            try:
                observer.observe(event)
            except Exception:
                if index not in self._failed:
                    self._failed.add(index)
                    structlog.get_logger("trivec.telemetry").exception(
                        "observer_failed", observer=type(observer).__name__
                    )


class ObserverQueue:
    """An `Observer` that passes requests and batches on in a thread of its own, all others at once.

    Counting a request and writing its line are a sixth of what a short one costs, and no client
    waits for them. Events stay in order and none is lost: `flush` before reading what came of them.
    """

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._waiting = deque[Event]()
        self._passing_on = RLock()  # held by whoever passes events on
        self._wake, self._is_closing = Flag(), Flag()
        self._thread = Thread(target=self._run, name="trivec-observer", daemon=True)
        self._thread.start()

    def observe(self, event: Event) -> None:
        self._waiting.append(event)
        is_frequent = isinstance(event, (RequestServed, BatchRan))
        if not is_frequent or self._is_closing.is_set() or len(self._waiting) > WAITING_MAX:
            self.flush()
        elif not self._wake.is_set():
            self._wake.set()

    def flush(self) -> None:
        """Pass on all that waits. Called from any thread."""
        with self._passing_on:
            while self._waiting:
                self._observer.observe(self._waiting.popleft())

    def close(self) -> None:
        """Pass on all that waits, and end the thread; later events are passed on at once."""
        self._is_closing.set()
        self._wake.set()
        self._thread.join()
        self.flush()

    def _run(self) -> None:
        while not self._is_closing.is_set():
            self._wake.wait()
            self._is_closing.wait(GATHER_S)
            self._wake.clear()
            self.flush()
