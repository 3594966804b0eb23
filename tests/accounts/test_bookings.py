"""From letting a request in to billing it, through the room's own door."""

import asyncio
from collections.abc import Callable

import pytest
from tests.accounts.requests import acquire, caller_with, closing, opening, record, statuses
from tests.hand_clock import HandClock
from tests.support.memory_store import MemoryStore

from trivec.accounts import ANONYMOUS, FIXED, Accounts, RateLimits, UsageBy
from trivec.accounts.types import UsageLine, UsageQuery
from trivec.core.errors import (
    RateLimitExceeded,
    RequestTooLarge,
    StoreUnavailable,
)

Process = Callable[..., Accounts]


async def test_a_served_request_has_one_row_with_what_it_was(
    accounts: Accounts, store: MemoryStore, clock: HandClock
) -> None:
    booking = await acquire(accounts, FIXED, opening("r1"))
    await booking.reserve_tokens(7)
    await booking.close(closing(tokens=7, user="ada"))

    (row,) = store.rows
    assert (row.request_id, row.key_id, row.model) == ("r1", FIXED.id, "m")
    assert (row.input_count, row.token_count, row.status) == (1, 7, 200)
    assert (row.duration_us, row.time_us) == (250_000, int(clock.wall_s() * 1_000_000))
    assert row.user_digest is not None
    assert "ada" not in row.user_digest


async def test_the_row_is_there_before_close_returns(
    accounts: Accounts, store: MemoryStore
) -> None:
    bookings = [await acquire(accounts, FIXED, opening()) for _ in range(50)]

    async def close(n: int) -> None:
        await bookings[n].close(closing(tokens=n + 1))
        assert n + 1 in {row.token_count for row in store.rows}

    await asyncio.gather(*map(close, range(50)))
    assert len(store.rows) == 50


@pytest.mark.parametrize("status", [400, 429, 499, 500, 503])
async def test_a_failed_request_is_written_down_and_billed_nothing(
    accounts: Accounts, store: MemoryStore, status: int
) -> None:
    booking = await acquire(accounts, FIXED, opening())
    await booking.close(closing(status, tokens=7))

    assert not store.rows
    assert [(count.status, n) for count, n in store.counts.items()] == [(status, 1)]


async def test_a_request_that_was_never_opened_is_written_down_too(
    accounts: Accounts, store: MemoryStore
) -> None:
    caller = await caller_with(accounts, RateLimits(requests_per_minute=3))

    state = await record(accounts, caller, opening("r1"), closing(400, tokens=7))

    assert not store.rows
    assert statuses(store) == [400]
    assert state is not None
    assert state.remaining_requests == 3


async def test_an_anonymous_request_leaves_nothing(process: Process, store: MemoryStore) -> None:
    accounts = process(no_auth=True)
    booking = await acquire(accounts, ANONYMOUS, opening())
    await booking.reserve_tokens(10**9)
    await booking.close(closing())
    await record(accounts, ANONYMOUS, opening(), closing(400))

    assert statuses(store) == []
    assert booking.state is None


async def test_closing_twice_bills_once(accounts: Accounts, store: MemoryStore) -> None:
    booking = await acquire(accounts, FIXED, opening())
    await booking.close(closing())
    await booking.close(closing(500))

    assert [row.status for row in store.rows] == [200]


async def test_a_spent_allowance_refuses_and_says_which_and_until_when(
    accounts: Accounts, clock: HandClock
) -> None:
    caller = await caller_with(accounts, RateLimits(requests_per_minute=2))
    for _ in range(2):
        await acquire(accounts, caller, opening())

    with pytest.raises(RateLimitExceeded) as refusal:
        await acquire(accounts, caller, opening())

    assert (refusal.value.kind, refusal.value.retry_after_s) == ("requests", 30.0)
    clock.move(30)
    await acquire(accounts, caller, opening())


async def test_exact_tokens_are_reserved_before_the_work(accounts: Accounts) -> None:
    caller = await caller_with(accounts, RateLimits(tokens_per_minute=100))
    booking = await acquire(accounts, caller, opening())

    await booking.reserve_tokens(60)

    assert booking.state is not None
    assert booking.state.remaining_tokens == 40
    with pytest.raises(RateLimitExceeded, match="tokens"):
        await (await acquire(accounts, caller, opening())).reserve_tokens(41)


async def test_a_request_no_full_allowance_would_hold_must_be_made_smaller(
    accounts: Accounts,
) -> None:
    caller = await caller_with(accounts, RateLimits(tokens_per_minute=100))
    booking = await acquire(accounts, caller, opening())

    with pytest.raises(RequestTooLarge, match="101 tokens, max 100"):
        await booking.reserve_tokens(101)


