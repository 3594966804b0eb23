"""The page: what each event adds to it, and that nobody can make it grow."""

import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from tests.hand_clock import HandClock
from tests.telemetry.events import batch, every_kind, every_load, loaded, request

from trivec.core.events import Event, PhaseChanged, RowNotFinite
from trivec.core.health import QueueLoad
from trivec.telemetry import Metrics, merged_pages
from trivec.telemetry.metrics import REASONS_MAX, ROUTES_MAX, SERIES_MAX

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
                f"trivec_queue_wait_seconds_sum{{{M}}}": 0.004,
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


def test_the_queue_is_shown_as_it_is_at_each_scrape() -> None:
    metrics, waiting = Metrics(), [QueueLoad("baai/bge-m3", requests=7, tokens=900, seconds=1.5)]
    metrics.observe(loaded())
    metrics.watch(lambda: waiting)
    names = ("queue_requests", "queue_tokens", "queue_seconds", "line_requests", "line_tokens")

    def shown() -> list[float]:
        page = series(metrics)
        return [page[f"trivec_{name}{{{M}}}"] for name in names]

    assert shown() == [7, 900, 1.5, 7, 900]
    waiting[:] = [QueueLoad("baai/bge-m3", requests=0, tokens=0, seconds=0.0)]
    assert shown() == [0, 0, 0, 0, 0]


def test_models_that_share_a_label_are_added_up(metrics: Metrics) -> None:
    page = series(metrics)
    assert page['trivec_queue_seconds{model="served-0"}'] == 1.5
    assert page['trivec_queue_seconds{model="other"}'] == 3 * 1.5


def test_tokens_a_second_are_those_of_the_last_half_minute_and_zero_when_idle() -> None:
    clock = HandClock()
    metrics, name = Metrics(clock=clock), f"trivec_tokens_per_second{{{M}}}"
    metrics.observe(loaded())
    metrics.watch(lambda: [QueueLoad("baai/bge-m3", 0, 0, 0.0)])
    assert series(metrics)[name] == 0
    metrics.observe(batch(tokens=600))
    clock.move(20)
    metrics.observe(batch(tokens=300, failed=True))
    assert series(metrics)[name] == 900 / 30
    clock.move(20)
    assert series(metrics)[name] == 300 / 30
    clock.move(20)
    assert series(metrics)[name] == 0


def test_a_process_without_models_says_nothing_of_queues() -> None:
    assert "trivec_queue" not in " ".join(name for name in after() if "wait" not in name)


def test_in_all_is_the_sum_over_models_and_processes(metrics: Metrics) -> None:
    page = merged_pages({"api-1": Metrics().page(), "engine": metrics.page()}).decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    found = families["trivec_queue_seconds"].samples
    assert sum(sample.value for sample in found) == 1.5 * len(every_load())
    assert {sample.labels["process"] for sample in found} == {"engine"}


def test_an_event_is_counted_once() -> None:
    requests = [value for name, value in after(request()).items() if "requests_total" in name]
    assert requests == [1]


def test_a_refused_request_adds_nothing_to_the_models_numbers() -> None:
    page = after(request(status=400, code="context_length_exceeded"))
    assert [name for name in page if "trivec_request_tokens" in name or "inputs" in name] == []


def test_nothing_a_client_sends_makes_a_series(metrics: Metrics) -> None:
    before = len(series(metrics))
    for i in range(1_000):
        for status in (200, 404, 500, 100 + i % 900):
            metrics.observe(
                request(
                    request_id=f"req_{i}",
                    client_request_id=f"client_{i}",
                    key_id=f"key_{i}",
                    model=f"junk-{i}",
                    route=("/v1/embeddings", "/v1/tokenize", f"/v1/{i}")[i % 3],
                    method=("POST", "GET", f"VERB{i}")[i % 3],
                    status=status,
                    message=f"junk {i}",
                )
            )
    assert len(series(metrics)) == before
    assert re.findall(r"junk|VERB|key_|req_\d|client_", metrics.page().decode()) == []


@pytest.fixture
def metrics() -> Metrics:
    """With each kind of series there can be."""
    metrics = Metrics()
    metrics.watch(every_load)
    for event in every_kind():
        metrics.observe(event)
    return metrics


def test_the_page_never_exceeds_the_series_bound(metrics: Metrics) -> None:
    assert len(series(metrics)) <= SERIES_MAX


