"""The Batches API: what becomes of the lines of a file, and of a batch that does not get to its end."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import httpx
import pytest
from tests.api.house import MODEL, PLAIN_MODEL, READY, RERANKER, House

from trivec.accounts import ANONYMOUS, KeyPlan, RateLimits
from trivec.api import AppState, answer_line
from trivec.core.errors import EngineFault, Overloaded
from trivec.core.events import LinesWaiting, ShardFinished
from trivec.jobs import batches as jobs
from trivec.jobs import records
from trivec.jobs.files import FileStorage, FileWriter
from trivec.settings import BatchLimits

EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"
ENDED = {"completed", "failed", "cancelled", "expired"}
DAY_S = 24 * 3600
Json = dict[str, Any]


def line(custom_id: object, text: object = "hello", url: str = EMBEDDINGS, **more: object) -> Json:
    body = {"model": MODEL, "input": text}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**body, **more}}


def as_file(lines: Sequence[Mapping[str, object]]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


class Client:
    """What a client of the API does, in a word each."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self.http = http

    async def create(
        self, lines: Sequence[Mapping[str, object]] | bytes, endpoint: str = EMBEDDINGS, **more: Any
    ) -> Json:
        content = lines if isinstance(lines, bytes) else as_file(lines)
        form = {"purpose": "batch"}
        file = await self.http.post("/files", files={"file": ("in.jsonl", content)}, data=form)
        asked = {"completion_window": "24h", "endpoint": endpoint, **more}
        made = await self.http.post("/batches", json={"input_file_id": file.json()["id"], **asked})
        assert made.status_code == 200, made.text
        batch: Json = made.json()
        return batch

    async def get(self, batch: Json) -> Json:
        found: Json = (await self.http.get(f"/batches/{batch['id']}")).json()
        return found

    async def until(self, batch: Json, wanted: Callable[[Json], bool]) -> Json:
        """The batch as soon as it is *wanted*; whoever works on it has the loop meanwhile."""
        async with asyncio.timeout(60):
            while not wanted(found := await self.get(batch)):  # noqa: ASYNC110 - as clients do
                await asyncio.sleep(0.01)
        return found

    async def ended(self, batch: Json) -> Json:
        return await self.until(batch, lambda one: one["status"] in ENDED)

    async def lines(self, file_id: str | None) -> list[Json]:
        if file_id is None:
            return []
        content = (await self.http.get(f"/files/{file_id}/content")).content
        return [json.loads(one) for one in content.splitlines()]


@asynccontextmanager
async def working(house: House, count: int = 1) -> AsyncIterator[Client]:
    """A client of *house*, and so many servers at work on its batches."""
    runners = [asyncio.create_task(house.batch_runner().run()) for _ in range(count)]
    async with house.client() as http:
        try:
            yield Client(http)
        finally:
            house.open_gates()
            for runner in runners:
                runner.cancel()
            await asyncio.wait(runners)


@pytest.fixture
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    house = House(**getattr(request, "param", {}))
    yield house
    house.close()


def limited(**limits: Any) -> Any:
    return pytest.param({"batch_limits": BatchLimits(**limits)}, id="limited")


async def test_each_line_is_answered_as_its_endpoint_would_and_billed_once(house: House) -> None:
    lines = [line(f"c{i}", f"text {i}") for i in range(7)]
    lines[3]["body"]["dimensions"] = 10_000
    async with working(house) as client:
        batch = await client.ended(await client.create(lines, metadata={"a": "b"}))
        output = await client.lines(batch["output_file_id"])
        error = await client.lines(batch["error_file_id"])
        direct = (await client.http.post("/embeddings", json=lines[5]["body"])).json()
        file = (await client.http.get(f"/files/{batch['output_file_id']}")).json()
    assert (batch["status"], batch["metadata"], batch["model"]) == ("completed", {"a": "b"}, MODEL)
    assert batch["request_counts"] == {"total": 7, "completed": 6, "failed": 1}
    assert (file["purpose"], file["filename"]) == ("batch_output", f"{batch['id']}_output.jsonl")
    by_id = {one["custom_id"]: one for one in output}
    assert sorted(by_id) == ["c0", "c1", "c2", "c4", "c5", "c6"]
    assert by_id["c5"]["response"]["body"] == direct
    assert (by_id["c5"]["error"], by_id["c5"]["response"]["status_code"]) == (None, 200)
    [bad] = error
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("c3", 400)
    assert bad["response"]["body"]["error"]["param"] == "dimensions"
    assert bad["error"]["message"] == bad["response"]["body"]["error"]["message"]
    tokens = sum(one["response"]["body"]["usage"]["total_tokens"] for one in output)
    assert batch["usage"]["total_tokens"] == batch["usage"]["input_tokens"] == tokens
    [finished] = [event for event in house.heard.events if isinstance(event, ShardFinished)]
    assert (finished.completed, finished.failed, finished.token_count) == (6, 1, tokens)
    assert LinesWaiting(0) in house.heard.events


