"""What a request takes out of its key's allowance, in how many commits, and what it gives back."""

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from tests.accounts.requests import acquire, caller_with, closing, opening, statuses
from tests.hand_clock import HandClock
from tests.support.memory_store import MemoryStore

from trivec.accounts import FIXED, Accounts, Key, RateLimits, Reservation
from trivec.accounts.ledger import Committed, Entry, RecordUsage, Reserve
from trivec.accounts.rate_limits import Cost
from trivec.core.errors import RateLimitExceeded

Process = Callable[..., Accounts]


class WatchedStore(MemoryStore):
    """Remembers what each commit was asked for, and holds one with a reservation while it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.reserved: list[Cost] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.is_at_it = threading.Event()

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        costs = [entry.cost for entry in entries if isinstance(entry, Reserve)]
        self.reserved += costs
        if costs:
            self.is_at_it.set()
            assert self.may_go_on.wait(60)
        return super().commit(entries, now_us=now_us)


class HeldStore(MemoryStore):
    """Commits nothing until it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_go_on = threading.Event()

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        assert self.may_go_on.wait(60)
        return super().commit(entries, now_us=now_us)


@pytest.fixture
def watched(clock: HandClock) -> Iterator[tuple[WatchedStore, Accounts]]:
    store = WatchedStore()
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    yield store, accounts
    accounts.stop()


Watched = tuple[WatchedStore, Accounts]


@pytest.mark.parametrize("times", [1, 3], ids=["once", "again-and-again"])
async def test_whoever_leaves_while_the_store_lets_it_in_holds_nothing_afterwards(
    watched: Watched, times: int
) -> None:
    store, accounts = watched
    caller = await caller_with(accounts, RateLimits(requests_per_minute=1))
    booking = Reservation(accounts, caller, opening())
    store.may_go_on.clear()
    task = asyncio.create_task(booking.acquire())
    assert await asyncio.to_thread(store.is_at_it.wait, 60)
    for _ in range(times):
        task.cancel()
        await asyncio.sleep(0)
    assert not task.done(), "the store has not said yet what it did"
    store.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    await booking.close(closing(503))

    again = await acquire(accounts, caller, opening())

    assert again.state is not None
    assert again.state.remaining_requests == 0
    assert statuses(store) == [503]


async def open_with_tokens(accounts: Accounts, caller: Key, count: int) -> Reservation:
    booking = Reservation(accounts, caller, opening())
    await booking.acquire(tokens_follow=True)
    await booking.reserve_tokens(count)
    return booking


async def test_a_key_with_plenty_left_has_its_request_and_tokens_taken_in_one_commit(
    watched: Watched,
) -> None:
    store, accounts = watched
    caller = await caller_with(accounts, RateLimits(10, 100))
    await (await open_with_tokens(accounts, caller, 7)).close(closing(tokens=7))
    store.reserved.clear()

    booking = await open_with_tokens(accounts, caller, 7)
    await booking.close(closing(tokens=7))

    assert store.reserved == [Cost(requests=1, tokens=7)]
    assert booking.state is not None
    assert (booking.state.remaining_requests, booking.state.remaining_tokens) == (8, 86)


async def test_a_key_with_little_left_is_refused_before_its_tokens_are_counted(
    watched: Watched,
) -> None:
    store, accounts = watched
    caller = await caller_with(accounts, RateLimits(2, 100))
    for _ in range(2):
        await open_with_tokens(accounts, caller, 7)
    store.reserved.clear()

    with pytest.raises(RateLimitExceeded, match="requests"):
        await Reservation(accounts, caller, opening()).acquire(tokens_follow=True)

    assert store.reserved == [Cost(requests=1)]


async def test_what_another_process_took_meanwhile_is_not_there_to_be_taken(
    process: Process,
) -> None:
    one, other = process(), process()
    caller = await caller_with(one, RateLimits(10, 100))
    await open_with_tokens(one, caller, 7)
    for _ in range(9):
        await acquire(other, caller, opening())

    with pytest.raises(RateLimitExceeded, match="requests"):
        await open_with_tokens(one, caller, 7)


@pytest.mark.parametrize(
    ("status", "remaining"),
    [
        pytest.param(400, 8, id="the-clients-fault-costs-the-request"),
        pytest.param(503, 9, id="our-fault-costs-nothing"),
    ],
)
async def test_a_request_that_fails_before_its_tokens_are_counted(
    accounts: Accounts, status: int, remaining: int
) -> None:
    caller = await caller_with(accounts, RateLimits(10, 100))
    await open_with_tokens(accounts, caller, 7)
    booking = Reservation(accounts, caller, opening())
    await booking.acquire(tokens_follow=True)

    await booking.close(closing(status, tokens=0))

    assert booking.state is not None
    assert booking.state.remaining_requests == remaining


async def test_whoever_leaves_while_it_is_closed_is_written_down(watched: Watched) -> None:
    store, accounts = watched
    caller = await caller_with(accounts, RateLimits(10, 100))
    await open_with_tokens(accounts, caller, 7)
    booking = Reservation(accounts, caller, opening())
    await booking.acquire(tokens_follow=True)
    store.is_at_it.clear()
    store.may_go_on.clear()
    task = asyncio.create_task(booking.close(closing(400, tokens=0)))
    assert await asyncio.to_thread(store.is_at_it.wait, 60)
    task.cancel()
    await asyncio.sleep(0)
    store.may_go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert statuses(store) == [400]
    assert booking.state is not None
    assert booking.state.remaining_requests == 8


async def test_our_refusal_waits_for_no_disk_and_is_written_down(clock: HandClock) -> None:
    store = HeldStore()
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()

    await asyncio.wait_for(Reservation(accounts, FIXED, opening()).close(closing(503)), 60)

    assert not statuses(store)
    store.may_go_on.set()
    await asyncio.to_thread(accounts.stop)
    assert statuses(store) == [503]


@pytest.fixture
def eager_threads() -> Iterator[None]:
    """Whichever thread is ready runs at once: nothing stays together by luck."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("eager_threads")
async def test_those_who_come_together_are_committed_together(
    accounts: Accounts, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    commit = store.commit

    def counted(entries: Sequence[Entry], *, now_us: int) -> Committed:
        sizes.append(sum(isinstance(entry, RecordUsage) for entry in entries))
        return commit(entries, now_us=now_us)

    monkeypatch.setattr(store, "commit", counted)
    bookings = [await acquire(accounts, FIXED, opening()) for _ in range(200)]

    await asyncio.gather(*(booking.close(closing()) for booking in bookings))

    assert [size for size in sizes if size] == [200]
