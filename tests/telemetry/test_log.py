"""The log: what a line holds, in which form, and what it never holds."""

import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace

import pytest
import structlog
from tests.telemetry.events import batch, loaded, request

from trivec.core.events import (
    Event,
    PhaseChanged,
    RowNotFinite,
)
from trivec.telemetry import RequestLog, configure_log, finish_log
from trivec.telemetry.logging import LogFormat


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def written(
    say: Callable[[], object],
    *,
    out: io.StringIO | None = None,
    form: LogFormat = "auto",
    level: str = "info",
    process: str | None = None,
) -> str:
    """What stands in the log, on *out*, after *say*."""
    out = out or io.StringIO()
    with redirect_stderr(out):
        configure_log(form, level=level, process=process)
        say()
        finish_log(60)
    return out.getvalue()


def observing(*events: Event) -> Callable[[], object]:
    def observe() -> None:
        log = RequestLog()
        for event in events:
            log.observe(event)

    return observe


def lines(
    *events: Event, level: str = "info", process: str | None = None
) -> list[dict[str, object]]:
    shown = written(observing(*events), level=level, process=process)
    return [json.loads(line) for line in shown.split("\n")[:-1]]


def test_a_request_is_one_line_of_ids_counts_and_durations() -> None:
    [line] = lines(request(client_request_id="mine-7"))
    assert line.pop("time")
    assert line == {
        "event": "request",
        "level": "info",
        "request_id": "req_01",
        "client_request_id": "mine-7",
        "method": "POST",
        "route": "/v1/embeddings",
        "status": 200,
        "key_id": "key_01",
        "model": "baai/bge-m3",
        "inputs": 3,
        "tokens": 40,
        "request_bytes": 120,
        "answer_bytes": 9000,
        "duration_ms": 50.0,
        "tokenize_ms": 1.0,
        "queue_ms": 4.0,
        "compute_ms": 30.0,
        "encode_ms": 2.0,
    }


def test_a_refused_request_says_why_and_leaves_out_what_never_was() -> None:
    [line] = lines(request(status=401, code="invalid_api_key", key_id=None, model=None))
    assert line["code"] == "invalid_api_key"
    assert line.keys().isdisjoint({"key_id", "model", "tokens", "client_request_id"})


@pytest.mark.parametrize("route", ["/livez", "/readyz", "/health", "/metrics"])
def test_a_probe_is_a_line_when_it_fails_or_when_everything_is_told(route: str) -> None:
    passed, failed = request(route=route), request(route=route, status=503)
    assert [line["status"] for line in lines(passed, failed)] == [503]
    assert [line["status"] for line in lines(passed, failed, level="debug")] == [200, 503]


def on_a_terminal(*events: Event) -> list[str]:
    shown = written(observing(*events), out=Terminal())
    assert shown.startswith("\r\x1b[K"), "a bar that stands in the line is erased"
    return [re.sub("\r|\x1b\\[[0-9]*[mK]", "", line) for line in shown.split("\n")[:-1]]


def test_on_a_terminal_a_request_is_one_short_line() -> None:
    [line] = on_a_terminal(request())
    assert re.fullmatch(
        r"\d\d:\d\d:\d\d 200      50.0 ms  POST \S+  \S+  \d+ inputs  40 tokens  req_01", line
    )


def test_a_refusal_shows_its_message_on_a_terminal_and_in_no_file() -> None:
    refused = request(
        status=404, code="model_not_found", model=None, message="no `a\n\x1b[2J` here"
    )
    [line] = on_a_terminal(refused)
    assert "no `a  [2J` here" in line
    [kept] = lines(refused)
    assert "message" not in kept


def test_a_line_cannot_be_broken_by_what_a_client_sends() -> None:
    [line] = lines(request(client_request_id='x\n{"event": "forged"}\u2028\x1b[31m'))
    assert line["event"] == "request"
    assert line["client_request_id"] == 'x\n{"event": "forged"}\u2028\x1b[31m'


@pytest.mark.parametrize(
    ("event", "name", "level"),
    [
        pytest.param(batch(failed=True), "batch_failed", "warning", id="a-failed-batch"),
        pytest.param(
            RowNotFinite("m", recovered=True), "row_not_finite", "warning", id="a-bad-row"
        ),
        pytest.param(PhaseChanged("ready", "warmed"), "phase", "info", id="a-new-phase"),
        pytest.param(loaded(), "model_loaded", "info", id="a-loaded-model"),
    ],
)
def test_what_an_operator_acts_on_has_a_line(event: Event, name: str, level: str) -> None:
    [line] = lines(event)
    assert (line["event"], line["level"]) == (name, level)


def test_a_loaded_models_line_shows_its_certificate() -> None:
    [line] = lines(loaded())
    assert (line["model"], line["precision"]) == ("baai/bge-m3", "int8")
    assert (line["cosine_min"], line["cosine_mean"]) == (0.9931, 0.9987)


def test_batches_and_queue_depths_are_metrics_and_no_lines() -> None:
    assert lines(batch()) == []


def test_other_libraries_speak_json_too() -> None:
    line = json.loads(written(lambda: logging.getLogger("granian").warning("worker %d is late", 3)))
    assert (line["event"], line["logger"], line["level"]) == (
        "worker 3 is late",
        "granian",
        "warning",
    )


def test_every_line_names_its_process_where_there_are_several() -> None:
    [line] = lines(request(), process="api-2")
    assert line["process"] == "api-2"


def test_an_exception_is_one_json_line() -> None:
    def fail() -> None:
        try:
            raise ValueError("first\nsecond")
        except ValueError:
            structlog.get_logger().exception("request_failed", request_id="req_9")

    line = json.loads(written(fail))
    assert line["request_id"] == "req_9"
    assert "ValueError: first" in line["exception"]


def test_a_terminal_gets_words_and_a_pipe_gets_json() -> None:
    [line] = on_a_terminal(request())
    assert "req_01" in line
    with pytest.raises(json.JSONDecodeError):
        json.loads(line)
    assert lines(request())[0]["request_id"] == "req_01"


def test_the_form_can_be_chosen() -> None:
    assert written(observing(request()), out=Terminal(), form="json").startswith("{")
    assert not written(observing(request()), form="text").startswith("{")


def test_lines_below_the_level_are_not_written() -> None:
    found = lines(request(), batch(failed=True), level="warning")
    assert [line["event"] for line in found] == ["batch_failed"]


def test_what_a_backend_notes_of_a_model_is_in_its_line_also_where_a_name_is_taken() -> None:
    event = loaded()
    card = replace(event.card, notes={"precision": "bf16: it is fast here", "attention": "grouped"})
    [line] = lines(replace(event, card=card))
    assert (line["precision"], line["attention"]) == ("bf16: it is fast here", "grouped")