async def test_a_server_that_stops_leaves_no_task_behind(house: House) -> None:
    before = asyncio.all_tasks()
    async with working(house) as client:
        await client.ended(await client.create([line("a")]))
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("house", [{"has_rerankers": True}], indirect=True)
async def test_lines_may_rerank(house: House) -> None:
    body = {"model": RERANKER, "query": "a", "documents": ["b", "a"]}
    asked = {"custom_id": "one", "method": "POST", "url": RERANK, "body": body}
    async with working(house) as client:
        batch = await client.ended(await client.create([asked], RERANK))
        [found] = await client.lines(batch["output_file_id"])
        direct = (await client.http.post("/rerank", json=body)).json()
    assert found["response"]["body"]["results"] == direct["results"]


@pytest.mark.parametrize("url", [EMBEDDINGS, RERANK])
async def test_lines_wait_in_a_queue_that_is_full_and_are_not_refused(
    house: House, url: str
) -> None:
    house.model.room_tokens = 1
    texts = {"query": "a", "documents": ["b", "a"]} if url == RERANK else {"input": "a"}
    asked = {"custom_id": "one", "method": "POST", "url": url, "body": {"model": MODEL, **texts}}
    async with working(house) as client:
        batch = await client.ended(await client.create([asked], url))
    assert batch["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert len(house.model.embedded) == 1


BAD_FILES = [
    pytest.param(b"not json\n", ("invalid_json_line", 1, None), id="not-jsonl"),
    pytest.param(b'{"custom_id": "a"', ("invalid_json_line", 1, None), id="cut-off"),
    pytest.param(b"\xff\xfe\n", ("invalid_json_line", 1, None), id="not-utf8"),
    pytest.param(b"", ("empty_file", None, None), id="empty"),
    pytest.param(b"\n \n", ("empty_file", None, None), id="blank"),
    pytest.param([line("a"), line("a")], ("duplicate_custom_id", 2, "custom_id"), id="twice"),
    pytest.param([line("")], ("invalid_custom_id", 1, "custom_id"), id="no-id"),
    pytest.param([line(7)], ("missing_required_parameter", 1, "custom_id"), id="id-no-text"),
    pytest.param(
        [line("a"), line("b", url="/v1/chat/completions")],
        ("invalid_url", 2, "url"),
        id="wrong-url",
    ),
    pytest.param(
        [line("a") | {"method": "GET"}], ("invalid_method", 1, "method"), id="wrong-method"
    ),
    pytest.param(
        [line("a"), line("b", model=PLAIN_MODEL)],
        ("mismatched_model", 2, "body.model"),
        id="mixed-models",
    ),
    pytest.param([line("a", model="nope")], ("model_not_found", 1, "body.model"), id="no-model"),
    pytest.param(
        [{"custom_id": "a", "method": "POST", "url": EMBEDDINGS}],
        ("missing_required_parameter", 1, "body"),
        id="no-body",
    ),
    pytest.param([line("a", model=3)], ("missing_required_parameter", 1, "body.model"), id="model"),
    pytest.param([3], ("missing_required_parameter", 1, None), id="no-object"),
    pytest.param(
        [line(f"{i}", ["x"] * 25_000) for i in range(3)], ("too_many_inputs", 3, None), id="inputs"
    ),
    pytest.param(as_file([line("a")]) + b"x" * 9_000_000, ("line_too_long", 2, None), id="long"),
]


@pytest.mark.parametrize("before", [b"", b"\r\n"], ids=["at-a-line", "at-a-blank-line"])
async def test_a_byte_order_mark_before_the_first_line_is_skipped(
    house: House, before: bytes
) -> None:
    content = b"\xef\xbb\xbf" + before + as_file([line("a"), line("b")])
    async with working(house) as client:
        batch = await client.ended(await client.create(content))
        lines = await client.lines(batch["output_file_id"])
    assert sorted(one["custom_id"] for one in lines) == ["a", "b"]


@pytest.mark.parametrize(("content", "expected"), BAD_FILES)
async def test_a_file_with_a_fault_fails_with_the_line_before_anything_runs(
    house: House, content: Any, expected: tuple[str, int | None, str | None]
) -> None:
    async with working(house) as client:
        batch = await client.ended(await client.create(content))
    assert (batch["status"], batch["output_file_id"]) == ("failed", None)
    found = batch["errors"]["data"][0]
    assert (found["code"], found["line"], found["param"]) == expected
    assert found["message"]
    assert house.model.embedded == []


async def test_every_fault_is_listed_with_blank_lines_counted_up_to_a_hundred(house: House) -> None:
    content = as_file([line("a")]) + b"\n" + as_file([line("a", url="/x")]) + b"no\n" * 200
    async with working(house) as client:
        batch = await client.ended(await client.create(content))
    found = [(one["code"], one["line"]) for one in batch["errors"]["data"]]
    assert found[:3] == [("duplicate_custom_id", 3), ("invalid_url", 3), ("invalid_json_line", 4)]
    assert found[-1][0] == "too_many_errors"
    assert len(found) == jobs.ERRORS_MAX + 1


async def test_blank_lines_count_among_the_bytes_that_are_read_of_a_shard(house: House) -> None:
    content = as_file([line("a")]) + b"\n" * jobs.SHARD_BYTES + as_file([line("b")])
    async with working(house) as client:
        batch = await client.ended(await client.create(content))
        output = await client.lines(batch["output_file_id"])
    assert {one["custom_id"] for one in output} == {"a", "b"}
    ran = [event.completed for event in house.heard.events if isinstance(event, ShardFinished)]
    assert ran == [1, 1]


async def test_more_than_fifty_thousand_lines_are_refused(house: House) -> None:
    async with working(house) as client:
        content = b"".join(
            b'{"custom_id":"%d","method":"POST","url":"/v1/embeddings",'
            b'"body":{"model":"baai/bge-m3","input":"a"}}\n' % i
            for i in range(50_001)
        )
        batch = await client.ended(await client.create(content))
    codes = [(one["code"], one["line"]) for one in batch["errors"]["data"]]
    assert ("too_many_requests", 50_001) in codes


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"completion_window": "1d"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "337h"}, "completion_window"),
        ({"completion_window": "24h\n"}, "completion_window"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {str(i): "" for i in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 60}}, "output_expires_after"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
