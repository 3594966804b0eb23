"""A flood against a device that stands still: exactly what fits is let in, all else is refused well.

No rate and no clock is in it, so that every count is exact; how fast a refusal is, is for
`tests.soak.overload`.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tests.accounts.requests import statuses as written_down
from tests.soak.service import MODEL, Service

from trivec.settings import QueueLimits, Settings
from trivec.tokenizer import Tokenizer

QUEUE_TOKENS_MAX = 4_800  # a whole number of the requests below: nothing fits beside them
FLOOD = 200
TEXTS = ["a few words that are always the same"] * 40
TOKENS = 40 * 10  # eight words and two special tokens a text
SETTINGS = Settings(
    queue=QueueLimits(
        tokens_max=QUEUE_TOKENS_MAX,
        wait_s_max=1e6,
        first_batch_s_max=1e6,
        always_requests=0,
    )
)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    async with Service(tmp_path, settings=SETTINGS) as built:
        built.faulty.gate.clear()
        yield built


async def flood(
    service: Service, client: httpx.AsyncClient
) -> "list[asyncio.Task[httpx.Response]]":
    """All requests at once, until each is either answered or waits for the device."""
    body = {"model": MODEL, "input": TEXTS}
    asking = [asyncio.create_task(client.post("/embeddings", json=body)) for _ in range(FLOOD)]
    for _ in range(60_000):
        if service.engine.open_requests + sum(one.done() for one in asking) == FLOOD:
            return asking
        await asyncio.sleep(0.001)
    raise AssertionError("some requests were neither answered nor admitted in a minute")


async def test_a_flood_is_refused_with_a_time_to_return_and_what_was_let_in_is_answered(
    service: Service,
) -> None:
    async with service.client() as client:
        asking = await flood(service, client)
        refused = [one.result() for one in asking if one.done()]
        queued_tokens = service.engine.queued_tokens
        assert queued_tokens <= QUEUE_TOKENS_MAX
        assert queued_tokens > QUEUE_TOKENS_MAX - TOKENS, "there was room for one more"
        assert len(refused) == FLOOD - service.engine.open_requests
        for answer in refused:
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "overloaded"
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert 1 <= int(answer.headers["retry-after-ms"]) <= 60_000
        service.faulty.gate.set()
        served = [answer for answer in await asyncio.gather(*asking) if answer.is_success]
        assert len(served) == FLOOD - len(refused)
        assert {answer.json()["usage"]["total_tokens"] for answer in served} == {TOKENS}
        again = await client.post("/embeddings", json={"model": MODEL, "input": TEXTS})
        assert again.status_code == 200, "the flood left something behind"


async def test_what_is_refused_costs_nobody_anything_and_is_written_down(service: Service) -> None:
    async with service.client() as client:
        asking = await flood(service, client)
        service.faulty.gate.set()
        statuses = [answer.status_code for answer in await asyncio.gather(*asking)]
    rows = service.store.rows
    assert written_down(service.store) == sorted(statuses)
    billed = {row.status: row.token_count for row in rows}
    assert billed == {200: TOKENS}
    assert sum(row.token_count for row in rows) == TOKENS * statuses.count(200)


async def test_in_a_full_queue_texts_are_refused_before_they_are_tokenised(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service.client() as client:
        asking = await flood(service, client)

        def no_more(self: Tokenizer, job: object, long_text: object) -> None:
            raise AssertionError("a text was tokenised for a queue that is full")

        monkeypatch.setattr(Tokenizer, "_encode", no_more)
        late = await client.post("/embeddings", json={"model": MODEL, "input": TEXTS})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "overloaded")
        service.faulty.gate.set()
        await asyncio.gather(*asking)
