"""Keys and usage over HTTP."""

from typing import Any

import httpx
import pytest
from tests.api.house import MODEL, House

ADMIN = "http://house/admin/v1"


async def create(client: httpx.AsyncClient, **given: object) -> Any:
    response = await client.post(f"{ADMIN}/keys", json={"name": "team", **given})
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_new_key_is_shown_once_and_works(house: House) -> None:
    async with house.client() as client:
        made = await create(client, requests_per_minute=5, models=[MODEL], scopes=["embed"])
        shown = (await client.get(f"{ADMIN}/keys/team")).json()
        listed = (await client.get(f"{ADMIN}/keys")).json()
    plain = made.pop("key")
    assert made == shown
    assert made in listed["data"]
    assert plain not in str(listed)
    assert shown["hints"] == [f"{plain[:8]}…{plain[-4:]}"]
    assert (shown["requests_per_minute"], shown["models"]) == (5, [MODEL])
    async with house.client(plain) as client:
        assert (await client.get("/models")).status_code == 200


async def test_a_revoked_key_opens_nothing(house: House) -> None:
    async with house.client() as client:
        made = await create(client)
        revoked = (await client.post(f"{ADMIN}/keys/{made['id']}/revoke")).json()
    assert revoked["revoked"] is not None
    async with house.client(made["key"]) as client:
        assert (await client.get("/models")).status_code == 401


@pytest.mark.parametrize(
    ("body", "old_works"),
    [
        pytest.param(None, True, id="without-a-body-the-old-key-works-on"),
        pytest.param({}, True, id="an-empty-object-is-the-same"),
        pytest.param({"overlap_s": 0}, False, id="no-overlap-ends-it-at-once"),
    ],
)
async def test_a_rotated_key_has_a_second_secret(
    house: House, body: object, old_works: bool
) -> None:
    async with house.client() as client:
        old = await create(client)
        new = (await client.post(f"{ADMIN}/keys/team/rotate", json=body)).json()
        if body is None:
            new = (await client.post(f"{ADMIN}/keys/team/rotate")).json()
    assert new["id"] == old["id"]
    async with house.client(new["key"]) as client:
        assert (await client.get("/models")).status_code == 200
    if body is not None:
        async with house.client(old["key"]) as client:
            assert (await client.get("/models")).is_success == old_works


@pytest.mark.parametrize(
    ("given", "param"),
    [
        pytest.param({"name": ""}, "name", id="no-name"),
        pytest.param({"name": 7}, "name", id="name-a-number"),
        pytest.param({"name": "all"}, "name", id="name-taken"),
        pytest.param({"scopes": ["root"]}, "scopes[0]", id="no-such-scope"),
        pytest.param({"requests_per_minute": 0}, "requests_per_minute", id="zero-requests"),
        pytest.param({"tokens_per_minute": True}, "tokens_per_minute", id="true-tokens"),
        pytest.param({"expires": "soon"}, "expires", id="no-instant"),
        pytest.param({"expires": "2020-01-01T00:00:00Z"}, "expires", id="expired-already"),
        pytest.param(
            {"expires": "9999-12-31T23:59:00-12:00"}, "expires", id="after-the-last-year-in-utc"
        ),
        pytest.param({"tokens_per_minute": 10**9 + 1}, "tokens_per_minute", id="more-than-any"),
        pytest.param({"rpm": 5}, "rpm", id="unknown-field"),
    ],
)
async def test_a_key_that_cannot_be_is_refused_by_field(
    house: House, given: dict[str, object], param: str
) -> None:
    async with house.client() as client:
        response = await client.post(f"{ADMIN}/keys", json={"name": "team"} | given)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        pytest.param("key", {"name": "all", "requests": 2, "failed": 1, "tokens": 7}, id="key"),
        pytest.param(
            "model", {"model": MODEL, "requests": 2, "failed": 1, "tokens": 7}, id="model"
        ),
        pytest.param("day", {"requests": 2, "failed": 1, "tokens": 7}, id="day"),
    ],
)
async def test_usage_is_summed_as_asked(house: House, by: str, expected: dict[str, object]) -> None:
    async with house.client() as client:
        await client.post("/embeddings", json={"model": MODEL, "input": "hello"})
        await client.post("/embeddings", json={"model": MODEL, "input": [9999]})
        answer = (await client.get(f"{ADMIN}/usage?by={by}")).json()
    (line,) = answer["data"]
    assert line.items() >= expected.items()
    assert answer["by"] == by
    assert by in line


