"""Spans: built from durations, whole without a gap, under the client's own trace."""

import sys
from typing import TYPE_CHECKING

import pytest
from tests.telemetry.events import batch, request

from trivec.core.errors import SettingInvalid
from trivec.core.events import RequestServed
from trivec.telemetry import Tracing

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan


def spans(event: RequestServed) -> dict[str, "ReadableSpan"]:
    """Of one request, by name, in the order in which they ended: the whole request last."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra `tracing`")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    tracing.observe(event)
    tracing.observe(batch())
    found = exporter.get_finished_spans()
    tracing.close()
    return {span.name: span for span in found}


def test_the_stages_fill_the_request_from_accept_to_answer() -> None:
    *parts, whole = spans(request()).values()
    assert [part.name for part in parts] == ["accept", "tokenise", "queue", "compute", "encode"]
    assert [part.start_time for part in parts[1:]] == [part.end_time for part in parts[:-1]]
    assert parts[0].start_time == whole.start_time == whole.end_time - 50_000_000
    assert parts[0].end_time - parts[0].start_time == pytest.approx(13_000_000, abs=10)
    assert parts[-1].end_time == pytest.approx(whole.end_time, abs=10)


def test_a_request_that_is_refused_early_has_only_accept() -> None:
    refused = request(status=401, tokenize_s=0.0, queue_s=0.0, compute_s=0.0, encode_s=0.0)
    assert list(spans(refused)) == ["accept", "POST /v1/embeddings"]


def test_stages_never_outlast_their_request() -> None:
    *parts, whole = spans(request(duration_s=0.010, compute_s=0.5)).values()
    assert all(part.end_time <= whole.end_time for part in parts)


def test_without_the_package_the_setting_is_refused_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(SettingInvalid, match=r"pip install 'trivec\[tracing\]'"):
        Tracing.to("http://127.0.0.1:4318/v1/traces")


def test_what_is_no_address_is_refused_and_does_not_lose_spans_in_silence() -> None:
    with pytest.raises(SettingInvalid, match="trace_endpoint is collector:4318, and no address"):
        Tracing.to("collector:4318")


def test_a_request_is_one_trace_under_the_clients_own() -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    *parts, whole = spans(request(traceparent=parent, status=503, code="overloaded")).values()
    assert whole.name == "POST /v1/embeddings"
    assert {part.parent.span_id for part in parts} == {whole.context.span_id}
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    assert whole.attributes["http.response.status_code"] == 503
    assert not whole.status.is_ok
