"""Every failure has one row in the table and one shape on the wire."""

import re
from collections.abc import Callable, Iterator

import httpx
import pytest
from tests.accounts.requests import statuses
from tests.api.house import MODEL, PLAIN_MODEL, House

from trivec.accounts import RateLimits, Scope
from trivec.api.errors import TABLE, error_response
from trivec.core import errors as e
from trivec.core.errors import (
    AccessError,
    BusyError,
    DeadlineExceeded,
    Draining,
    EngineFault,
    Loading,
    Overloaded,
    RequestError,
    ServiceError,
)
from trivec.core.health import Health
from trivec.settings import HttpLimits

FAMILIES = {ServiceError, RequestError, AccessError, BusyError}


def kinds(of: type[ServiceError]) -> set[type[ServiceError]]:
    found = {of}
    for one in of.__subclasses__():
        found |= kinds(one)
    return found


def test_every_error_that_can_be_raised_has_exactly_one_row() -> None:
    assert set(TABLE) == kinds(ServiceError) - FAMILIES


def test_nothing_a_client_will_send_again_unchanged_is_retried_by_the_official_clients() -> None:
    """They retry 408, 409, 429 and 5xx."""
    for kind in (kinds(RequestError) | kinds(AccessError)) & set(TABLE):
        if kind is not e.BodyTooSlow:
            assert TABLE[kind].status in {400, 401, 403, 404, 405, 413, 415}


def test_our_own_fault_tells_the_client_nothing_but_the_request_id() -> None:
    body = error_response(EngineFault("slot 3 died in layer 7"), request_id="req_1").body
    assert b"req_1" in bytes(body)
    assert b"slot" not in bytes(body)


@pytest.mark.parametrize(
    ("retry_after_s", "seconds", "milliseconds"),
    [
        pytest.param(0.0, "1", "1", id="never-zero"),
        pytest.param(0.25, "1", "250", id="seconds-round-up"),
        pytest.param(7.0, "7", "7000", id="whole-seconds-stay"),
        pytest.param(86_400.0, "60", "60000", id="never-so-long-that-clients-give-up"),
    ],
)
def test_a_busy_server_says_when_to_come_back(
    retry_after_s: float, seconds: str, milliseconds: str
) -> None:
    busy = Overloaded("full", retry_after_s=retry_after_s)
    headers = error_response(busy, request_id="r").headers
    assert headers["retry-after"] == seconds
    assert headers["retry-after-ms"] == milliseconds


# --- through a real socket ---------------------------------------------------------------------


LIMITS = HttpLimits(
    body_bytes_max=4096,
    body_chunks_max=4,
    request_tokens_max=100,
    answer_bytes_max=4096,
    request_s_max=20.0,
)


@pytest.fixture(scope="module")
def strict_house() -> Iterator[House]:
    house = House(limits=LIMITS)
    house.plain_model.gate.clear()  # the plain model never answers
    yield house
    house.close()


@pytest.fixture(scope="module")
def strict_address(strict_house: House) -> Iterator[str]:
    with strict_house.listening() as address:
        yield address


def embeddings(address: str, key: str | None, **given: object) -> httpx.Response:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    body = {"model": MODEL, "input": "hello", **given}
    return httpx.post(f"{address}/v1/embeddings", json=body, headers=headers, timeout=60)


