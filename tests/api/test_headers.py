"""The headers that every answer carries."""

import pytest
from tests.api.house import MODEL, House

from trivec.accounts import RateLimits
from trivec.api.middleware import duration
from trivec.core.health import Health

BODY = {"model": MODEL, "input": "hello"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        pytest.param(0.0, b"0ms", id="nothing-to-wait-for"),
        pytest.param(0.0113, b"12ms", id="milliseconds-round-up"),
        pytest.param(0.9999, b"999ms", id="just-under-a-second"),
        pytest.param(1.0, b"1s", id="one-second"),
        pytest.param(6.2, b"7s", id="seconds-round-up"),
        pytest.param(60.0, b"1m0s", id="one-minute"),
        pytest.param(62.5, b"1m3s", id="minutes-and-seconds"),
        pytest.param(3605.0, b"1h0m5s", id="hours"),
    ],
)
def test_durations_read_as_openai_writes_them(seconds: float, text: bytes) -> None:
    assert duration(seconds) == text


async def test_an_answer_says_where_its_time_went(house: House) -> None:
    async with house.client() as client:
        response = await client.post("/embeddings", json=BODY)
    parts = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert list(parts) == ["tokenize", "queue", "compute", "encode"]
    assert float(parts["queue"]) == 2.0
    assert float(parts["compute"]) == 3.0
    assert response.headers["openai-processing-ms"].isdigit()


async def test_a_limited_key_reads_what_is_left_on_successes_and_on_failures(house: House) -> None:
    allowance = RateLimits(requests_per_minute=10, tokens_per_minute=1000)
    async with house.client(await house.new_key_async("limited", allowance)) as client:
        good = (await client.post("/embeddings", json=BODY)).headers
        bad = (await client.post("/embeddings", json=BODY | {"input": ""})).headers
        listed = (await client.get("/models")).headers
    assert good["x-ratelimit-limit-requests"] == "10"
    assert good["x-ratelimit-remaining-requests"] == "9"
    assert good["x-ratelimit-reset-requests"] == "6s"
    assert good["x-ratelimit-limit-tokens"] == "1000"
    assert good["x-ratelimit-remaining-tokens"] == "993"
    assert good["x-ratelimit-reset-tokens"].endswith("ms")
    assert bad["x-ratelimit-limit-tokens"] == "1000"
    assert listed["x-ratelimit-limit-requests"] == "10"


async def test_a_key_without_limits_reads_none(house: House) -> None:
    async with house.client() as client:
        response = await client.post("/embeddings", json=BODY)
    assert not [name for name in response.headers if name.startswith("x-ratelimit")]


async def test_a_draining_server_answers_and_closes_the_connection(house: House) -> None:
    house.health = Health("draining", alive=True, ready=False, reason="SIGTERM")
    async with house.client() as client:
        response = await client.post("/embeddings", json=BODY)
        unready = await client.get("http://house/readyz")
    assert response.status_code == 200
    assert response.headers["connection"] == "close"
    assert unready.status_code == 503


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        pytest.param("order-17", "order-17", id="a-sane-one"),
        pytest.param("x" * 512, "x" * 512, id="the-longest"),
        pytest.param("x" * 513, None, id="too-long"),
        pytest.param("caf\u00e9", None, id="not-ascii"),
        pytest.param("a\tb", None, id="not-printable"),
    ],
)
async def test_the_clients_own_request_id_is_kept_only_if_it_is_sane(
    house: House, sent: str, kept: str | None
) -> None:
    async with house.client() as client:
        named = {b"x-client-request-id": sent.encode("latin-1")}
        await client.get("http://house/livez", headers=named)
    assert house.heard.served[-1].client_request_id == kept


@pytest.mark.parametrize(
    ("patience", "timeout_s"),
    [
        pytest.param("20", 20.0, id="shorter-than-ours"),
        pytest.param("6000", 600.0, id="longer-than-ours"),
        pytest.param("nan", 600.0, id="no-number"),
        pytest.param("-1", 600.0, id="negative"),
        pytest.param("0", 600.0, id="zero"),
        pytest.param("soon", 600.0, id="no-sense"),
    ],
)
async def test_the_engine_hears_how_long_the_client_waits(
    house: House, patience: str, timeout_s: float
) -> None:
    async with house.client() as client:
        named = {"x-stainless-read-timeout": patience}
        await client.post("/embeddings", json=BODY, headers=named)
    _, _, heard_s = house.model.embedded[0]
    assert heard_s == pytest.approx(timeout_s)
