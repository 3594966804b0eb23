"""OpenTelemetry spans of each request, built afterwards from its measured durations.

Optional: needs the extra `tracing`. No other room knows of traces, so the place of a span in time is
derived: the stages lie end to end before the answer, and what is left at the front is `accept`
(headers, body, key, rate limits, validation).
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trivec.core.errors import SettingInvalid
from trivec.core.events import Event, RequestServed

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanProcessor

NANOSECONDS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Stage:
    """One child span: `[start_ns, end_ns)` since the epoch."""

    name: str
    start_ns: int
    end_ns: int


def stages(event: RequestServed, *, end_ns: int) -> Iterator[Stage]:
    """The stages of a request that was answered at *end_ns*, in order, without a gap.

    A request that never reached a stage has none of it.
    """
    measured = {
        "tokenise": event.tokenize_s,
        "queue": event.queue_s,
        "compute": event.compute_s,
        "encode": event.encode_s,
    }
    accept_s = max(0.0, event.duration_s - sum(measured.values()))
    at_ns = end_ns - int(event.duration_s * NANOSECONDS)
    for name, duration_s in {"accept": accept_s, **measured}.items():
        if duration_s <= 0:
            continue
        until_ns = min(end_ns, at_ns + int(duration_s * NANOSECONDS))
        yield Stage(name, at_ns, until_ns)
        at_ns = until_ns


class Tracing:
    """An `Observer` that hands spans to an OpenTelemetry *processor*, which sends them.

    Called from any thread.
    """

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "trivec"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("trivec")
        self._propagator = TraceContextTextMapPropagator()
        self._server = SpanKind.SERVER

    @classmethod
    def to(cls, endpoint: str) -> "Tracing":
        """Spans sent in the background to *endpoint*, OTLP over HTTP. Raises `SettingInvalid`."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as absent:
            raise SettingInvalid(
                f"telemetry.trace_endpoint={endpoint} needs OpenTelemetry, which is not installed; "
                "run: pip install 'trivec[tracing]'"
            ) from absent
        return cls(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))

    def observe(self, event: Event) -> None:
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        if not isinstance(event, RequestServed):
            return
        end_ns = time.time_ns()
        attributes: dict[str, str | int] = {
            "http.request.method": event.method,
            "http.route": event.route,
            "http.response.status_code": event.status,
            "trivec.request_id": event.request_id,
            "trivec.inputs": event.input_count,
            "trivec.tokens": event.token_count,
        }
        if event.model is not None:
            attributes["trivec.model"] = event.model
        if event.code is not None:
            attributes["error.type"] = event.code
        carrier = {"traceparent": event.traceparent} if event.traceparent else {}
        span = self._tracer.start_span(
            f"{event.method} {event.route}",
            context=self._propagator.extract(carrier),
            kind=self._server,
            start_time=end_ns - int(event.duration_s * NANOSECONDS),
            attributes=attributes,
        )
        inside = set_span_in_context(span)
        for stage in stages(event, end_ns=end_ns):
            child = self._tracer.start_span(stage.name, context=inside, start_time=stage.start_ns)
            child.end(stage.end_ns)
        if event.status >= 500:
            span.set_status(Status(StatusCode.ERROR, event.code))
        span.end(end_ns)

    def close(self) -> None:
        """Send what waits, and stop. Bounded by the exporter's own timeout."""
        self._provider.shutdown()
