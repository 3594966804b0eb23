"""Each authenticated request a row or in a count, before its answer leaves; failures cost nothing."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest
from tests.accounts.requests import statuses
from tests.api.house import MODEL, READY, House
from tests.support.memory_store import MemoryStore

from trivec.accounts import RateLimits
from trivec.accounts.ledger import Committed, Count, Entry, LedgerRow, RecordUsage, Reserve
from trivec.core.errors import EngineFault
from trivec.server.granian_server import SwappableApp
from trivec.settings import HttpLimits

BODY = {"model": MODEL, "input": ["hello", "a"], "user": "someone"}
TOKENS = 7 + 3


def only_row(house: House) -> LedgerRow:
    assert not house.store.counts
    (row,) = house.store.rows
    return row


def only_count(house: House) -> Count:
    """Of the one request that was written down, which cost no tokens."""
    assert not house.store.rows
    ((count, requests),) = house.store.counts.items()
    assert requests == 1
    return count


async def test_a_success_is_billed_its_tokens_under_its_request_id(house: House) -> None:
    async with house.client() as client:
        response = await client.post("/embeddings", json=BODY)
    row = only_row(house)
    assert row.request_id == response.headers["x-request-id"]
    assert (row.model, row.input_count, row.token_count, row.status) == (MODEL, 2, TOKENS, 200)
    assert row.user_digest is not None
    assert "someone" not in row.user_digest


@pytest.mark.parametrize(
    ("path", "body", "status", "model"),
    [
        pytest.param("/embeddings", b"{", 400, None, id="malformed"),
        pytest.param("/embeddings", b'{"model":"nope","input":"a"}', 404, None, id="no-such-model"),
        pytest.param(
            "/embeddings", b'{"model":"baai/bge-m3","input":""}', 400, None, id="empty-input"
        ),
        pytest.param(
            "/embeddings",
            b'{"model":"baai/bge-m3","input":[999999]}',
            400,
            MODEL,
            id="foreign-token-id",
        ),
        pytest.param(
            "/tokenize", b'{"model":"baai/bge-m3","input":"a"}', 200, MODEL, id="tokenize"
        ),
    ],
)
async def test_what_is_not_computed_is_written_down_and_costs_no_tokens(
    house: House, path: str, body: bytes, status: int, model: str | None
) -> None:
    async with house.client() as client:
        headers = {"content-type": "application/json"}
        response = await client.post(path, content=body, headers=headers)
    assert response.status_code == status
    assert (only_count(house).status, only_count(house).model) == (status, model)


async def test_a_request_that_our_fault_ends_costs_nothing_of_the_allowance(house: House) -> None:
    house.model.fault = EngineFault("lost")
    key = await house.new_key_async(
        "limited", RateLimits(requests_per_minute=2, tokens_per_minute=99)
    )
    async with house.client(key) as client:
        response = await client.post("/embeddings", json=BODY)
    assert response.status_code == 500
    assert response.headers["x-ratelimit-remaining-requests"] == "2"
    assert response.headers["x-ratelimit-remaining-tokens"] == "99"
    assert only_count(house).status == 500


async def test_a_failure_after_the_vectors_were_computed_costs_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(house.model, "token_strings", lambda token_ids: 1 / 0)
    async with house.client() as client:
        spelled = {"output_type": "sparse", "return_tokens": True}
        response = await client.post("/embeddings", json=BODY | spelled)
    assert response.status_code == 500
    assert only_count(house).status == 500
    assert house.heard.served[-1].token_count == 0


async def test_a_refused_allowance_is_written_down(house: House) -> None:
    key = await house.new_key_async("one", RateLimits(requests_per_minute=1))
    async with house.client(key) as client:
        told = [(await client.post("/embeddings", json=BODY)).status_code for _ in range(2)]
    assert told == [200, 429]
    assert statuses(house.store) == [200, 429]


async def test_tokens_over_the_allowance_never_reach_the_model(house: House) -> None:
    key = await house.new_key_async("small", RateLimits(tokens_per_minute=TOKENS - 1))
    async with house.client(key) as client:
        response = await client.post("/embeddings", json=BODY)
    assert response.status_code == 400
    assert not house.model.embedded


async def test_requests_without_a_good_key_write_nothing(house: House) -> None:
    async with house.client("wrong") as client:
        assert (await client.post("/embeddings", json=BODY)).status_code == 401
    assert not statuses(house.store)


async def test_probes_and_scrapes_write_nothing(house: House) -> None:
    async with house.client() as client:
        for path in ("/livez", "/readyz", "/metrics", "/openapi.json"):
            assert (await client.get(f"http://house{path}")).status_code == 200
    assert not statuses(house.store)


async def test_the_row_is_there_before_the_answer(house: House) -> None:
    """The store fails between computing and answering: the vectors must not leave."""
    house.model.gate.clear()
    async with house.client() as client:
        answer = asyncio.create_task(client.post("/embeddings", json=BODY))
        assert await asyncio.to_thread(house.model.entered.wait, 60)
        house.store.broken = True
        house.model.gate.set()
        response = await answer
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "store_unavailable"
    assert house.heard.served[-1].token_count == 0


def test_a_client_that_leaves_frees_its_place_and_is_billed_nothing(house: House) -> None:
    house.model.gate.clear()
    with house.listening() as address:
        url, content = httpx.URL(address), json.dumps(BODY)
        with socket.create_connection((url.host, url.port or 80), timeout=60) as client:
            head = (
                "POST /v1/embeddings HTTP/1.1\r\nHost: house\r\n"
                f"Authorization: Bearer {house.key}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\n\r\n"
            )
            client.sendall((head + content).encode())
            assert house.model.entered.wait(60), "the request did not arrive"
        assert house.model.left.wait(60), "the embedding was not cancelled"
        assert house.heard.wait(1, within_s=60), "it was not told of; a stop would cut that short"
    assert only_count(house).status == 499
    served = house.heard.served[-1]
    assert (served.status, served.code, served.token_count) == (499, "client_gone", 0)


def test_a_request_over_its_deadline_frees_its_place_and_is_billed_nothing(house: House) -> None:
    house.model.gate.clear()
    with house.listening() as address, ThreadPoolExecutor(1) as threads:
        access = {"authorization": f"Bearer {house.key}"}
        asked = threads.submit(
            httpx.post, f"{address}/v1/embeddings", json=BODY, headers=access, timeout=60
        )
        assert house.model.entered.wait(60), "the request did not arrive"
        house.let_pass(house.limits.request_s_max)
        assert house.model.left.wait(60), "the embedding was not cancelled"
        response = asked.result()
    assert response.json()["error"]["code"] == "deadline_exceeded"
    assert only_count(house).status == 503


class HeldStore(MemoryStore):
    """Holds a commit with a reservation that *is_held*, until its gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.is_held: Callable[[Reserve], bool] = lambda entry: False
        self.gate = threading.Event()
        self.entered = threading.Event()

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        if any(isinstance(entry, Reserve) and self.is_held(entry) for entry in entries):
            self.entered.set()
            assert self.gate.wait(60)
        return super().commit(entries, now_us=now_us)


