"""OpenTelemetry spans of each request, made afterwards from its measured durations.

Needs the extra `tracing`. No other package knows of traces, so the stages' places in time are
derived: they lie end to end before the answer, and what is left at the front is `accept` (headers,
body, key, rate limits, validation).
"""

import time
from typing import TYPE_CHECKING

from trivec.core.errors import SettingInvalid
from trivec.core.events import Event, RequestServed

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanProcessor

NANOSECONDS = 1_000_000_000


class Tracing:
    """An `Observer` that hands spans to an OpenTelemetry *processor*. Called from any thread."""

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider

        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "trivec"}), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("trivec")

    @classmethod
    def to(cls, endpoint: str) -> "Tracing":
        """Spans sent in the background to *endpoint*, OTLP over HTTP. Raises `SettingInvalid`."""
        if not endpoint.startswith(("http://", "https://")):
            raise SettingInvalid(
                f"telemetry.trace_endpoint is {endpoint}, and no address such as "
                "http://127.0.0.1:4318/v1/traces"
            )
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
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        if not isinstance(event, RequestServed):
            return
        end_ns = int((event.ended_s or time.time()) * NANOSECONDS)
        start_ns = end_ns - int(event.duration_s * NANOSECONDS)
        attributes: dict[str, str | int | None] = {
            "http.request.method": event.method,
            "http.route": event.route,
            "http.response.status_code": event.status,
            "error.type": event.code,
            "trivec.request_id": event.request_id,
            "trivec.model": event.model,
            "trivec.inputs": event.input_count,
            "trivec.tokens": event.token_count,
        }
        carrier = {"traceparent": event.traceparent} if event.traceparent else {}
        span = self._tracer.start_span(
            f"{event.method} {event.route}",
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            start_time=start_ns,
            attributes={name: value for name, value in attributes.items() if value is not None},
        )
        stages_s = {
            "tokenise": event.tokenize_s,
            "queue": event.queue_s,
            "compute": event.compute_s,
            "encode": event.encode_s,
        }
        accept_s = max(0.0, event.duration_s - sum(stages_s.values()))
        for name, duration_s in {"accept": accept_s, **stages_s}.items():
            if duration_s > 0:  # else the request never reached that stage
                child = self._tracer.start_span(
                    name, context=set_span_in_context(span), start_time=start_ns
                )
                start_ns = min(end_ns, start_ns + int(duration_s * NANOSECONDS))
                child.end(start_ns)
        if event.status >= 500:
            span.set_status(Status(StatusCode.ERROR, event.code))
        span.end(end_ns)

    def close(self) -> None:
        """Send what waits, and stop. Bounded by the exporter's own timeout."""
        self._provider.shutdown()