async def test_a_batch_that_is_asked_for_wrongly_is_refused(
    house: House, change: Json, param: str
) -> None:
    async with house.client() as http:
        asked = {"input_file_id": "file-1", "endpoint": EMBEDDINGS, "completion_window": "24h"}
        answer = await http.post("/batches", json={**asked, **change})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].partition(".")[0].partition("[")[0] == param


@pytest.mark.parametrize("hours", [1, 24, 100, 299, 307, 319, 336])
async def test_a_window_may_have_any_number_of_hours(house: House, hours: int) -> None:
    async with house.client() as http:
        batch = await Client(http).create([line("a")], completion_window=f"{hours}h")
    assert batch["completion_window"] == f"{hours}h"
    assert batch["expires_at"] - batch["created_at"] == 3600 * hours


async def test_another_keys_file_and_batch_do_not_exist(house: House) -> None:
    async with (
        working(house) as client,
        house.client(await house.new_key_async("other", RateLimits())) as other,
    ):
        batch = await client.ended(await client.create([line("a")]))
        asked = {"endpoint": EMBEDDINGS, "completion_window": "24h"}
        answers = [
            await other.post("/batches", json={"input_file_id": batch["input_file_id"], **asked}),
            await other.get(f"/batches/{batch['id']}"),
            await other.post(f"/batches/{batch['id']}/cancel"),
            await other.get(f"/files/{batch['output_file_id']}/content"),
        ]
        listed = (await other.get("/batches")).json()
        output = {"input_file_id": batch["output_file_id"], **asked}
        again = await client.http.post("/batches", json=output)
    assert {answer.status_code for answer in answers} == {404}
    assert listed == {
        "object": "list",
        "data": [],
        "first_id": None,
        "last_id": None,
        "has_more": False,
    }
    assert (again.status_code, again.json()["error"]["param"]) == (400, "input_file_id")


