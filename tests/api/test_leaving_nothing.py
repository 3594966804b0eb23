"""A request that is over is gone at once, however it ended: nothing of it waits for the collector.

A body is up to 8 MiB, and the collector of a serving process looks seldom (decision 0006).
"""

import asyncio
import gc
import json
import logging
import weakref
from collections.abc import Callable, Iterator

import pytest
from starlette.types import Message
from tests.api.house import MODEL, House

from trivec.accounts import RateLimits
from trivec.api.context import CONTEXT
from trivec.core.errors import EngineFault

TURNS = 10  # of the event loop; a cancelled task of a cancelled task takes a few
GOOD = json.dumps({"model": MODEL, "input": "hello"}).encode()


class Mark:
    """Is there for as long as what carries it: bytes themselves cannot be watched."""


class Body(bytes):
    """A body that carries a mark."""

    mark: Mark


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is in a cycle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def send_one(
    house: House, key: str, content: bytes, *, leaves: bool = False, headers: dict[str, str]
) -> "tuple[int | None, list[weakref.ref[object]]]":
    """The status that one request is answered with, and what it brought and held."""
    body = Body(content)
    body.mark = Mark()
    messages: list[Message] = [{"type": "http.request", "body": body}]
    sent: list[Message] = []
    forever = asyncio.Event()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        if not leaves:
            await forever.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    named = {"authorization": f"Bearer {key}", "content-type": "application/json", **headers}
    scope: dict[str, object] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/embeddings",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }
    held: list[weakref.ref[object]] = [weakref.ref(body.mark), weakref.ref(receive)]
    del body
    await asyncio.create_task(house.app(scope, receive, send))  # type: ignore[arg-type]
    assert CONTEXT in scope
    for _ in range(TURNS):  # what was cancelled meanwhile ends
        await asyncio.sleep(0)
    return (sent[0]["status"] if sent else None), held


Preparation = Callable[[House], None]


def nothing(house: House) -> None:
    """As it is."""


def fails(house: House) -> None:
    house.model.fault = EngineFault("lost")


def fails_strangely(house: House) -> None:
    house.model.fault = ValueError("something of a library")


def hangs(house: House) -> None:
    house.model.gate.clear()


def is_full(house: House) -> None:
    house.model.room_tokens = house.plain_model.room_tokens = 0


def cannot_write(house: House) -> None:
    house.store.broken = True


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    ("prepare", "content", "leaves", "headers", "status"),
    [
        pytest.param(nothing, GOOD, False, {}, 200, id="answered"),
        pytest.param(nothing, b"{", False, {}, 400, id="malformed"),
        pytest.param(fails, GOOD, False, {}, 500, id="our-fault"),
        pytest.param(fails_strangely, GOOD, False, {}, 500, id="a-fault-nobody-knows"),
        pytest.param(is_full, GOOD, False, {}, 503, id="the-queue-is-full"),
        pytest.param(cannot_write, GOOD, False, {}, 503, id="the-store-is-away"),
        pytest.param(hangs, GOOD, True, {}, None, id="the-client-left"),
        pytest.param(
            hangs, GOOD, False, {"x-stainless-read-timeout": "0.1"}, 503, id="past-its-deadline"
        ),
    ],
)
async def test_whatever_it_came_to_its_body_is_let_go(
    house: House,
    prepare: Preparation,
    content: bytes,
    leaves: bool,
    headers: dict[str, str],
    status: int | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL)  # what captures the log keeps the exception that is logged
    prepare(house)

    answered, held = await send_one(house, house.key, content, leaves=leaves, headers=headers)

    house.open_gates()
    house.model.fault = None
    assert answered == status
    assert [one() for one in held] == [None, None]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    ("allowance", "served"),
    [
        pytest.param(RateLimits(requests_per_minute=1), 1, id="no-request-left"),
        pytest.param(RateLimits(tokens_per_minute=7), 1, id="no-tokens-left"),
        pytest.param(RateLimits(100, 14), 2, id="no-tokens-left-for-both-at-once"),
    ],
)
async def test_a_refused_allowance_holds_no_body(
    house: House, allowance: RateLimits, served: int
) -> None:
    key = await house.new_key_async("limited", allowance)
    for _ in range(served):
        status, _ = await send_one(house, key, GOOD, headers={})
        assert status == 200

    status, held = await send_one(house, key, GOOD, headers={})

    assert status == 429
    assert [one() for one in held] == [None, None]
