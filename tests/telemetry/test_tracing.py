"""Spans: built from durations, whole without a gap, under the client's own trace."""

import sys

import pytest
from tests.telemetry.events import batch, request

from trivec.core.errors import SettingInvalid
from trivec.telemetry import Tracing
from trivec.telemetry.tracing import stages

NOW_NS = 1_700_000_000_000_000_000


def test_the_stages_fill_the_request_from_accept_to_answer() -> None:
    parts = list(stages(request(), end_ns=NOW_NS))
    assert [part.name for part in parts] == ["accept", "tokenise", "queue", "compute", "encode"]
    assert [part.start_ns for part in parts[1:]] == [part.end_ns for part in parts[:-1]]
    assert parts[0].start_ns == NOW_NS - 50_000_000
    assert parts[0].end_ns - parts[0].start_ns == pytest.approx(13_000_000, abs=10)
    assert parts[-1].end_ns == pytest.approx(NOW_NS, abs=10)


def test_a_request_refused_at_the_door_has_only_accept() -> None:
    refused = request(status=401, tokenize_s=0.0, queue_s=0.0, compute_s=0.0, encode_s=0.0)
    assert [part.name for part in stages(refused, end_ns=NOW_NS)] == ["accept"]


def test_stages_never_outlast_their_request() -> None:
    odd = request(duration_s=0.010, compute_s=0.5)
    assert all(part.end_ns <= NOW_NS for part in stages(odd, end_ns=NOW_NS))


def test_without_the_package_the_setting_is_refused_with_the_line_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(SettingInvalid, match=r"pip install 'trivec\[tracing\]'"):
        Tracing.to("http://127.0.0.1:4318/v1/traces")


def test_a_request_is_one_trace_under_the_clients_own() -> None:
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra `tracing`")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(exporter))
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    tracing.observe(request(traceparent=parent, status=503, code="overloaded"))
    tracing.observe(batch())
    spans = {span.name: span for span in exporter.get_finished_spans()}
    tracing.close()

    whole = spans.pop("POST /v1/embeddings")
    assert set(spans) == {"accept", "tokenise", "queue", "compute", "encode"}
    assert {span.parent.span_id for span in spans.values()} == {whole.context.span_id}
    assert f"{whole.context.trace_id:032x}" == "0af7651916cd43dd8448eb211c80319c"
    assert f"{whole.parent.span_id:016x}" == "b7ad6b7169203331"
    assert whole.attributes["http.response.status_code"] == 503
    assert not whole.status.is_ok
