"""One budget of bytes for bodies, vectors and answers: who is refused, and that all is given back."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest
from starlette.types import Message, Scope
from tests.api.house import MODEL, House

from trivec.api import ByteBudget, budget_bytes
from trivec.api.inference import LARGE_TOKENIZE_MAX
from trivec.api.memory import MemoryReservation
from trivec.api.middleware import chunk_s_max
from trivec.core.errors import AnswerTooLarge, Overloaded
from trivec.core.types import Sequences
from trivec.settings import MEBIBYTE, HttpLimits, Settings

BUDGET = 8 * MEBIBYTE
JSON = {"content-type": "application/json"}


@pytest.fixture
def house() -> Iterator[House]:
    house = House(memory=ByteBudget(BUDGET, connections_max=16))
    yield house
    house.close()


def body_of(byte_count: int) -> bytes:
    """A body of about *byte_count*, refused for its unknown field once it is read."""
    return json.dumps({"model": MODEL, "input": "a", "padding": "x" * byte_count}).encode()


class HalfSent:
    """A request whose body stops at *byte_count* bytes of 8 MiB."""

    def __init__(self, house: House, byte_count: int) -> None:
        self._house = house
        self._left = byte_count
        self.stalls = asyncio.Event()
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self.sent:  # it reads the refusal and goes
            return {"type": "http.disconnect"}
        if not self._left:
            self.stalls.set()
            await asyncio.Event().wait()
        piece = b"a" * min(self._left, 65_536)
        self._left -= len(piece)
        return {"type": "http.request", "body": piece, "more_body": True}

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    async def run(self) -> None:
        scope: Scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/embeddings",
            "query_string": b"",
            "headers": [
                (b"authorization", f"Bearer {self._house.key}".encode()),
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % (8 * MEBIBYTE)),
            ],
        }
        await self._house.app(scope, self.receive, self.send)

    @property
    def refusal(self) -> tuple[int, dict[bytes, bytes]]:
        return self.sent[0]["status"], dict(self.sent[0]["headers"])


async def test_a_half_sent_body_gives_way_to_a_smaller_request(house: House) -> None:
    crowd = [HalfSent(house, 9 * MEBIBYTE // 4) for _ in range(2)]
    tasks = [asyncio.create_task(one.run()) for one in crowd]
    await asyncio.gather(*[one.stalls.wait() for one in crowd])
    assert house.memory.used_bytes >= 4 * MEBIBYTE
    async with house.client() as client:
        answer = await client.post("/embeddings", content=body_of(MEBIBYTE // 3), headers=JSON)
        assert answer.status_code == 400, "it was read, and refused for its field"
    refused = [one for one in crowd if one.sent]
    assert len(refused) == 1
    status, headers = refused[0].refusal
    assert (status, int(headers[b"retry-after"]) >= 5) == (503, True)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert house.memory.used_bytes == 0


async def test_a_spent_budget_refuses_what_is_large_and_serves_what_is_small(house: House) -> None:
    others = MemoryReservation(house.memory)
    others.add(house.memory.large_bytes_max)
    async with house.client() as client:
        large = await client.post("/embeddings", content=body_of(MEBIBYTE), headers=JSON)
        small = await client.post("/embeddings", json={"model": MODEL, "input": "a"})
        many = {"model": MODEL, "input": ["a"] * 2000, "output_type": "dense&multi"}
        answer = await client.post("/embeddings", json=many)
    assert small.status_code == 200
    for refused in (large, answer):
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert 5 <= int(refused.headers["retry-after"]) <= 10
    assert house.model.embedded[1:] == [], "the large answer was refused before it was computed"
    others.shrink(0)
    assert house.memory.used_bytes == 0


async def test_texts_of_token_ids_are_reserved_for_too(house: House) -> None:
    others = MemoryReservation(house.memory)
    others.add(house.memory.large_bytes_max - MEBIBYTE)
    async with house.client() as client:
        many = {"ids": [[5] * 20_000]}
        refused = await client.post("http://house/decode", json=many)
        others.shrink(0)
        answer = await client.post("http://house/decode", json=many)
    assert (refused.status_code, refused.json()["error_type"]) == (503, "Overloaded")
    assert len(answer.json()[0]) == 20_000
    assert house.memory.used_bytes == 0


def test_all_connections_can_hold_a_small_request_whatever_large_ones_hold() -> None:
    budget = ByteBudget(BUDGET, connections_max=16)
    MemoryReservation(budget).add(budget.large_bytes_max)
    with pytest.raises(Overloaded):
        MemoryReservation(budget).add(budget.small_bytes + 1)
    for _ in range(16):
        MemoryReservation(budget).add(budget.small_bytes)
    assert budget.used_bytes <= budget.bytes_max


def test_bodies_of_one_size_do_not_push_each_other_out() -> None:
    budget = ByteBudget(BUDGET)
    refused: list[Exception] = []
    first, second = MemoryReservation(budget), MemoryReservation(budget)
    for one in (first, second):
        budget.arriving[one] = refused.append
    first.add(budget.large_bytes_max * 2 // 3)
    with pytest.raises(Overloaded):
        second.add(budget.large_bytes_max // 2)
    assert refused == []


def test_what_can_never_fit_is_not_told_to_come_back() -> None:
    budget = ByteBudget(BUDGET)
    with pytest.raises(AnswerTooLarge):
        MemoryReservation(budget).add(budget.large_bytes_max + 1, is_response=True)


@pytest.mark.parametrize(
    ("given", "processes", "machine_mib", "found_mib"),
    [
        pytest.param(None, 1, 16_384, 512, id="at-most-512-MiB"),
        pytest.param(None, 1, 1_024, 256, id="a-fourth-of-a-small-machine"),
        pytest.param(None, 4, 16_384, 128, id="shared-out-between-processes"),
        pytest.param(2_048, 1, 16_384, 2_048, id="the-setting"),
        pytest.param(None, 64, 1_024, 64, id="never-less-than-a-few-bodies"),
    ],
)
def test_the_budget_of_a_process(
    given: int | None, processes: int, machine_mib: int, found_mib: int
) -> None:
    limits = HttpLimits(memory_bytes_max=given * MEBIBYTE if given else None)
    settings = Settings(http=limits, api_processes=processes)
    found = budget_bytes(settings, machine_bytes=machine_mib * MEBIBYTE)
    assert found == found_mib * MEBIBYTE


@pytest.mark.parametrize(
    ("elapsed_s", "sent_bytes", "left_s"),
    [
        pytest.param(0.0, 1_000, 10.0, id="a-piece-has-its-own-bound"),
        pytest.param(10.0, 1_000, 1.0, id="all-pieces-have-a-rate"),
        pytest.param(60.0, 1_000, 0.0, id="too-slow"),
        pytest.param(60.0, 100_000, 10.0, id="long-and-quick-enough"),
    ],
)
def test_a_slow_reader_has_less_and_less_time(
    elapsed_s: float, sent_bytes: int, left_s: float
) -> None:
    limits = HttpLimits(answer_chunk_s_max=10.0, answer_bytes_per_s_min=1_000)
    assert chunk_s_max(limits, elapsed_s=elapsed_s, sent_bytes=sent_bytes) == left_s


async def test_large_texts_are_tokenised_one_request_after_another(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivec.api.context.WATCH_AFTER_S", 0.0)
    house.memory.__init__()  # type: ignore[misc] # room for all of them
    inner = house.model.tokenize
    may_go_on = asyncio.Event()
    at_once = most = 0
    asking: list[asyncio.Task[httpx.Response]] = []
    too_many_watchers: list[int] = []

    async def held(*args: object, **kwargs: object) -> Sequences:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await may_go_on.wait()
        for _ in range(20):  # turns of the loop, in which a second watcher would start
            await asyncio.sleep(0)
        watchers = [one for one in asyncio.all_tasks() if one.get_name() == "client-watch"]
        too_many_watchers.append(len(watchers) - sum(not one.done() for one in asking))
        at_once -= 1
        return await inner(*args, **kwargs)  # type: ignore[arg-type] # passed on

    monkeypatch.setattr(house.model, "tokenize", held)
    body = {"model": MODEL, "input": ["x" * 100] * 700}
    async with house.client() as client:
        asking += [
            asyncio.create_task(client.post("/tokenize", json=body))
            for _ in range(LARGE_TOKENIZE_MAX + 3)
        ]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED, timeout=60)
        may_go_on.set()
        answers = [answer.status_code for answer in await asyncio.gather(*asking)]
    assert most == 1
    assert max(too_many_watchers) <= 0
    assert (answers.count(200), answers.count(503)) == (LARGE_TOKENIZE_MAX, 3)
    assert house.memory.used_bytes == 0
