"""Telemetry: metrics, the log and traces, each an `Observer` of the events of `core.events`.

No event holds text, vectors or keys, so neither a metric, a line nor a span can.
"""

import structlog

from trivec.core.events import Event
from trivec.core.ports import Observer
from trivec.telemetry.logging import RequestLog, configure_log, finish_log, lines_dropped
from trivec.telemetry.metrics import Metrics, merged_pages
from trivec.telemetry.tracing import Tracing

__all__ = [
    "Metrics",
    "Observers",
    "RequestLog",
    "Tracing",
    "configure_log",
    "finish_log",
    "lines_dropped",
    "merged_pages",
]


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