@pytest.mark.parametrize(
    ("status", "remaining_requests", "remaining_tokens"),
    [
        pytest.param(200, 9, 93, id="a-success-keeps-what-it-used"),
        pytest.param(400, 9, 100, id="the-clients-fault-costs-the-request-but-no-tokens"),
        pytest.param(503, 10, 100, id="our-fault-costs-nothing"),
    ],
)
async def test_settling(
    accounts: Accounts, status: int, remaining_requests: int, remaining_tokens: int
) -> None:
    caller = await caller_with(accounts, RateLimits(10, 100))
    booking = await acquire(accounts, caller, opening())
    await booking.reserve_tokens(50)

    await booking.close(closing(status, tokens=7))

    state = booking.state
    assert state is not None
    assert (state.remaining_requests, state.remaining_tokens) == (
        remaining_requests,
        remaining_tokens,
    )


@pytest.mark.parametrize("moved_s", [3600, -3600], ids=["an-hour-ahead", "an-hour-back"])
async def test_moving_the_wall_clock_neither_refills_nor_starves(
    accounts: Accounts, clock: HandClock, moved_s: float
) -> None:
    caller = await caller_with(accounts, RateLimits(requests_per_minute=10))
    for _ in range(10):
        await acquire(accounts, caller, opening())

    clock.set_wall_by(moved_s)

    with pytest.raises(RateLimitExceeded):
        await acquire(accounts, caller, opening())
    clock.move(6)
    await acquire(accounts, caller, opening())


async def test_a_process_that_starts_with_its_wall_clock_set_back_goes_on_from_the_bucket(
    process: Process, clock: HandClock
) -> None:
    before = process()
    caller = await caller_with(before, RateLimits(requests_per_minute=10))
    for _ in range(10):
        await acquire(before, caller, opening())

    clock.set_wall_by(-3600)
    after = process()

    for accounts in (before, after):
        with pytest.raises(RateLimitExceeded):
            await acquire(accounts, caller, opening())
    for accounts in (after, before):
        clock.move(6)
        await acquire(accounts, caller, opening())


async def test_nothing_is_let_in_while_the_ledger_cannot_be_written(
    accounts: Accounts, store: MemoryStore
) -> None:
    booking = await acquire(accounts, FIXED, opening())
    store.broken = True

    with pytest.raises(StoreUnavailable):
        await booking.close(closing())

    assert not accounts.writable()
    assert "broken on purpose" in accounts.health().reason
    with pytest.raises(StoreUnavailable):
        await acquire(accounts, FIXED, opening())
    assert store.rows == []


async def test_a_failure_stays_that_failure_when_it_cannot_be_written_down(
    accounts: Accounts, store: MemoryStore
) -> None:
    store.broken = True

    assert await record(accounts, FIXED, opening(), closing(400)) is None
    with pytest.raises(StoreUnavailable):
        await record(accounts, FIXED, opening(), closing(200))


@pytest.mark.parametrize("times", [1, 3], ids=["once", "again-and-again"])
async def test_whoever_is_cancelled_while_its_row_is_written_goes_on_to_deliver_what_it_billed(
    accounts: Accounts, store: MemoryStore, times: int
) -> None:
    booking = await acquire(accounts, FIXED, opening())

    async def serve() -> str:
        await booking.close(closing())
        await asyncio.sleep(0)  # as sending an answer would
        return "delivered"

    task = asyncio.create_task(serve())
    await asyncio.sleep(0)
    for _ in range(times):
        task.cancel()

    assert await task == "delivered"
    assert task.cancelling() == 0
    assert statuses(store) == [200]


async def test_whoever_is_cancelled_and_could_not_be_billed_is_cancelled(
    accounts: Accounts, store: MemoryStore
) -> None:
    booking = await acquire(accounts, FIXED, opening())
    store.broken = True
    task = asyncio.create_task(booking.close(closing()))
    await asyncio.sleep(0)
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task
    assert store.rows == []


async def test_stopping_writes_what_was_handed_over(store: MemoryStore, clock: HandClock) -> None:
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    closings = [
        asyncio.create_task((await acquire(accounts, FIXED, opening())).close(closing()))
        for _ in range(20)
    ]
    await asyncio.sleep(0)

    accounts.stop()
    await asyncio.gather(*closings)

    assert len(store.rows) == 20


async def test_usage_names_the_keys(accounts: Accounts) -> None:
    caller = await caller_with(accounts, RateLimits())
    for someone in (caller, FIXED):
        await (await acquire(accounts, someone, opening())).close(closing())

    lines = await accounts.usage(UsageQuery(UsageBy.KEY))

    assert {line.name: line.tokens for line in lines} == {"t": 7, FIXED.name: 7}
    assert UsageLine(caller.id, "t", requests=1, failed=0, tokens=7) in lines
