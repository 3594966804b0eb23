"""Prometheus metrics: counts of events, and the page that shows them.

Every label value comes from a closed or a capped set, so that no client can make the page grow
beyond `SERIES_MAX` series; a test adds them up. `docs/metrics.md` is the same list for people.
"""

import re
import threading
from collections import Counter as Sums
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import TypeVar

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from trivec import __version__
from trivec.core import events
from trivec.core.clock import SystemClock
from trivec.core.events import Event
from trivec.core.health import QueueLoad
from trivec.core.ports import Clock

SERIES_MAX = 2_200
# Values of a label with series of their own; those that come later share the label "other".
MODELS_MAX = 4
REASONS_MAX = 23  # error codes; the API has some 20, all its own words
ROUTES_MAX = 70  # each with its method
TIMED_ROUTES_MAX = 33  # POST, but for the admin API's
OTHER = "other"

STATUS_CLASSES = {2: "2xx", 4: "4xx", 5: "5xx"}
PHASES = ("loading", "ready", "draining", "stopped")
WINDOW_S = 30  # of tokens a second: longer than a batch on a slow machine
SHORT_BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1)

_PARAMETER = re.compile(r"\{[^/]*\}")
_M = TypeVar("_M", bound=MetricWrapperBase)


@cache
def route_label(route: str, prefix: str) -> str:
    """A route's template without its API's *prefix*, its parameters all called alike."""
    return _PARAMETER.sub("{id}", route.removeprefix(prefix))


