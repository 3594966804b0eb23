"""The page: what each event adds to it, and that nobody can make it grow."""

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.telemetry.events import batch, loaded, request

from trivec.core.events import Event, PhaseChanged, QueueChanged, RowNotFinite
from trivec.telemetry import Metrics
from trivec.telemetry.metrics import route_and_method, status_class
from trivec.telemetry.table import PROCESS_SERIES_MAX, SERIES_MAX, TABLE

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


def series(metrics: Metrics) -> dict[str, float]:
    """The page as `name{label="value",...}` to number, labels in alphabetical order."""
    lines = (line.rsplit(" ", 1) for line in metrics.page().decode().splitlines())
    return {name: float(value) for name, value in lines if not name.startswith("#")}


def after(*events: Event) -> dict[str, float]:
    metrics = Metrics()
    for event in (loaded(), *events):
        metrics.observe(event)
    return series(metrics)


M = 'model="baai/bge-m3"'


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        pytest.param(
            request(),
            {
                'trivec_requests_total{method="POST",route="/embeddings",status="2xx"}': 1,
                f"trivec_inputs_total{{{M}}}": 3,
                f"trivec_request_tokens_sum{{{M}}}": 40,
                f"trivec_queue_seconds_sum{{{M}}}": 0.004,
                f"trivec_compute_seconds_sum{{{M}}}": 0.030,
                "trivec_tokenize_seconds_sum": 0.001,
                "trivec_encode_seconds_sum": 0.002,
                'trivec_request_duration_seconds_sum{route="/embeddings",status="2xx"}': 0.050,
            },
            id="a-served-request-counts-its-texts-tokens-and-stages",
        ),
        pytest.param(
            request(status=503, code="overloaded", token_count=0),
            {
                'trivec_requests_total{method="POST",route="/embeddings",status="5xx"}': 1,
                'trivec_refusals_total{reason="overloaded"}': 1,
                'trivec_request_duration_seconds_count{route="/embeddings",status="5xx"}': 1,
            },
            id="a-refusal-counts-its-reason",
        ),
        pytest.param(
            batch(),
            {
                f'trivec_batches_total{{{M},outcome="ok"}}': 1,
                f"trivec_batch_fill_ratio_sum{{{M}}}": 0.5,
                f"trivec_batch_tokens_total{{{M}}}": 256,
                f"trivec_batch_busy_seconds_total{{{M}}}": 0.25,
            },
            id="a-batch-counts-its-fill-and-its-time",
        ),
        pytest.param(
            batch(failed=True),
            {f'trivec_batches_total{{{M},outcome="failed"}}': 1},
            id="a-failed-batch-is-told-from-a-good-one",
        ),
        pytest.param(
            QueueChanged("baai/bge-m3", requests=7, tokens=900),
            {f"trivec_queue_requests{{{M}}}": 7, f"trivec_queue_tokens{{{M}}}": 900},
            id="the-line-has-its-depth",
        ),
        pytest.param(
            RowNotFinite("baai/bge-m3", recovered=False),
            {f'trivec_rows_not_finite_total{{{M},outcome="lost"}}': 1},
            id="a-row-that-stayed-not-finite-is-lost",
        ),
        pytest.param(
            PhaseChanged("draining", "SIGTERM"),
            {'trivec_phase{phase="draining"}': 1, 'trivec_phase{phase="ready"}': 0},
            id="one-phase-at-a-time",
        ),
        pytest.param(
            loaded("second"),
            {
                'trivec_model_info{model="second",precision="int8",verified="true"}': 1,
                'trivec_certificate_cosine{model="second",statistic="min"}': 0.9931,
                'trivec_certificate_cosine{model="second",statistic="mean"}': 0.9987,
            },
            id="a-loaded-model-shows-its-certificate",
        ),
    ],
)
def test_each_event_is_counted_where_its_name_says(
    event: Event, expected: dict[str, float]
) -> None:
    page = after(event)
    assert {name: page.get(name) for name in expected} == expected


def test_an_event_is_counted_once() -> None:
    requests = [value for name, value in after(request()).items() if "requests_total" in name]
    assert requests == [1]


def test_a_refused_request_adds_nothing_to_the_models_numbers() -> None:
    page = after(request(status=400, code="context_length_exceeded"))
    assert [name for name in page if "trivec_request_tokens" in name or "inputs" in name] == []


