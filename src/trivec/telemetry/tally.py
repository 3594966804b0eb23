"""The numbers behind the metrics page: counters, gauges and histograms of `table.py`.

Written on every request and batch, so plain dicts and lists; the library's own counters, each with a
lock and a walk over its buckets, took three times as long. It does not know what an event is.
"""

from bisect import bisect_left
from collections.abc import Iterable
from math import inf
from typing import TypeAlias

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric as Family

from trivec.telemetry.table import TABLE, Kind, Metric

Labels: TypeAlias = tuple[str, ...]


class Histogram:
    """How many values fell under each bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # [bounds + 1]: not cumulative; the last is the rest
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound as Prometheus writes it, and how many values are at most that."""
        below = 0
        buckets = []
        for bound, count in zip((*self.bounds, inf), self.counts, strict=True):
            below += count
            buckets.append(("+Inf" if bound == inf else repr(float(bound)), float(below)))
        return buckets


class Tally:
    """All numbers, by metric and label values. One thread at a time: `Metrics` holds a lock."""

    def __init__(self) -> None:
        self._values: dict[str, dict[Labels, float]] = {}  # of counters and gauges
        self._histograms: dict[str, dict[Labels, Histogram]] = {}
        for metric in TABLE:
            if metric.kind is Kind.HISTOGRAM:
                self._histograms[metric.name] = {}
            else:
                self._values[metric.name] = {}
            if not metric.labels:  # so that the page shows its zero
                self._show_zero(metric)

    def _show_zero(self, metric: Metric) -> None:
        if metric.kind is Kind.HISTOGRAM:
            self._histograms[metric.name][()] = Histogram(metric.bounds)
        else:
            self._values[metric.name][()] = 0.0

    def count(self, metric: Metric, *labels: str, by: float = 1) -> None:
        values = self._values[metric.name]
        values[labels] = values.get(labels, 0.0) + by

    def set(self, metric: Metric, *labels: str, to: float) -> None:
        self._values[metric.name][labels] = to

    def add(self, metric: Metric, value: float, *labels: str) -> None:
        """Put *value* into a histogram."""
        histograms = self._histograms[metric.name]
        histogram = histograms.get(labels)
        if histogram is None:
            histogram = histograms[labels] = Histogram(metric.bounds)
        histogram.add(value)

    def families(self) -> Iterable[Family]:
        """The table in its order, as the library prints it."""
        for metric in TABLE:
            if metric.kind is Kind.HISTOGRAM:
                family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
                for labels, one in self._histograms[metric.name].items():
                    family.add_metric(labels, one.buckets(), one.total)
                yield family
                continue
            kind = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
            numbers = kind(metric.name, metric.help, labels=metric.labels)
            for labels, value in self._values[metric.name].items():
                numbers.add_metric(labels, value)
            yield numbers
