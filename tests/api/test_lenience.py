"""What honest clients send that means nothing else: it is read as they mean it."""

import json

import httpx
import pytest
from tests.api.house import ALIAS, MODEL, House

from trivec.accounts import KeyPlan


async def post(house: House, body: bytes, url: str = "/embeddings") -> httpx.Response:
    async with house.client() as client:
        headers = {"content-type": "application/json"}
        return await client.post(url, content=body, headers=headers)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"dimensions": 8}, id="all-the-dimensions-there-are"),
        pytest.param({"stream": None}, id="an-unknown-field-that-is-null"),
        pytest.param({"truncate": "END"}, id="upper-case"),
        pytest.param({"truncate": "None"}, id="a-capital"),
        pytest.param({"encoding_format": "Float"}, id="another-word"),
        pytest.param({"output_type": "Dense"}, id="an-output"),
        pytest.param({"truncate": "Start", "stream": None}, id="two-at-once"),
    ],
)
async def test_what_changes_nothing_is_taken(house: House, given: dict[str, object]) -> None:
    usual = {"model": MODEL, "input": "hello"}
    plain = await post(house, json.dumps(usual).encode())
    answer = await post(house, json.dumps(usual | given).encode())
    assert answer.status_code == 200, answer.text
    assert answer.json() == plain.json()


async def test_a_byte_order_mark_is_skipped(house: House) -> None:
    body = b'\xef\xbb\xbf{"model":"%b","input":"a"}' % MODEL.encode()
    assert (await post(house, body)).status_code == 200


async def test_the_admin_routes_read_the_same_way(house: House) -> None:
    body = b'\xef\xbb\xbf{"name":"team","scopes":["EMBED"],"note":null}'
    answer = await post(house, body, "http://house/admin/v1/keys")
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        pytest.param(b'"input":["a","\\ud800"]', "input[1]", id="a-first-half"),
        pytest.param(b'"input":["a","b","\\udc00x"]', "input[2]", id="a-second-half"),
        pytest.param(b'"input":["\xed\xa0\x80"]', "input[0]", id="an-encoded-half"),
        pytest.param(b'"input":"a","user":"\xff"', "user", id="no-utf-8-in-another-field"),
    ],
)
async def test_a_text_that_is_no_unicode_is_named(house: House, fields: bytes, param: str) -> None:
    answer = await post(house, b'{"model":"%b",%b}' % (MODEL.encode(), fields))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("named", [MODEL, ALIAS])
async def test_a_key_for_a_model_by_any_name_opens_it_by_every_name(
    house: House, named: str
) -> None:
    plan = KeyPlan("one", models=frozenset({named}))
    key = (await house.accounts.create_key(plan)).plain
    async with house.client(key) as client:
        listed = (await client.get("/models")).json()
        for name in (MODEL, ALIAS):
            answer = await client.post("/embeddings", json={"model": name, "input": "a"})
            assert answer.status_code == 200, answer.text
    assert [model["id"] for model in listed["data"]] == [MODEL]


async def test_a_model_that_is_not_served_is_warned_of_when_the_key_is_made(house: House) -> None:
    body = json.dumps({"name": "team", "models": [ALIAS, "nope"]}).encode()
    made = (await post(house, body, "http://house/admin/v1/keys")).json()
    (warning,) = made["warnings"]
    assert "nope" in warning
    assert MODEL in warning