async def test_usage_is_cut_to_a_time_and_a_key(house: House) -> None:
    async with house.client() as client:
        await client.post("/embeddings", json={"model": MODEL, "input": "hello"})
        later = (await client.get(f"{ADMIN}/usage?since=2999-01-01")).json()
        before = (await client.get(f"{ADMIN}/usage?until=2999-01-01T00:00:00Z&key=all")).json()
    assert later["data"] == []
    assert before["data"][0]["tokens"] == 7


async def test_the_usage_of_the_environments_key_can_be_asked_for(house: House) -> None:
    async with house.client() as client:
        answer = await client.get(f"{ADMIN}/usage?key=TRIVEC_API_KEY")
    assert (answer.status_code, answer.json()["data"]) == (200, [])


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        pytest.param("by=hour", 400, "by", id="no-such-sum"),
        pytest.param("since=yesterday", 400, "since", id="no-instant"),
        pytest.param("form=week", 400, "form", id="unknown-parameter"),
        pytest.param("key=nobody", 404, None, id="no-such-key"),
    ],
)
async def test_a_question_about_usage_that_makes_no_sense_is_refused(
    house: House, query: str, status: int, param: str | None
) -> None:
    async with house.client() as client:
        response = await client.get(f"{ADMIN}/usage?{query}")
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


LIMITED = {
    "models": [MODEL],
    "requests_per_minute": 60,
    "tokens_per_minute": 1000,
    "expires": "2999-01-01T00:00:00Z",
}


@pytest.mark.parametrize(
    ("more", "param"),
    [
        pytest.param({}, None, id="as-much-as-its-own"),
        pytest.param({"requests_per_minute": 1}, None, id="less"),
        pytest.param({"models": None}, "models", id="every-model"),
        pytest.param({"models": [MODEL, "other"]}, "models", id="another-model"),
        pytest.param({"requests_per_minute": None}, "requests_per_minute", id="no-rpm"),
        pytest.param({"requests_per_minute": 61}, "requests_per_minute", id="more-rpm"),
        pytest.param({"tokens_per_minute": None}, "tokens_per_minute", id="no-tpm"),
        pytest.param({"expires": None}, "expires", id="no-end"),
        pytest.param({"expires": "2999-01-02T00:00:00Z"}, "expires", id="a-later-end"),
    ],
)
async def test_a_limited_admin_key_makes_none_that_may_do_more(
    house: House, more: dict[str, object], param: str | None
) -> None:
    async with house.client() as client:
        limited = await create(client, name="limited", scopes=["admin"], **LIMITED)
    asked = {"name": "made", "scopes": ["embed", "admin"], **LIMITED, **more}
    async with house.client(limited["key"]) as client:
        answer = await client.post(f"{ADMIN}/keys", json=asked)
    if param is None:
        assert answer.status_code == 200, answer.text
        return
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (403, "insufficient_scope", param)


@pytest.mark.parametrize("deed", ["rotate", "revoke"])
async def test_a_limited_admin_key_takes_over_none_that_may_do_more(
    house: House, deed: str
) -> None:
    async with house.client() as client:
        limited = await create(client, name="limited", scopes=["admin"], **LIMITED)
    async with house.client(limited["key"]) as client:
        other = await client.post(f"{ADMIN}/keys/all/{deed}")
        own = await client.post(f"{ADMIN}/keys/limited/{deed}")
    assert other.status_code == 403, other.text
    assert own.status_code == 200, own.text
