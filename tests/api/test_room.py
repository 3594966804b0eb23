"""A full line refuses early: before a body is parsed where that can be known, or tokenised."""

import asyncio
from typing import Any

import httpx
import pytest
from tests.accounts.requests import statuses
from tests.api.house import MODEL, PLAIN_MODEL, House

from trivec.core.types import Sequences

JSON = {"content-type": "application/json"}


def assert_overloaded(response: httpx.Response) -> None:
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("2", "1500")


async def test_a_line_too_full_for_any_request_refuses_before_it_parses(house: House) -> None:
    room_tokens = house.model.room_tokens
    house.model.room_tokens = house.plain_model.room_tokens = 1
    async with house.client() as client:
        assert_overloaded(await client.post("/embeddings", content=b"{no JSON", headers=JSON))
        house.model.room_tokens = room_tokens
        await client.post("/embeddings", content=b"{no JSON", headers=JSON)  # written after it
    assert statuses(house.store) == [400, 503]
    assert not house.store.rows


async def test_one_model_with_room_is_enough_to_read_whom_a_request_is_for(house: House) -> None:
    house.model.room_tokens = 1
    async with house.client() as client:
        assert_overloaded(await client.post("/embeddings", json={"model": MODEL, "input": "a"}))
        other = await client.post("/embeddings", json={"model": PLAIN_MODEL, "input": "a"})
    assert other.status_code == 200


async def test_what_most_likely_cannot_fit_is_refused_before_it_is_tokenised(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model's tokens are bytes: after one request it is known how many a text will make."""
    house.model.room_tokens = 40
    async with house.client() as client:
        body = {"model": MODEL, "input": "x" * 30}
        assert (await client.post("/embeddings", json=body)).status_code == 200
        monkeypatch.setattr(house.model, "tokenize", None)
        assert_overloaded(await client.post("/embeddings", json={**body, "input": "é" * 30}))


async def test_whoever_is_still_being_tokenised_takes_up_room(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all who come while the last room is being taken are tokenised, in turn, for nothing."""
    tokenize = house.model.tokenize
    entered, may_go_on = asyncio.Event(), asyncio.Event()

    async def slow(*args: Any, **kwargs: Any) -> Sequences:
        if not entered.is_set():
            entered.set()
            await may_go_on.wait()
        return await tokenize(*args, **kwargs)

    house.model.room_tokens = 10
    body = {"model": MODEL, "input": [[4, 5, 6], [7, 8, 9]]}
    async with house.client() as client:
        monkeypatch.setattr(house.model, "tokenize", slow)
        first = asyncio.create_task(client.post("/embeddings", json=body))
        await entered.wait()
        assert_overloaded(await client.post("/embeddings", json=body))
        may_go_on.set()
        assert (await first).status_code == 200
        assert (await client.post("/embeddings", json=body)).status_code == 200


@pytest.mark.parametrize(
    ("given", "tokens_min"),
    [
        pytest.param(["a"] * 7, 14, id="two-tokens-for-each-text"),
        pytest.param([[4, 5, 6], [7]], 4, id="the-ids-themselves"),
    ],
)
async def test_what_cannot_fit_is_refused_before_it_is_tokenised(
    given: list[object], tokens_min: int, house: House
) -> None:
    async with house.client() as client:
        house.model.room_tokens = tokens_min - 1
        body = {"model": MODEL, "input": given}
        assert_overloaded(await client.post("/embeddings", json=body))
        assert not house.model.embedded
        house.model.room_tokens = tokens_min
        assert (await client.post("/embeddings", json=body)).status_code == 200