@pytest.fixture
def held_house() -> Iterator[House]:
    built = House(store=HeldStore())
    yield built
    built.close()


async def leave_while_held(client: httpx.AsyncClient, store: HeldStore) -> None:
    left = asyncio.create_task(client.post("/embeddings", json=BODY))
    assert await asyncio.to_thread(store.entered.wait, 60)
    left.cancel()
    await asyncio.sleep(0)  # the cancellation has arrived before the store answers
    store.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await left


async def test_a_client_that_leaves_while_its_tokens_are_reserved_gets_them_back(
    held_house: House,
) -> None:
    store = held_house.store
    assert isinstance(store, HeldStore)
    key = await held_house.new_key_async("limited", RateLimits(tokens_per_minute=2 * TOKENS))
    store.is_held = lambda entry: entry.cost.tokens > 0
    async with held_house.client(key) as client:
        await leave_while_held(client, store)
        for _ in range(2):
            assert (await client.post("/embeddings", json=BODY)).is_success


class HeldRows(MemoryStore):
    """Commits of rows wait until they may go on."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        if any(isinstance(entry, RecordUsage) for entry in entries):
            self.begun.set()
            assert self.may_go_on.wait(60)
        return super().commit(entries, now_us=now_us)


@pytest.mark.parametrize(("breaks", "status"), [(False, 200), (True, 503)])
async def test_a_request_that_a_stop_cancels_while_its_row_is_written_is_answered_as_it_is_billed(
    breaks: bool, status: int
) -> None:
    store = HeldRows()
    house = await asyncio.to_thread(House, store=store)
    in_flight = SwappableApp(house.app)
    house.app = in_flight
    try:
        async with house.client() as client:
            asked = asyncio.create_task(client.post("/embeddings", json=BODY))
            assert await asyncio.to_thread(store.begun.wait, 60)
            house.health = replace(READY, phase="stopped")
            await in_flight.cancel_requests(after_s=0)
            store.broken = breaks
            store.may_go_on.set()
            response = await asked
    finally:
        await asyncio.to_thread(house.close)
    assert response.status_code == status
    assert [row.status for row in store.rows] == ([] if breaks else [200])


async def test_the_observer_hears_one_event_a_request(house: House) -> None:
    async with house.client() as client:
        good = await client.post("/embeddings", json=BODY)
        await client.get("/nope")
    first, second = house.heard.served
    assert first.request_id == good.headers["x-request-id"]
    assert (first.route, first.method, first.status) == ("/v1/embeddings", "POST", 200)
    assert (first.model, first.input_count, first.token_count) == (MODEL, 2, TOKENS)
    assert first.response_bytes == len(good.content)
    assert first.request_bytes > 0
    assert (first.queue_s, first.compute_s, first.code) == (0.002, 0.003, None)
    assert (second.route, second.status, second.code) == ("other", 404, "invalid_request_error")


async def test_requests_that_cost_no_tokens_have_a_rate_of_their_own(house: House) -> None:
    clock = house.clock
    house.limits = HttpLimits(unpaid_requests_per_minute=3)
    house.serve()
    other = await house.new_key_async("other", RateLimits())
    async with house.client() as client, house.client(other) as theirs:
        for _ in range(5):  # what is paid is not counted
            assert (await client.post("/embeddings", json=BODY)).status_code == 200
        for status in (200, 404, 200):
            path = "/models/nope" if status == 404 else "/models"
            assert (await client.get(path)).status_code == status

        refused = await client.get("/models")
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert "requests per minute that cost no tokens: limit 3" in refused.text
        assert int(refused.headers["retry-after"]) in range(1, 61)
        assert (await client.post("/embeddings", json=BODY)).status_code == 429
        assert (await theirs.get("/models")).status_code == 200

        clock.move(20.1)
        assert (await client.get("/models")).status_code == 200
        assert (await client.get("/models")).status_code == 429


async def test_our_faults_and_refusals_of_an_allowance_are_not_held_against_a_key(
    house: House,
) -> None:
    house.limits = HttpLimits(unpaid_requests_per_minute=1)
    house.serve()
    key = await house.new_key_async("one", RateLimits(requests_per_minute=1))
    async with house.client() as client, house.client(key) as limited:
        house.model.fault = EngineFault("lost")
        for _ in range(3):
            assert (await client.post("/embeddings", json=BODY)).status_code == 500
        house.model.fault = None
        assert (await limited.post("/embeddings", json=BODY)).status_code == 200
        for _ in range(3):
            assert (await limited.post("/embeddings", json=BODY)).status_code == 429
        assert (await limited.get("/models")).status_code == 200
        assert (await client.get("/models")).status_code == 200
