"""A full queue refuses: before a body is parsed where no model takes any request, else at the queue."""

import httpx
import pytest
from tests.accounts.requests import statuses
from tests.api.house import MODEL, PLAIN_MODEL, House

JSON = {"content-type": "application/json"}


def assert_overloaded(response: httpx.Response) -> None:
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "overloaded"
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("2", "1500")


async def test_queues_too_full_for_any_request_refuse_before_they_parse(house: House) -> None:
    room_tokens = house.model.room_tokens
    house.model.room_tokens = house.plain_model.room_tokens = 1
    async with house.client() as client:
        assert_overloaded(await client.post("/embeddings", content=b"{no JSON", headers=JSON))
        house.model.room_tokens = room_tokens
        await client.post("/embeddings", content=b"{no JSON", headers=JSON)  # written after it
    assert statuses(house.store) == [400, 503]
    assert not house.store.rows


@pytest.mark.parametrize(
    ("path", "body"),
    [
        pytest.param("/v1/tokenize", {"model": MODEL, "input": "a"}, id="ours"),
        pytest.param("/tokenize", {"inputs": "a"}, id="tei-tokenizes"),
        pytest.param("/decode", {"ids": [7]}, id="tei-decodes"),
        pytest.param("/api/show", {"model": MODEL}, id="ollama-shows"),
    ],
)
async def test_what_joins_no_queue_is_answered_however_full(
    house: House, path: str, body: dict[str, object]
) -> None:
    house.model.room_tokens = house.plain_model.room_tokens = 1
    async with house.client() as client:
        response = await client.post(f"http://house{path}", json=body)
    assert response.status_code == 200, response.text


async def test_a_full_queue_refuses_its_own_requests_and_no_others(house: House) -> None:
    house.model.room_tokens = 5
    async with house.client() as client:
        full = await client.post("/embeddings", json={"model": MODEL, "input": "a" * 9})
        short = await client.post("/embeddings", json={"model": MODEL, "input": "a"})
        other = await client.post("/embeddings", json={"model": PLAIN_MODEL, "input": "a" * 9})
    assert_overloaded(full)
    assert (short.status_code, other.status_code) == (200, 200)