def test_ten_thousand_of_everything_a_client_can_send_stay_within_the_series_bound() -> None:
    metrics = Metrics()
    for number in range(20):
        metrics.observe(loaded(f"served-{number}"))
    for i in range(10_000):
        model = f"served-{i % 20}" if i % 2 else f"junk-{i}"
        for status in (200, 404, 500, 100 + i % 900):
            metrics.observe(
                request(
                    request_id=f"req_{i}",
                    client_request_id=f"client_{i}",
                    key_id=f"key_{i}",
                    model=model,
                    route=("/v1/embeddings", "/v1/tokenize", f"/v1/{i}")[i % 3],
                    method=("POST", "GET", f"VERB{i}")[i % 3],
                    status=status,
                    code=f"code_{i}" if status != 200 else None,
                )
            )
        metrics.observe(batch(model=model, failed=i % 3 == 0))
        metrics.observe(QueueChanged(model, i, i))
        metrics.observe(RowNotFinite(model, recovered=i % 3 == 0))
        metrics.observe(PhaseChanged(("ready", f"phase {i}")[i % 2], f"reason {i}"))
    page = metrics.page().decode()
    assert len(series(metrics)) <= SERIES_MAX
    assert re.findall(r"junk|code_\d|VERB|key_|req_\d|client_", page) == []


def test_the_table_itself_cannot_exceed_the_series_bound() -> None:
    assert sum(metric.series_max for metric in TABLE) + PROCESS_SERIES_MAX <= SERIES_MAX


def test_the_page_exposes_the_names_of_the_table_and_the_process_only() -> None:
    page = Metrics().page().decode()
    families = {family.name for family in text_string_to_metric_families(page)}
    ours = {name for name in families if not name.startswith("process_")}
    assert ours == {metric.name.removesuffix("_total") for metric in TABLE}
    assert sum(name.startswith("process_") for name in series(Metrics())) <= PROCESS_SERIES_MAX


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1", "/v3/openai"])
def test_the_three_prefixes_are_one_route(prefix: str) -> None:
    assert route_and_method(f"{prefix}/embeddings", "POST") == ("/embeddings", "POST")


@pytest.mark.parametrize(
    ("route", "method"),
    [
        pytest.param("/v1/embeddings", "DELETE", id="a-wrong-method"),
        pytest.param("other", "GET", id="an-unknown-path"),
        pytest.param("/v1/v1/embeddings", "POST", id="a-prefix-twice"),
    ],
)
def test_what_is_not_served_shares_one_label(route: str, method: str) -> None:
    assert route_and_method(route, method) == ("other", "other")


def test_a_parameter_is_the_same_whatever_the_route_calls_it() -> None:
    assert route_and_method("/v1/models/{model:path}", "GET") == ("/models/{id}", "GET")


@pytest.mark.parametrize(
    ("status", "name"), [(204, "2xx"), (429, "4xx"), (503, "5xx"), (42, "other")]
)
def test_a_status_is_its_class(status: int, name: str) -> None:
    assert status_class(status) == name


def test_the_documentation_describes_every_metric_and_no_other() -> None:
    rows = re.findall(
        r"^\| `(trivec_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", DOCS.read_text(), re.M
    )
    documented = {
        name: (kind, tuple(re.findall(r"`(\w+)`", labels)), help_text.strip())
        for name, kind, labels, help_text in rows
    }
    assert documented == {
        metric.name: (metric.kind.value, metric.labels, metric.help) for metric in TABLE
    }


@pytest.fixture
def threads_in_a_hurry() -> Iterator[ThreadPoolExecutor]:
    """Eight, each of which loses the interpreter after every few steps."""
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with ThreadPoolExecutor(8) as threads:
        yield threads
    sys.setswitchinterval(usual_s)


def test_many_threads_are_counted_to_the_last_event_while_the_page_is_read(
    threads_in_a_hurry: ThreadPoolExecutor,
) -> None:
    metrics = Metrics()
    metrics.observe(loaded())

    def tell() -> None:
        for _ in range(20_000):
            metrics.observe(batch())

    telling = [threads_in_a_hurry.submit(tell) for _ in range(8)]
    while wait(telling, timeout=0).not_done:
        metrics.page()

    assert [one.result() for one in telling] == [None] * 8
    assert series(metrics)[f'trivec_batches_total{{{M},outcome="ok"}}'] == 160_000
    assert series(metrics)[f"trivec_batch_tokens_total{{{M}}}"] == 160_000 * 256