def raw(address: str, key: str, content: bytes | Iterator[bytes], **headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    given = {"authorization": f"Bearer {key}", "content-type": "application/json", **named}
    return httpx.post(f"{address}/v1/embeddings", content=content, headers=given, timeout=60)


def assert_is_error(
    response: httpx.Response, status: int, kind: str, param: str | None, code: str | None
) -> str:
    """The exact shape; gives the message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert re.fullmatch(r"req_[0-9a-f]{32}", response.headers["x-request-id"])
    assert "openai-processing-ms" in response.headers
    assert "server-timing" in response.headers
    if status in (429, 503):
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert 1 <= int(response.headers["retry-after-ms"]) <= 60_000
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"].pop("message")
    assert body["error"] == {"type": kind, "param": param, "code": code}
    assert isinstance(message, str)
    assert message
    return message


INVALID = "invalid_request_error"


@pytest.mark.parametrize(
    ("ask", "expected"),
    [
        pytest.param(lambda a, k: embeddings(a, None), (401, INVALID, None, None), id="no-key"),
        pytest.param(
            lambda a, k: embeddings(a, "tv_wrong"),
            (401, INVALID, None, "invalid_api_key"),
            id="wrong-key",
        ),
        pytest.param(
            lambda a, k: embeddings(a, k, model="nope"),
            (404, INVALID, "model", "model_not_found"),
            id="unknown-model",
        ),
        pytest.param(lambda a, k: raw(a, k, b"{"), (400, INVALID, None, None), id="broken-json"),
        pytest.param(lambda a, k: raw(a, k, b"[]"), (400, INVALID, None, None), id="not-an-object"),
        pytest.param(lambda a, k: raw(a, k, b""), (400, INVALID, None, None), id="empty-body"),
        pytest.param(
            lambda a, k: raw(a, k, b'{"model":"m","input":"\xff"}'),
            (400, INVALID, "input", None),
            id="invalid-utf-8",
        ),
        pytest.param(
            lambda a, k: raw(a, k, b'{"model":"m","input":"\\ud800"}'),
            (400, INVALID, "input", None),
            id="lone-surrogate",
        ),
        pytest.param(
            lambda a, k: embeddings(a, k, input=""), (400, INVALID, "input", None), id="empty-input"
        ),
        pytest.param(
            lambda a, k: embeddings(a, k, input=["a", ""]),
            (400, INVALID, "input[1]", None),
            id="empty-item",
        ),
        pytest.param(
            lambda a, k: embeddings(a, k, trunkate=True),
            (400, INVALID, "trunkate", None),
            id="unknown-field",
        ),
        pytest.param(
            lambda a, k: embeddings(a, k, input=["a", "b" * 80]),
            (400, INVALID, "input[1]", "context_length_exceeded"),
            id="input-too-long",
        ),
        pytest.param(
            lambda a, k: embeddings(a, k, input=["a" * 50] * 3),
            (400, "max_tokens_per_request", None, "max_tokens_per_request"),
            id="request-too-long",
        ),
        pytest.param(
            lambda a, k: embeddings(a, k, input=[5] * 101),
            (400, "max_tokens_per_request", None, "max_tokens_per_request"),
            id="too-many-token-ids",
        ),
        pytest.param(
            lambda a, k: embeddings(a, k, input=[[5]] * 101),
            (400, "max_tokens_per_request", None, "max_tokens_per_request"),
            id="too-many-lists-of-token-ids",
        ),
        pytest.param(
            lambda a, k: embeddings(a, k, input="a" * 60, output_type="multi"),
            (400, INVALID, None, "answer_too_large"),
            id="answer-too-large",
        ),
        pytest.param(
            lambda a, k: raw(a, k, b"x" * 5000), (413, INVALID, None, None), id="body-too-large"
        ),
        pytest.param(
            lambda a, k: raw(a, k, iter([b"x" * 3000, b"x" * 3000])),
            (413, INVALID, None, None),
            id="body-too-large-without-a-length",
        ),
        pytest.param(
            lambda a, k: raw(a, k, iter([b" "] * 6)),
            (413, INVALID, None, None),
            id="too-many-chunks",
        ),
        pytest.param(
            lambda a, k: raw(a, k, b"{}", content_type="text/plain"),
            (415, INVALID, None, None),
            id="wrong-content-type",
        ),
        pytest.param(
            lambda a, k: raw(a, k, b"{}", content_encoding="gzip"),
            (415, INVALID, None, None),
            id="compressed-body",
        ),
        pytest.param(
            lambda a, k: httpx.get(f"{a}/v1/nope", timeout=60),
            (404, INVALID, None, None),
            id="unknown-route",
        ),
        pytest.param(
            lambda a, k: httpx.get(f"{a}/v1/embeddings", timeout=60),
            (405, INVALID, None, None),
            id="wrong-method",
        ),
        pytest.param(
            lambda a, k: httpx.get(
                f"{a}/admin/v1/keys/nobody", headers={"authorization": f"Bearer {k}"}, timeout=60
            ),
            (404, INVALID, None, None),
            id="unknown-resource",
        ),
        pytest.param(
            lambda a, k: raw(
                a, k, b'{"model":"all-minilm-l6-v2","input":"a"}', x_stainless_read_timeout="0.05"
            ),
            (503, "server_error", None, "deadline_exceeded"),
            id="the-clients-own-deadline",
        ),
    ],
)
def test_each_refusal_has_its_exact_shape(
    strict_house: House,
    strict_address: str,
    ask: Callable[[str, str], httpx.Response],
    expected: tuple[int, str, str | None, str | None],
) -> None:
    assert_is_error(ask(strict_address, strict_house.key), *expected)


def test_a_wrong_method_names_the_right_ones(strict_address: str) -> None:
    response = httpx.delete(f"{strict_address}/v1/models", timeout=60)
    assert response.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        pytest.param(
            Overloaded("full", retry_after_s=2),
            (503, "server_error", None, "overloaded"),
            id="full",
        ),
        pytest.param(
            DeadlineExceeded("late", retry_after_s=2),
            (503, "server_error", None, "deadline_exceeded"),
            id="late",
        ),
        pytest.param(
            Draining("bye", retry_after_s=2), (503, "server_error", None, "draining"), id="draining"
        ),
        pytest.param(
            Loading("soon", retry_after_s=2), (503, "server_error", None, "loading"), id="loading"
        ),
        pytest.param(
            EngineFault("secret"), (500, "server_error", None, "internal_error"), id="our-fault"
        ),
        pytest.param(
            ZeroDivisionError("secret"),
            (500, "server_error", None, "internal_error"),
            id="a-fault-nobody-foresaw",
        ),
    ],
)
def test_what_the_engine_raises_has_its_exact_shape(
    house: House, fault: Exception, expected: tuple[int, str, str | None, str | None]
) -> None:
    house.model.fault = fault
    with house.listening() as address:
        message = assert_is_error(embeddings(address, house.key), *expected)
    assert "secret" not in message


def test_a_key_is_held_to_its_scope_its_models_and_its_allowance(house: House) -> None:
    only_plain = house.new_key("plain", models=frozenset({PLAIN_MODEL}))
    only_admin = house.new_key("admin", scopes=frozenset({Scope.ADMIN}))
    few = house.new_key("few", allowance=RateLimits(requests_per_minute=1))
    tiny = house.new_key("tiny", allowance=RateLimits(tokens_per_minute=10))
    with house.listening() as address:
        denied = embeddings(address, only_plain)
        assert_is_error(denied, 403, INVALID, "model", "model_access_denied")
        unscoped = embeddings(address, only_admin)
        assert_is_error(unscoped, 403, INVALID, None, "insufficient_scope")
        assert embeddings(address, few).status_code == 200
        assert_is_error(embeddings(address, few), 429, "requests", None, "rate_limit_exceeded")
        assert embeddings(address, tiny).status_code == 200
        assert_is_error(embeddings(address, tiny), 429, "tokens", None, "rate_limit_exceeded")
        never = embeddings(address, tiny, input="a" * 20)
        kind = "max_tokens_per_request"
        assert_is_error(never, 400, kind, None, kind)


async def test_an_idempotency_key_is_not_read(house: House) -> None:
    async with house.client() as client:
        for text in ("a", "another body"):
            body, named = {"model": MODEL, "input": text}, {"idempotency-key": "once"}
            assert (await client.post("/embeddings", json=body, headers=named)).status_code == 200
    assert statuses(house.store) == [200, 200]


def test_a_store_that_cannot_be_written_never_gives_an_unmetered_answer(house: House) -> None:
    house.store.broken = True
    with house.listening() as address:
        response = embeddings(address, house.key)
    assert_is_error(response, 503, "server_error", None, "store_unavailable")


@pytest.mark.parametrize(
    ("phase", "code"),
    [pytest.param("loading", "loading"), pytest.param("stopped", "draining")],
)
def test_a_server_that_is_not_there_yet_or_no_more_says_so(
    house: House, phase: str, code: str
) -> None:
    house.health = Health(phase, alive=True, ready=False, reason="not now")  # type: ignore[arg-type]
    with house.listening() as address:
        assert_is_error(embeddings(address, house.key), 503, "server_error", None, code)
        assert httpx.get(f"{address}/livez", timeout=60).status_code == 200
        assert httpx.get(f"{address}/readyz", timeout=60).status_code == 503


def test_a_server_without_models_is_loading() -> None:
    house = House(is_loading=True)
    with house.listening() as address:
        assert_is_error(embeddings(address, "any"), 503, "server_error", None, "loading")
    house.close()


class PanicException(BaseException):  # as pyo3 calls it
    """What a Rust library raises where its own code fails: no `Exception`."""


async def test_a_panic_of_a_library_is_our_500_and_the_next_request_is_served(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": MODEL, "input": "a"}

    async def panics(*_: object, **__: object) -> None:
        raise PanicException("byte index 1 is not a char boundary in `a client's text`")

    async with house.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(house.model, "tokenize", panics)
            answer = await client.post("/embeddings", json=body)
        assert answer.status_code == 500
        assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
        assert "client's text" not in answer.text
        assert (await client.post("/embeddings", json=body)).status_code == 200
    assert statuses(house.store) == [200, 500]


async def test_a_method_is_one_of_https_or_other(house: House) -> None:
    async with house.client() as client:
        wrong = await client.request("X" * 10_000, "/embeddings")
        nowhere = await client.request("X" * 10_000, "/nowhere")
    assert (wrong.status_code, nowhere.status_code) == (405, 404)
    assert "XX" not in wrong.text + nowhere.text
    assert "This method is not allowed here; use POST." in wrong.text
    assert "Nothing is served at this path with this method." in nowhere.text
    served = [(event.method, event.route, event.prefix) for event in house.heard.served]
    assert served == [("other", "/v1/embeddings", "/v1"), ("other", "other", "")]