async def test_batches_are_listed_in_pages(house: House) -> None:
    async with house.client() as http:
        ids = []
        for _ in range(3):
            ids.append((await Client(http).create([line("a")]))["id"])
            house.clock.move(1)
        first = (await http.get("/batches?limit=2")).json()
        second = (await http.get(f"/batches?limit=2&after={first['last_id']}")).json()
        wrong = await http.get("/batches?limit=101")
    assert [one["id"] for one in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"], wrong.status_code) == (True, False, 400)


async def test_one_batch_more_than_a_key_may_have_open_is_the_keys_own_limit(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "OPEN_BATCHES_MAX", 1)
    async with house.client() as http:
        batch = await Client(http).create([line("a")])
        asked = {name: batch[name] for name in ("input_file_id", "endpoint", "completion_window")}
        refused = await http.post("/batches", json=asked)
    error = refused.json()["error"]
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "60")
    assert (error["type"], error["code"]) == ("requests", "rate_limit_exceeded")
    assert "batches that have not ended: limit 1, requested 2" in error["message"]


def in_shards_of(count: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(jobs, "SHARD_LINES", count)


async def test_cancelled_in_the_middle_it_keeps_what_is_done(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards_of(2, monkeypatch)
    async with working(house) as client:
        batch = await client.create([line(f"c{i}", f"text {i}") for i in range(6)])
        embed, seen = house.model.embed, 0

        async def held(*given: Any, **more: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen > 2:
                await asyncio.Event().wait()
            return await embed(*given, **more)

        monkeypatch.setattr(house.model, "embed", held)
        await client.until(batch, lambda one: one["request_counts"]["completed"] == 2 and seen > 2)
        cancelling = (await client.http.post(f"/batches/{batch['id']}/cancel")).json()
        reading = await client.http.delete(f"/files/{batch['input_file_id']}")
        batch = await client.ended(batch)
        output = await client.lines(batch["output_file_id"])
        again = await client.http.post(f"/batches/{batch['id']}/cancel")
        after = await client.http.delete(f"/files/{batch['input_file_id']}")
    assert (cancelling["status"], batch["status"]) == ("cancelling", "cancelled")
    assert batch["cancelled_at"] is not None
    assert batch["request_counts"] == {"total": 6, "completed": 2, "failed": 0}
    assert sorted(one["custom_id"] for one in output) == ["c0", "c1"]
    assert again.json()["status"] == "cancelled"
    assert (reading.status_code, after.status_code) == (400, 200)  # it was being read


async def test_a_batch_that_has_ended_cannot_be_cancelled(house: House) -> None:
    async with working(house) as client:
        batch = await client.ended(await client.create([line("a")]))
        answer = await client.http.post(f"/batches/{batch['id']}/cancel")
    assert answer.status_code == 400
    assert "completed" in answer.json()["error"]["message"]


async def test_when_its_window_is_over_the_lines_that_never_ran_are_errors(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards_of(2, monkeypatch)
    async with working(house) as client:
        embed = house.model.embed
        entered = asyncio.Event()

        async def held(*given: Any, **more: Any) -> Any:
            if len(house.model.embedded) == 2:
                entered.set()
                await asyncio.Event().wait()
            return await embed(*given, **more)

        monkeypatch.setattr(house.model, "embed", held)
        batch = await client.create(
            [line(f"c{i}", f"text {i}") for i in range(5)],
            output_expires_after={"anchor": "created_at", "seconds": 3600},
        )
        await entered.wait()
        house.clock.move(DAY_S)
        wake(house)
        batch = await client.ended(batch)
        output = await client.lines(batch["output_file_id"])
        error = await client.lines(batch["error_file_id"])
        file = (await client.http.get(f"/files/{batch['output_file_id']}")).json()
    assert (batch["status"], batch["expires_at"]) == ("expired", 1_700_000_000 + DAY_S)
    assert sorted(one["custom_id"] for one in output) == ["c0", "c1"]
    assert sorted(one["custom_id"] for one in error) == ["c2", "c3", "c4"]
    assert {one["error"]["code"] for one in error} == {"batch_expired"}
    assert {one["response"] for one in error} == {None}
    assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
    assert file["expires_at"] == file["created_at"] + 3600


def wake(house: House) -> None:
    """Let the servers look at once at what a moved clock has changed."""
    house.batches.changed.set()


@pytest.mark.parametrize("house", [limited(tokens_per_day=30)], indirect=True)
async def test_what_is_beyond_the_days_allowance_waits_for_the_next(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards_of(2, monkeypatch)
    async with working(house) as client:
        lines = [line(f"c{i}", "x" * 8) for i in range(6)]  # 10 tokens each
        batch = await client.create(lines, completion_window="48h")
        await client.until(batch, lambda one: one["request_counts"]["completed"] == 4)
        for _ in range(3):  # it has looked again, and found nothing that it may do
            await asyncio.to_thread(house.batches.store.expire_batches)
            found = await asyncio.to_thread(house.batches.store.lease, [MODEL])
            assert found is None
        house.clock.move(DAY_S + 1)
        wake(house)
        batch = await client.ended(batch)
    assert batch["request_counts"]["completed"] == 6


async def test_lines_draw_on_no_rate_limit_of_the_key(house: House) -> None:
    key = await house.new_key_async("slow", RateLimits(1, 100))
    async with working(house), house.client(key) as http:
        client = Client(http)
        batch = await client.ended(await client.create([line(f"{i}") for i in range(30)]))
        answer = await http.post("/embeddings", json=line("")["body"])
    assert batch["request_counts"]["completed"] == 30
    assert answer.status_code == 200
    assert answer.headers["x-ratelimit-remaining-tokens"] == "93"


async def test_a_refusal_for_now_is_tried_again_and_a_fault_of_ours_is_an_answer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, tries = house.model.embed, 0

    async def faulty(sequences: Any, *given: Any, **more: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise Overloaded("The texts being tokenised are many.", retry_after_s=0.1)
        result = await embed(sequences, *given, **more)
        if len(sequences) == 2:
            raise EngineFault("a vector is not finite")
        return result

    monkeypatch.setattr(house.model, "embed", faulty)
    async with working(house) as client:
        batch = await client.ended(await client.create([line("a"), line("b", ["x", "y"])]))
        [bad] = await client.lines(batch["error_file_id"])
    assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    assert tries == 3
    assert (bad["custom_id"], bad["response"]["status_code"]) == ("b", 500)
    assert "not finite" not in json.dumps(bad)
    assert bad["error"]["code"] == "internal_error"


async def test_the_batch_of_a_key_that_is_revoked_is_cancelled(house: House) -> None:
    new = await house.accounts.create_key(KeyPlan("leaver"))
    async with house.client(new.plain) as http:
        batch = await Client(http).create([line("a")])
    await house.accounts.revoke_key("leaver")
    store = house.batches.store
    async with working(house):
        async with asyncio.timeout(60):
            while store.find_batch(new.key.id, batch["id"]).status != "cancelled":
                wake(house)
                await asyncio.sleep(0.01)
    assert house.model.embedded == []


async def test_a_keys_models_bound_its_batches(house: House) -> None:
    new = await house.accounts.create_key(KeyPlan("plain", models=frozenset({PLAIN_MODEL})))
    async with working(house), house.client(new.plain) as http:
        client = Client(http)
        batch = await client.ended(await client.create([line("a")]))
    assert batch["errors"]["data"][0]["code"] == "model_not_found"


async def test_what_a_server_that_died_has_left_of_shards_goes_with_the_batch(
    house: House, tmp_path: Path
) -> None:
    house.batches.files.storage = FileStorage(str(tmp_path))
    async with working(house) as client:
        batch = await client.ended(await client.create([line("a")]))
        [key_id] = os.listdir(tmp_path)
    left = FileWriter(house.batches.files.storage, key_id, f"{batch['id']}/00001-lost.output")
    await left.write(b"half a line")
    await left.close()
    house.clock.move(31 * DAY_S)  # its input has expired, too
    async with working(house) as client:
        await client.ended(await client.create([line("a")]))
    assert not {batch["id"], batch["input_file_id"]} & {*os.listdir(tmp_path / key_id)}


async def test_a_server_that_stops_leaves_its_shard_to_others_at_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered = asyncio.Event()

    async def held(*_: Any, **__: Any) -> Any:
        entered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(house.model, "embed", held)
    async with working(house) as client:
        batch = await client.create([line("a")])
        await entered.wait()
    leased = await asyncio.to_thread(house.batches.store.lease, [MODEL])
    assert leased is not None
    assert (leased[0].kind, leased[1].id, leased[1].completed) == ("run", batch["id"], 0)


async def half_done(house: House, folder: Path) -> Json:
    """A batch of two shards; what one of them has left was lost, and the other is to come."""
    house.batches.files.storage = FileStorage(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        in_shards_of(2, patch)
        embed, entered = house.model.embed, asyncio.Event()

        async def held(*given: Any, **more: Any) -> Any:
            if len(house.model.embedded) == 2:
                entered.set()
                await asyncio.Event().wait()
            return await embed(*given, **more)

        patch.setattr(house.model, "embed", held)
        async with working(house) as client:
            batch = await client.create([line(f"c{i}", f"text {i}") for i in range(4)])
            await entered.wait()
    [key_id] = os.listdir(folder)
    rmtree(folder / key_id / batch["id"])
    return batch


async def test_a_batch_whose_files_are_gone_waits_for_them_alone_and_ends_with_its_window(
    house: House, tmp_path: Path
) -> None:
    no_parts = await half_done(house, tmp_path)
    async with house.client() as http:
        no_input = await Client(http).create([line("a")])
    [key_id] = os.listdir(tmp_path)
    os.unlink(tmp_path / key_id / no_input["input_file_id"])
    async with working(house) as client:
        other = await client.ended(await client.create([line("a")]))
        waiting = await client.get(no_input)
        await client.until(no_parts, lambda one: one["status"] == "finalizing")
        house.clock.move(DAY_S)
        wake(house)
        no_input, no_parts = await client.ended(no_input), await client.ended(no_parts)
        output = await client.lines(no_parts["output_file_id"])
    assert other["status"] == "completed"
    assert (waiting["status"], no_input["status"]) == ("validating", "expired")
    assert no_parts["status"] == "completed"
    assert sorted(one["custom_id"] for one in output) == ["c2", "c3"]
    assert [one["code"] for one in no_parts["errors"]["data"]] == ["answers_lost"]


async def test_a_batch_whose_files_are_gone_can_be_cancelled(house: House, tmp_path: Path) -> None:
    batch = await half_done(house, tmp_path)
    async with house.client() as http:
        await http.post(f"/batches/{batch['id']}/cancel")
    async with working(house) as client:
        batch = await client.ended(batch)
    assert (batch["status"], batch["output_file_id"]) == ("cancelled", None)
    assert [one["code"] for one in batch["errors"]["data"]] == ["answers_lost"]


async def test_an_answers_memory_is_taken_until_it_is_written(house: House) -> None:
    app = AppState(
        house.embedders(), house.accounts, house.heard, house.clock, house.limits,
        health=lambda: READY, metrics=None, memory=house.memory,
    )  # fmt: skip
    body = json.dumps(line("a")["body"]).encode()
    async with answer_line(app, ANONYMOUS, EMBEDDINGS, body, request_id="r") as answer:
        assert house.memory.used_bytes >= len(answer.body)
    assert house.memory.used_bytes == 0


@pytest.mark.parametrize("house", [{"no_auth": True}], indirect=True)
async def test_without_keys_it_works_and_bills_nobody(house: House) -> None:
    async with working(house) as client:
        batch = await client.ended(await client.create([line("a", user="me")]))
    assert batch["status"] == "completed"
    assert batch["usage"]["total_tokens"] == 7


async def test_several_servers_share_the_work_and_answer_each_line_once(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_shards_of(3, monkeypatch)
    async with working(house, 3) as client:
        made = [
            await client.create([line(f"{b}-{i}", f"{b} {i}") for i in range(20)]) for b in range(3)
        ]
        ended = [await client.ended(batch) for batch in made]
        outputs = [await client.lines(batch["output_file_id"]) for batch in ended]
    for b, output in enumerate(outputs):
        assert sorted(one["custom_id"] for one in output) == sorted(f"{b}-{i}" for i in range(20))
    assert len(house.model.embedded) == 60