class Metrics:
    """An `Observer` with a page. Called from any thread.

    *lines_dropped* is the number of log lines that were dropped so far.
    """

    def __init__(
        self, *, lines_dropped: Callable[[], int] = lambda: 0, clock: Clock | None = None
    ) -> None:
        # A `_created` series for each of ours would double the page.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._lines_dropped = lines_dropped
        self._clock = clock or SystemClock()
        self._queue_loads: Callable[[], Iterable[QueueLoad]] = tuple
        self.catch_up: Callable[[], object] = (
            tuple  # called before each page, for events on their way
        )
        self._lock = threading.Lock()  # of the growth of these
        self._tokens_by_second: dict[int, Sums[str]] = {}  # by model; those of the window
        self._models: set[str] = set()
        self._reasons: set[str] = set()
        self._routes: set[str] = set()
        self._timed_routes: set[str] = set()
        self._registry = registry = CollectorRegistry()

        def metric(
            kind: Callable[..., _M],
            name: str,
            says: str,
            *,
            labels: Sequence[str] = ("model",),
            **how: Sequence[float],
        ) -> Callable[..., _M]:
            """From label values to the series, remembered: the lookup costs most of counting."""
            return cache(kind(name, says, labels, registry=registry, **how).labels)

        # fmt: off
        self._requests = metric(Counter, "trivec_requests_total",
            "Requests answered, by route, method and status class.",
            labels=("route", "method", "status"))
        self._refusals = metric(Counter, "trivec_refusals_total",
            "Requests answered with an error, by its code, or by its type where it has no code.",
            labels=("reason",))
        self._request_seconds = metric(Histogram, "trivec_request_duration_seconds",
            "From the first byte of a request to its answer, for the routes that work.",
            labels=("route", "status"),
            buckets=(0.003, 0.006, 0.0125, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 600))
        self._request_tokens = metric(Histogram, "trivec_request_tokens",
            "Tokens of a request that was served, special tokens included.",
            buckets=(8, 32, 128, 512, 2048, 8192, 32768, 131072))
        self._inputs = metric(Counter, "trivec_inputs_total",
            "Texts of the requests that were served.")
        self._tokenize_seconds = Histogram("trivec_tokenize_seconds",
            "Time from text to token ids, a request.", registry=registry, buckets=SHORT_BUCKETS_S)
        self._queue_wait_seconds = metric(Histogram, "trivec_queue_wait_seconds",
            "From joining the queue to the start of a request's first batch.",
            buckets=(0.001, 0.005, 0.02, 0.1, 0.5, 1, 5, 10, 30))
        self._compute_seconds = metric(Histogram, "trivec_compute_seconds",
            "From the start of a request's first batch to its last vector.",
            buckets=(0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30, 120))
        self._encode_seconds = Histogram("trivec_encode_seconds",
            "Time to write the answer's JSON, a request.",
            registry=registry, buckets=SHORT_BUCKETS_S)
        self._batches = metric(Counter, "trivec_batches_total",
            "Batches run, by outcome: ok or failed.", labels=("model", "outcome"))
        self._batch_fill = metric(Histogram, "trivec_batch_fill_ratio",
            "Tokens of a batch over the budget it was filled against; one long text alone may "
            "exceed 1.", buckets=(0.1, 0.25, 0.5, 0.75, 0.9, 1))
        self._batch_tokens = metric(Counter, "trivec_batch_tokens_total",
            "Tokens computed, failed batches and second tries included.")
        self._batch_seconds = metric(Counter, "trivec_batch_busy_seconds_total",
            "Seconds that worker slots spent inside the device; its rate over the slots is "
            "utilisation.")
        self._rows_not_finite = metric(Counter, "trivec_rows_not_finite_total",
            "Vectors that held NaN or infinity, by outcome of the second try: recovered or lost.",
            labels=("model", "outcome"))
        self._job_lines = metric(Counter, "trivec_job_lines_total",
            "Lines of batch jobs answered here, by outcome: completed or failed.",
            labels=("model", "outcome"))
        self._job_tokens = metric(Counter, "trivec_job_tokens_total",
            "Tokens that lines of batch jobs were billed for.")
        self._job_lines_waiting = Gauge("trivec_job_lines_waiting",
            "Lines of batch jobs that no server of this store has answered yet.",
            registry=registry)
        self._phase = metric(Gauge, "trivec_phase",
            "1 for the phase of life the process is in, 0 for the others.", labels=("phase",))
        self._model_info = metric(Gauge, "trivec_model_info",
            "1 for each served model, with its precision and whether its files match the "
            "catalogue.", labels=("model", "precision", "verified"))
        self._certificate_cosine = metric(Gauge, "trivec_certificate_cosine",
            "Cosine to fp32 over the probe texts, as the precision certificate has it: min and "
            "mean.", labels=("model", "statistic"))
        build_info = metric(Gauge, "trivec_build_info", "1, with the version of Trivec.",
            labels=("version",))
        # fmt: on
        build_info(__version__).set(1)
        registry.register(self)
        ProcessCollector(registry=registry)  # memory, CPU, descriptors, start time

    def watch(self, queue_loads: Callable[[], Iterable[QueueLoad]]) -> None:
        """Show what *queue_loads* says at each scrape: events would be late, or missed when idle."""
        self._queue_loads = queue_loads

    def page(self) -> bytes:
        """The numbers now, in Prometheus's text format."""
        self.catch_up()
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """What is counted elsewhere. Called by the registry."""
        yield CounterMetricFamily(
            "trivec_log_lines_dropped_total",
            "Lines of the log that were dropped because nobody read them.",
            value=self._lines_dropped(),
        )
        queues: dict[str, list[QueueLoad]] = {}  # by label
        for load in self._queue_loads():
            queues.setdefault(self._model(load.model), []).append(load)
        requests = {model: sum(load.requests for load in own) for model, own in queues.items()}
        tokens = {model: sum(load.tokens for load in own) for model, own in queues.items()}
        seconds = {model: sum(load.seconds for load in own) for model, own in queues.items()}
        with self._lock:
            self._forget_old_tokens()
            computed = sum(self._tokens_by_second.values(), Sums[str]())
        for name, says, by_model in (
            ("trivec_queue_requests", "Requests in the queue now.", requests),
            ("trivec_queue_tokens", "Tokens in the queue now.", tokens),
            ("trivec_queue_seconds", "Tokens in the queue now, over the measured throughput of "
                "all worker slots.", seconds),
            ("trivec_tokens_per_second", f"Tokens computed a second, over the last {WINDOW_S} s.",
                {model: computed[model] / WINDOW_S for model in queues}),
            ("trivec_line_requests",  # old names, for one release
                "Deprecated: read trivec_queue_requests instead.", requests),
            ("trivec_line_tokens", "Deprecated: read trivec_queue_tokens instead.", tokens),
        ):  # fmt: skip
            gauge = GaugeMetricFamily(name, says, labels=("model",))
            for model, value in by_model.items():
                gauge.add_metric((model,), value)
            yield gauge  # without series in an API process

    def observe(self, event: Event) -> None:
        match event:
            case events.RequestServed():
                self._count_request(event)
            case events.BatchRan():
                model = self._model(event.model)
                self._batches(model, "failed" if event.failed else "ok").inc()
                self._batch_fill(model).observe(event.tokens / event.tokens_max)
                self._batch_tokens(model).inc(event.tokens)
                self._batch_seconds(model).inc(event.duration_s)
                with self._lock:
                    self._forget_old_tokens()
                    second = int(self._clock.now_s())
                    self._tokens_by_second.setdefault(second, Sums())[model] += event.tokens
            case events.RowNotFinite():
                outcome = "recovered" if event.recovered else "lost"
                self._rows_not_finite(self._model(event.model), outcome).inc()
            case events.ShardFinished():
                model = self._model(event.model)
                self._job_lines(model, "completed").inc(event.completed)
                self._job_lines(model, "failed").inc(event.failed)
                self._job_tokens(model).inc(event.token_count)
            case events.LinesWaiting(count=count):
                self._job_lines_waiting.set(count)
            case events.ModelLoaded(card=card):
                if self._admit(card.id, self._models, MODELS_MAX) == OTHER:
                    return
                verified = "true" if card.verified else "false"
                self._model_info(card.id, card.precision, verified).set(1)
                if certificate := event.certificate:
                    self._certificate_cosine(card.id, "min").set(certificate.cosine_min)
                    self._certificate_cosine(card.id, "mean").set(certificate.cosine_mean)
            case events.PhaseChanged():
                for phase in PHASES:
                    self._phase(phase).set(phase == event.phase)

    def _count_request(self, event: events.RequestServed) -> None:
        route, method = OTHER, OTHER
        if event.status != HTTPStatus.METHOD_NOT_ALLOWED and event.route != OTHER:
            served = "GET" if event.method == "HEAD" else event.method
            label = route_label(event.route, event.prefix)
            pair = self._admit(f"{served} {label}", self._routes, ROUTES_MAX)
            if pair != OTHER:
                method, route = pair.split()
        status = STATUS_CLASSES.get(event.status // 100, OTHER)
        self._requests(route, method, status).inc()
        if event.code is not None:
            self._refusals(self._admit(event.code, self._reasons, REASONS_MAX)).inc()
        if method == "POST" and not route.startswith("/admin/") and status != OTHER:
            timed = self._admit(route, self._timed_routes, TIMED_ROUTES_MAX)
            self._request_seconds(timed, status).observe(event.duration_s)
        if status != "2xx" or event.model is None or not event.token_count:
            return
        self._tokenize_seconds.observe(event.tokenize_s)
        if not event.compute_s:  # tokens were counted, nothing was embedded
            return
        model = self._model(event.model)
        self._request_tokens(model).observe(event.token_count)
        self._inputs(model).inc(event.input_count)
        self._queue_wait_seconds(model).observe(event.queue_s)
        self._compute_seconds(model).observe(event.compute_s)
        self._encode_seconds.observe(event.encode_s)

    def _forget_old_tokens(self) -> None:
        """Keep those of the last `WINDOW_S` whole seconds, this one included."""
        first = int(self._clock.now_s()) - WINDOW_S + 1
        for second in [second for second in self._tokens_by_second if second < first]:
            del self._tokens_by_second[second]

    def _model(self, model: str) -> str:
        return model if model in self._models else OTHER

    def _admit(self, value: str, known: set[str], known_max: int) -> str:
        """*value*, if it is among the first *known_max* of its label; else "other"."""
        if value not in known:
            with self._lock:
                if value not in known and len(known) >= known_max:
                    return OTHER
                known.add(value)
        return value


def merged_pages(pages: Mapping[str, bytes]) -> bytes:
    """*pages* by process as one; every series gets a label `process`.

    A process that is started again begins at zero under its own label, as Prometheus expects.
    """
    merged = _Families()
    for process, page in sorted(pages.items()):
        for family in text_string_to_metric_families(page.decode()):
            empty = Metric(family.name, family.documentation, family.type)
            merged.setdefault(family.name, empty).samples += [
                sample._replace(labels={**sample.labels, "process": process})
                for sample in family.samples
            ]
    return generate_latest(merged)


class _Families(dict[str, Metric]):
    """Families by name: what `generate_latest` reads where there is no registry."""

    def collect(self) -> Iterable[Metric]:
        return self.values()
