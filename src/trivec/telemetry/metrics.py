"""The Prometheus page: hears events, keeps the numbers of `table.py`, prints them.

It knows how an event becomes a number and nothing else; who asks for the page is the API's business.
"""

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeAlias

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric as Family

from trivec import __version__
from trivec.core.events import (
    BatchRan,
    Event,
    LineChanged,
    ModelLoaded,
    PhaseChanged,
    RequestServed,
    RowNotFinite,
    WorkerReplaced,
)
from trivec.telemetry import table
from trivec.telemetry.table import OTHER, Kind, Metric

Labels: TypeAlias = tuple[str, ...]

_CLASSES = {Kind.COUNTER: Counter, Kind.GAUGE: Gauge, Kind.HISTOGRAM: Histogram}
_PREFIX = re.compile(r"^/(?:openai/v1|v3/openai|v1)(?=/)")
_PARAMETER = re.compile(r"\{[^/]*\}")


@lru_cache(maxsize=1024)
def route_and_method(route: str, method: str) -> Labels:
    """The labels of a route's template: the three prefixes are one, the unknown is "other"."""
    name = _PARAMETER.sub("{id}", _PREFIX.sub("", route))
    return (name, method) if (method, name) in table.SERVED else (OTHER, OTHER)


def status_class(status: int) -> str:
    """`503` is `5xx`; what HTTP does not know is "other"."""
    name = f"{status // 100}xx"
    return name if name in table.STATUS_CLASSES else OTHER


class Metrics:
    """An `Observer` with a page. Called from any thread; an event costs a few microseconds.

    A model has series of its own once `ModelLoaded` named it, the first `MODELS_MAX` of them.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._metrics = {metric.name: self._register(metric) for metric in table.TABLE}
        self._children: dict[tuple[str, Labels], Any] = {}  # by metric name and label values
        self._models: set[str] = set()
        self._hear: dict[type[Event], Callable[[Any], None]] = {
            RequestServed: self._request,
            BatchRan: self._batch,
            LineChanged: self._line,
            WorkerReplaced: self._worker,
            RowNotFinite: self._row,
            ModelLoaded: self._model_loaded,
            PhaseChanged: self._phase,
        }
        ProcessCollector(registry=self._registry)
        self._child(table.BUILD_INFO, __version__).set(1)
        self._child(table.WORKERS_REPLACED)  # so that the page shows its zero

    def observe(self, event: Event) -> None:
        self._hear[type(event)](event)

    def page(self) -> bytes:
        """The numbers now, in Prometheus's text format."""
        return generate_latest(self)

    def collect(self) -> Iterable[Family]:
        """The families as they are printed: without `_created`, which nearly doubles the series."""
        for family in self._registry.collect():
            family.samples = [one for one in family.samples if not one.name.endswith("_created")]
            yield family

    def _register(self, metric: Metric) -> Any:
        name = metric.name.removesuffix("_total")  # the library appends it to counters
        extra = {"buckets": metric.bounds} if metric.kind is Kind.HISTOGRAM else {}
        return _CLASSES[metric.kind](
            name, metric.help, metric.labels, registry=self._registry, **extra
        )

    def _child(self, metric: Metric, *labels: str) -> Any:
        """The library's own look-up takes a lock and builds strings; this one is a dict's."""
        child = self._children.get((metric.name, labels))
        if child is None:
            parent = self._metrics[metric.name]
            child = parent.labels(*labels) if labels else parent
            self._children[metric.name, labels] = child
        return child

    def _model(self, model: str) -> str:
        return model if model in self._models else OTHER

    def _request(self, event: RequestServed) -> None:
        route, method = route_and_method(event.route, event.method)
        status = status_class(event.status)
        self._child(table.REQUESTS, route, method, status).inc()
        if event.code is not None:
            reason = event.code if event.code in table.REASONS else OTHER
            self._child(table.REFUSALS, reason).inc()
        if route in table.TIMED_ROUTES and status != OTHER:
            self._child(table.REQUEST_SECONDS, route, status).observe(event.duration_s)
        if status == "2xx" and event.model is not None and event.token_count:
            self._served(event, self._model(event.model))

    def _served(self, event: RequestServed, model: str) -> None:
        self._child(table.TOKENIZE_SECONDS).observe(event.tokenize_s)
        if not event.compute_s:  # tokens were counted, nothing was embedded
            return
        self._child(table.REQUEST_TOKENS, model).observe(event.token_count)
        self._child(table.INPUTS, model).inc(event.input_count)
        self._child(table.QUEUE_SECONDS, model).observe(event.queue_s)
        self._child(table.COMPUTE_SECONDS, model).observe(event.compute_s)
        self._child(table.ENCODE_SECONDS).observe(event.encode_s)

    def _batch(self, event: BatchRan) -> None:
        model = self._model(event.model)
        self._child(table.BATCHES, model, "failed" if event.failed else "ok").inc()
        self._child(table.BATCH_FILL, model).observe(event.tokens / event.tokens_max)
        self._child(table.BATCH_TOKENS, model).inc(event.tokens)
        self._child(table.BATCH_SECONDS, model).inc(event.duration_s)

    def _line(self, event: LineChanged) -> None:
        model = self._model(event.model)
        self._child(table.LINE_REQUESTS, model).set(event.requests)
        self._child(table.LINE_TOKENS, model).set(event.tokens)

    def _worker(self, event: WorkerReplaced) -> None:
        self._child(table.WORKERS_REPLACED).inc()

    def _row(self, event: RowNotFinite) -> None:
        outcome = "recovered" if event.recovered else "lost"
        self._child(table.ROWS_NOT_FINITE, self._model(event.model), outcome).inc()

    def _model_loaded(self, event: ModelLoaded) -> None:
        card = event.card
        if card.id in self._models or len(self._models) >= table.MODELS_MAX:
            return
        self._models.add(card.id)
        verified = "true" if card.verified else "false"
        self._child(table.MODEL_INFO, card.id, card.precision, verified).set(1)
        for statistic, cosine in (("min", event.cosine_min), ("mean", event.cosine_mean)):
            if cosine is not None:
                self._child(table.CERTIFICATE_COSINE, card.id, statistic).set(cosine)

    def _phase(self, event: PhaseChanged) -> None:
        for phase in table.PHASES:
            self._child(table.PHASE, phase).set(phase == event.phase)
