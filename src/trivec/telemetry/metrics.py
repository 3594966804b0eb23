"""The Prometheus page: hears events, keeps the numbers of `table.py`, prints them.

It knows how an event becomes a number and nothing else; who asks for the page is the API's business.
"""

import re
import threading
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import Metric as Family

from trivec import __version__
from trivec.core.events import (
    BatchRan,
    Event,
    ModelLoaded,
    PhaseChanged,
    QueueChanged,
    RequestServed,
    RowNotFinite,
)
from trivec.telemetry import table
from trivec.telemetry.table import OTHER
from trivec.telemetry.tally import Labels, Tally

_PREFIX = re.compile(r"^/(?:openai/v1|v3/openai|v1)(?=/)")
_PARAMETER = re.compile(r"\{[^/]*\}")


@lru_cache(maxsize=1024)
def route_and_method(route: str, method: str) -> Labels:
    """The labels of a route's template: the three prefixes are one, the unknown is "other"."""
    name = _PARAMETER.sub("{id}", _PREFIX.sub("", route))
    return (name, method) if (method, name) in table.SERVED else (OTHER, OTHER)


@lru_cache(maxsize=1024)
def status_class(status: int) -> str:
    """`503` is `5xx`; what HTTP does not know is "other"."""
    name = f"{status // 100}xx"
    return name if name in table.STATUS_CLASSES else OTHER


class Metrics:
    """An `Observer` with a page. Called from any thread; an event costs a few microseconds.

    A model has series of its own once `ModelLoaded` named it, the first `MODELS_MAX` of them.
    *lines_dropped* says how many lines of the log found no reader.
    """

    def __init__(self, *, lines_dropped: Callable[[], int] = lambda: 0) -> None:
        self._lines_dropped = lines_dropped
        self._lock = threading.Lock()  # guards the tally and the models
        self._tally = Tally()
        self._models: set[str] = set()
        self._hear: dict[type[Event], Callable[[Any], None]] = {
            RequestServed: self._request,
            BatchRan: self._batch,
            QueueChanged: self._line,
            RowNotFinite: self._row,
            ModelLoaded: self._model_loaded,
            PhaseChanged: self._phase,
        }
        self._process = ProcessCollector(registry=CollectorRegistry())
        self._tally.set(table.BUILD_INFO, __version__, to=1)

    def observe(self, event: Event) -> None:
        with self._lock:
            self._hear[type(event)](event)

    def page(self) -> bytes:
        """The numbers now, in Prometheus's text format."""
        return generate_latest(self)

    def collect(self) -> Iterable[Family]:
        """The families as they are printed: the library asks."""
        with self._lock:
            self._tally.set(table.LOG_LINES_DROPPED, to=self._lines_dropped())
            families = list(self._tally.families())
        yield from families
        yield from self._process.collect()

    def _model(self, model: str) -> str:
        return model if model in self._models else OTHER

    def _request(self, event: RequestServed) -> None:
        route, method = route_and_method(event.route, event.method)
        status = status_class(event.status)
        self._tally.count(table.REQUESTS, route, method, status)
        if event.code is not None:
            reason = event.code if event.code in table.REASONS else OTHER
            self._tally.count(table.REFUSALS, reason)
        if route in table.TIMED_ROUTES and status != OTHER:
            self._tally.add(table.REQUEST_SECONDS, event.duration_s, route, status)
        if status == "2xx" and event.model is not None and event.token_count:
            self._served(event, self._model(event.model))

    def _served(self, event: RequestServed, model: str) -> None:
        tally = self._tally
        tally.add(table.TOKENIZE_SECONDS, event.tokenize_s)
        if not event.compute_s:  # tokens were counted, nothing was embedded
            return
        tally.add(table.REQUEST_TOKENS, event.token_count, model)
        tally.count(table.INPUTS, model, by=event.input_count)
        tally.add(table.QUEUE_SECONDS, event.queue_s, model)
        tally.add(table.COMPUTE_SECONDS, event.compute_s, model)
        tally.add(table.ENCODE_SECONDS, event.encode_s)

    def _batch(self, event: BatchRan) -> None:
        tally, model = self._tally, self._model(event.model)
        tally.count(table.BATCHES, model, "failed" if event.failed else "ok")
        tally.add(table.BATCH_FILL, event.tokens / event.tokens_max, model)
        tally.count(table.BATCH_TOKENS, model, by=event.tokens)
        tally.count(table.BATCH_SECONDS, model, by=event.duration_s)

    def _line(self, event: QueueChanged) -> None:
        model = self._model(event.model)
        self._tally.set(table.QUEUE_REQUESTS, model, to=event.requests)
        self._tally.set(table.QUEUE_TOKENS, model, to=event.tokens)

    def _row(self, event: RowNotFinite) -> None:
        outcome = "recovered" if event.recovered else "lost"
        self._tally.count(table.ROWS_NOT_FINITE, self._model(event.model), outcome)

    def _model_loaded(self, event: ModelLoaded) -> None:
        card = event.card
        if card.id in self._models or len(self._models) >= table.MODELS_MAX:
            return
        self._models.add(card.id)
        verified = "true" if card.verified else "false"
        self._tally.set(table.MODEL_INFO, card.id, card.precision, verified, to=1)
        for statistic, cosine in (("min", event.cosine_min), ("mean", event.cosine_mean)):
            if cosine is not None:
                self._tally.set(table.CERTIFICATE_COSINE, card.id, statistic, to=cosine)

    def _phase(self, event: PhaseChanged) -> None:
        for phase in table.PHASES:
            self._tally.set(table.PHASE, phase, to=phase == event.phase)