def test_models_routes_and_error_codes_beyond_their_number_share_a_label(metrics: Metrics) -> None:
    page = series(metrics)
    labels = [sample.labels for sample in samples(metrics, "trivec_requests")]
    routes = {(one["route"], one["method"]) for one in labels}
    assert len(routes) == ROUTES_MAX + 1
    assert ("other", "other") in routes
    inputs = {name for name in page if name.startswith("trivec_inputs_total")}
    assert inputs == {
        f'trivec_inputs_total{{model="{model}"}}'
        for model in ("served-0", "served-1", "served-2", "served-3", "other")
    }
    refusals = [value for name, value in page.items() if name.startswith("trivec_refusals_total")]
    assert refusals == [1] * REASONS_MAX + [10]


def counted_as(route: str, method: str, status: int = 200, prefix: str = "/v1") -> dict[str, str]:
    """The labels under which such a request is counted."""
    metrics = Metrics()
    metrics.observe(request(route=route, prefix=prefix, method=method, status=status, model=None))
    (sample,) = samples(metrics, "trivec_requests")
    return sample.labels


def samples(metrics: Metrics, family: str) -> list[Sample]:
    page = text_string_to_metric_families(metrics.page().decode())
    return next(found.samples for found in page if found.name == family)


@pytest.mark.parametrize("prefix", ["/v1", "/openai/v1", "/v3/openai"])
def test_the_three_prefixes_are_one_route(prefix: str) -> None:
    assert counted_as(f"{prefix}/embeddings", "POST", prefix=prefix)["route"] == "/embeddings"


@pytest.mark.parametrize(
    ("route", "method", "status"),
    [
        pytest.param("/v1/embeddings", "DELETE", 405, id="a-wrong-method"),
        pytest.param("other", "GET", 404, id="an-unknown-path"),
    ],
)
def test_what_is_not_served_shares_one_label(route: str, method: str, status: int) -> None:
    labels = counted_as(route, method, status)
    assert (labels["route"], labels["method"]) == ("other", "other")


def test_a_parameter_is_the_same_whatever_the_route_calls_it() -> None:
    assert counted_as("/v1/models/{model:path}", "GET")["route"] == "/models/{id}"


@pytest.mark.parametrize(
    ("status", "name"), [(204, "2xx"), (429, "4xx"), (503, "5xx"), (42, "other")]
)
def test_a_status_is_its_class(status: int, name: str) -> None:
    assert counted_as("/v1/models", "GET", status)["status"] == name


def test_the_documentation_describes_every_metric_and_no_other(metrics: Metrics) -> None:
    rows = re.findall(
        r"^\| `(trivec_\w+)` \| (\w+) \| ([^|]*) \| ([^|]*) \|$", DOCS.read_text(), re.M
    )
    documented = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)), help_text.strip())
        for name, kind, labels, help_text in rows
    }
    exposed = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            set(family.samples[0].labels) - {"le"},
            family.documentation,
        )
        for family in text_string_to_metric_families(metrics.page().decode())
        if not family.name.startswith("process_")
    }
    assert documented == exposed


def test_in_a_merged_page_every_series_names_its_process_and_every_family_stands_once() -> None:
    one, other = Metrics(), Metrics(lines_dropped=lambda: 1)
    page = merged_pages({"api-1": one.page(), "engine": other.page()}).decode()
    families = list(text_string_to_metric_families(page))
    assert len({family.name for family in families}) == len(families)
    found = [sample for family in families for sample in family.samples]
    assert {sample.labels["process"] for sample in found} == {"api-1", "engine"}
    dropped = {
        sample.labels["process"]: sample.value
        for sample in found
        if sample.name == "trivec_log_lines_dropped_total"
    }
    assert dropped == {"api-1": 0, "engine": 1}


def test_a_merged_page_of_one_process_keeps_its_numbers_and_types(metrics: Metrics) -> None:
    page = metrics.page()
    merged = merged_pages({"engine": page})
    before = {one.name: one for one in text_string_to_metric_families(page.decode())}
    after = {one.name: one for one in text_string_to_metric_families(merged.decode())}
    assert before.keys() == after.keys()
    for name, family in before.items():
        assert (after[name].type, after[name].documentation) == (family.type, family.documentation)
        assert [one.value for one in after[name].samples] == [one.value for one in family.samples]


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
