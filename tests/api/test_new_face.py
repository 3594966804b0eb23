"""Another face is one file and one registration; keys, usage, errors and the description come with it."""

import pytest
from tests.api.house import MODEL, House
from tests.support import toy_endpoint

from trivec.accounts import RateLimits

URL = "http://house/toy/embed"
BODY = {"model": MODEL, "text": "hello"}


@pytest.fixture
def toy_house(house: House) -> House:
    house.serve(operations=toy_endpoint.OPERATIONS)
    return house


async def test_it_is_answered_billed_and_told_of(toy_house: House) -> None:
    async with toy_house.client() as client:
        answer = await client.post(URL, json=BODY)
        usual = await client.post("/embeddings", json={"model": MODEL, "input": "hello"})
    assert answer.json()["vector"] == usual.json()["data"][0]["embedding"]
    assert [row.token_count for row in toy_house.store.rows] == [7, 7]
    assert (toy_house.heard.served[0].route, toy_house.heard.served[0].token_count) == (
        "/toy/embed",
        7,
    )


@pytest.mark.parametrize(
    ("key", "given", "status", "param"),
    [
        pytest.param("wrong", {}, 401, None, id="key"),
        pytest.param(None, {"model": "nope"}, 404, "model", id="model"),
        pytest.param(None, {"txt": "a"}, 400, "txt", id="field"),
    ],
)
async def test_it_is_refused_like_any_other(
    toy_house: House, key: str | None, given: dict[str, str], status: int, param: str | None
) -> None:
    async with toy_house.client(key) as client:
        answer = await client.post(URL, json=BODY | given)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


async def test_an_open_route_reads_a_body_without_a_key(toy_house: House) -> None:
    async with toy_house.client("wrong") as client:
        answer = await client.post("http://house/toy/echo", json=BODY)
    assert (answer.status_code, answer.json()) == (200, "hello")
    assert toy_house.heard.served[-1].key_id is None


async def test_it_is_held_to_rate_limits(toy_house: House) -> None:
    key = await toy_house.new_key_async("one", RateLimits(requests_per_minute=1))
    async with toy_house.client(key) as client:
        told = [(await client.post(URL, json=BODY)).status_code for _ in range(2)]
    assert told == [200, 429]


async def test_it_is_described(toy_house: House) -> None:
    async with toy_house.client() as client:
        described = (await client.get("http://house/openapi.json")).json()
    operation = described["paths"]["/toy/embed"]["post"]
    assert operation["summary"] == "Turn one text into a vector"
    assert operation["security"] == [{"key": []}]
