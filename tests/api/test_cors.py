"""Scripts of web pages: none may send requests, unless their origin is a setting."""

from collections.abc import Iterator

import pytest
from tests.api.house import MODEL, House

from trivec.settings import HttpLimits

PAGE, OTHER = "https://chat.example.org", "https://elsewhere.example.org"
PREFLIGHT = {
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type,x-stainless-lang",
}


@pytest.fixture
def open_to_page() -> Iterator[House]:
    house = House(limits=HttpLimits(cors_origins=(PAGE,)))
    yield house
    house.close()


@pytest.fixture
def open_to_all() -> Iterator[House]:
    house = House(limits=HttpLimits(cors_origins=("*",)))
    yield house
    house.close()


async def preflight(house: House, origin: str, url: str = "/embeddings") -> tuple[int, object]:
    """Status, and whom the answer lets in; sent as browsers do, without a key."""
    async with house.client() as client:
        del client.headers["authorization"]
        response = await client.options(url, headers=PREFLIGHT | {"origin": origin})
    return response.status_code, response.headers.get("access-control-allow-origin")


async def test_a_page_of_the_setting_is_let_in_without_a_key(open_to_page: House) -> None:
    assert await preflight(open_to_page, PAGE) == (200, PAGE)
    assert await preflight(open_to_page, PAGE, "/models") == (200, PAGE)


async def test_another_page_is_not(open_to_page: House) -> None:
    assert await preflight(open_to_page, OTHER) == (400, None)


async def test_no_page_is_let_in_by_default(house: House) -> None:
    assert await preflight(house, PAGE) == (405, None)


async def test_a_star_lets_every_page_in(open_to_all: House) -> None:
    assert await preflight(open_to_all, OTHER) == (200, "*")


async def test_the_clients_own_headers_are_allowed(open_to_page: House) -> None:
    async with open_to_page.client() as client:
        response = await client.options("/embeddings", headers=PREFLIGHT | {"origin": PAGE})
    allowed = response.headers["access-control-allow-headers"].replace(" ", "").lower()
    assert allowed == PREFLIGHT["access-control-request-headers"]
    assert "POST" in response.headers["access-control-allow-methods"]


async def test_a_page_reads_answers_refusals_and_when_to_come_back(open_to_page: House) -> None:
    async with open_to_page.client() as client:
        headers = {"origin": PAGE}
        good = await client.post(
            "/embeddings", json={"model": MODEL, "input": "a"}, headers=headers
        )
        bad = await client.post("/embeddings", json={"model": MODEL}, headers=headers)
        client.headers["authorization"] = "Bearer wrong"
        stranger = await client.get("/models", headers=headers)
    assert [one.status_code for one in (good, bad, stranger)] == [200, 400, 401]
    for response in (good, bad, stranger):
        assert response.headers["access-control-allow-origin"] == PAGE
        assert "retry-after" in response.headers["access-control-expose-headers"]
        assert "x-request-id" in response.headers


async def test_an_answer_to_another_page_lets_nobody_in(open_to_page: House) -> None:
    async with open_to_page.client() as client:
        body = {"model": MODEL, "input": "a"}
        answer = await client.post("/embeddings", json=body, headers={"origin": OTHER})
    assert "access-control-allow-origin" not in answer.headers
