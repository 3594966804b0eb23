"""Nodes that lease a key's rate limit from one store: together they let in what it allows."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from random import Random

import psycopg
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from psycopg.errors import UniqueViolation
from tests.accounts.postgres import PostgresServer
from tests.accounts.requests import acquire, caller_with, closing, opening
from tests.accounts.shelf import NOON_US, SECOND_US, a_key, a_row, postgres_shelf
from tests.hand_clock import HandClock
from tests.support.memory_store import MemoryStore

from trivec.accounts import (
    Accounts,
    Key,
    RateLimits,
    RateLimitState,
    Reservation,
    UsageBy,
    UsageQuery,
)
from trivec.accounts.accounts import SHARED_CALL_S
from trivec.accounts.leases import LEASE_US, Leases
from trivec.accounts.ledger import (
    CALL_S_MAX,
    RETRY_AFTER_S,
    RETRY_S,
    Committed,
    Entry,
    LedgerRow,
    LedgerWriter,
    RecordUsage,
    Reserve,
    Store,
    unavailable,
)
from trivec.accounts.rate_limits import NOTHING, Cost, Grant
from trivec.accounts.stores.engines import postgres_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.accounts.utc import MINUTE_US
from trivec.core.errors import RateLimitExceeded, StoreUnavailable

KEY = "key_a"


class Node:
    """The leases of one node over *store*; `has_died` keeps what it held."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._leases = Leases()
        self.asked = 0  # statements

    def lets_in(self, limits: RateLimits, cost: Cost, now_us: int) -> bool:
        wanted = Reserve(KEY, limits, cost)
        asked = self._leases.take(wanted, now_us=now_us)
        if not isinstance(asked, Reserve):
            return asked is None
        outcome = self._commit(asked, now_us)
        grant = outcome if isinstance(outcome, Grant) else None
        self._leases.put(asked, grant)
        if grant is not None:
            self._leases.see(KEY, grant.bucket, now_us=now_us)
        return grant is not None

    def expire(self, now_us: int) -> None:
        for unused in self._leases.expire(now_us=now_us):
            self._commit(unused, now_us)

    def state(self, now_us: int) -> RateLimitState | None:
        return self._leases.state(KEY, now_us=now_us)

    def _commit(self, entry: Entry, now_us: int) -> object:
        self.asked += 1
        return self._store.commit([entry], now_us=now_us).outcomes[0]


def a_store(limits: RateLimits) -> MemoryStore:
    store = MemoryStore()
    store.add_key(a_key("a", limits))
    return store


class SharedLimit(RuleBasedStateMachine):
    """Whatever nodes do and whenever they die, no window lets in more than the limit allows."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = RateLimits(requests_per_minute=6_000, tokens_per_minute=600_000)
        self.store = a_store(self.limits)
        self.now_us = NOON_US
        self.nodes = [Node(self.store) for _ in range(3)]
        self.let_in: list[tuple[int, Cost]] = []

    @rule(
        node=st.integers(0, 2),
        tokens=st.one_of(st.integers(1, 300), st.integers(1, 200_000)),
        times=st.integers(1, 200),
        step_us=st.sampled_from([0, 50, 1_000, 20_000]),
    )
    def ask(self, node: int, tokens: int, times: int, step_us: int) -> None:
        for _ in range(times):
            cost = Cost(1, tokens)
            if self.nodes[node].lets_in(self.limits, cost, self.now_us):
                self.let_in.append((self.now_us, cost))
            self.now_us += step_us

    @rule(milliseconds=st.integers(1, 20_000))
    def wait(self, milliseconds: int) -> None:
        self.now_us += milliseconds * 1_000
        for node in self.nodes:
            node.expire(self.now_us)

    @rule(node=st.integers(0, 2))
    def die(self, node: int) -> None:
        self.nodes[node] = Node(self.store)

    @precondition(lambda self: len(self.let_in) > 0)
    @invariant()
    def no_window_is_over_the_limit(self) -> None:
        for kind, limit in (("requests", 6_000), ("tokens", 600_000)):
            ends: dict[int, int] = {}
            total = 0
            for at_us, cost in self.let_in:
                total += getattr(cost, kind)
                ends[at_us] = total
            # Over every window [s, e]: burst + refill, and what was leased before it: under 1 %.
            slack = limit * LEASE_US // MINUTE_US
            best, before = -(10**18), 0
            for at_us, upto in ends.items():
                best = max(best, limit * (at_us - NOON_US) // MINUTE_US - before)
                used = upto + best - limit * (at_us - NOON_US) // MINUTE_US
                assert used <= limit + slack + 1, (kind, used)
                before = upto


SharedLimit.TestCase.settings = hypothesis_settings(
    max_examples=25, stateful_step_count=15, deadline=None
)
TestSharedLimit = SharedLimit.TestCase


@pytest.mark.parametrize("count", [1, 8])
def test_where_there_is_demand_nodes_let_in_all_but_a_hundredth(count: int) -> None:
    """At three times the limit, once the burst is spent."""
    limits = RateLimits(requests_per_minute=6_000, tokens_per_minute=300_000)
    store, dice = a_store(limits), Random(count)
    nodes = [Node(store) for _ in range(count)]
    used = [0, 0]  # tokens in the first minute, with the burst, and in the second
    for step in range(2 * 6_000):
        now_us = NOON_US + step * MINUTE_US // 6_000
        cost = Cost(1, dice.randrange(50, 250))
        if dice.choice(nodes).lets_in(limits, cost, now_us):
            used[step // 6_000] += cost.tokens
        if step % 50 == 0:
            for node in nodes:
                node.expire(now_us)

    assert 297_000 <= used[1] <= 303_000
    assert sum(used) <= 900_000, "the burst and two minutes"


def test_a_busy_key_asks_the_store_a_few_times_a_second_and_a_quiet_one_leases_nothing() -> None:
    limits = RateLimits(requests_per_minute=60_000)
    store = a_store(limits)
    node = Node(store)
    for step in range(10_000):  # ten seconds at 500 a second, half of what is refilled
        assert node.lets_in(limits, Cost(1), NOON_US + step * 1_000 * 2)
    assert node.asked < 20 * 10

    quiet = Node(store)
    for step in range(10):
        now_us = NOON_US + (60 + step) * SECOND_US
        quiet.lets_in(limits, Cost(1), now_us)
        quiet.expire(now_us + LEASE_US)
    assert quiet.asked == 10, "one statement a request, and nothing to give back"


def test_what_a_node_leases_and_does_not_use_comes_back_and_what_dies_is_used() -> None:
    limits = RateLimits(requests_per_minute=6_000)
    store = a_store(limits)
    node, other, late = Node(store), Node(store), Node(store)
    for step in range(100):
        node.lets_in(limits, Cost(1), NOON_US + step)
    shown = node.state(NOON_US + 100)
    assert shown is not None
    assert shown.remaining_requests == 5_900, "a client is shown what its node may use"
    other.lets_in(limits, Cost(1), NOON_US + 100)
    held = other.state(NOON_US + 100)
    assert held is not None
    assert held.remaining_requests is not None
    leased = 5_899 - held.remaining_requests
    assert 1 <= leased <= 60

    node.expire(NOON_US + LEASE_US + 100)

    late.lets_in(limits, Cost(1), NOON_US + LEASE_US + 100)
    again = late.state(NOON_US + LEASE_US + 100)
    assert again is not None
    assert again.remaining_requests == 5_898 + 50, "all of it, and half a second's refill"


def test_a_lease_that_is_over_lets_nobody_in() -> None:
    limits = RateLimits(requests_per_minute=6_000)
    node = Node(a_store(limits))
    for step in range(20):
        node.lets_in(limits, Cost(1), NOON_US + step)
    asked = node.asked

    node.lets_in(limits, Cost(1), NOON_US + 20)
    assert node.asked == asked, "leased"
    node.lets_in(limits, Cost(1), NOON_US + 20 + LEASE_US)

    assert node.asked == asked + 1


@pytest.fixture(scope="module")
def on_postgres(postgres: PostgresServer) -> Iterator[Store]:
    shelf = postgres_shelf(postgres)
    yield shelf.open()
    shelf.close()


def test_one_statement_on_postgres_decides_as_the_arithmetic_does(on_postgres: Store) -> None:
    """The same reservations, one after another and in groups, over the same times."""
    dice = Random(7)
    limited = [None, 1, 7, 100, 10_000, 10**9]

    def cost(limits: RateLimits, scale: int) -> Cost:
        most = (limits.requests_per_minute or 9, limits.tokens_per_minute or 9)
        return Cost(*(dice.randrange(scale * one // 4 + 2) for one in most))

    for number in range(30):
        key = a_key(f"twin{number}")
        limits = RateLimits(dice.choice(limited), dice.choice(limited))
        twin = MemoryStore()
        for store in (on_postgres, twin):
            store.add_key(key)
        now_us = NOON_US
        for _ in range(6):
            now_us += dice.choice([-SECOND_US, 0, 1, 999_999, 30 * SECOND_US, 10**12])
            group: list[Entry] = [
                Reserve(
                    key.id,
                    limits,
                    cost(limits, 2),
                    dice.choice([NOTHING, cost(limits, 4)]),
                    cost(limits, 1),
                )
                for _ in range(dice.randrange(1, 5))
            ]
            ours, theirs = (one.commit(group, now_us=now_us) for one in (on_postgres, twin))
            assert ours.now_us == theirs.now_us
            assert list(map(told, ours.outcomes)) == list(map(told, theirs.outcomes))


def told(outcome: object) -> object:
    return str(outcome) if isinstance(outcome, RateLimitExceeded) else outcome


@pytest.mark.parametrize(
    ("name", "rows", "error"),
    [
        pytest.param("a", [a_row("twice")] * 2, UniqueViolation, id="the-store-refuses-it"),
        pytest.param(
            "b",
            [a_row("good", key_id="key_b"), a_row("bad", key_id="key_b", status=None)],
            TypeError,
            id="a-bug-of-ours",
        ),
    ],
)
async def test_what_is_recorded_beside_an_entry_that_cannot_be_reserves_once(
    on_postgres: Store, clock: HandClock, name: str, rows: list[LedgerRow], error: type[Exception]
) -> None:
    """On Postgres reservations are committed by themselves, before what is recorded with them."""
    limits, key = RateLimits(requests_per_minute=10), a_key(name)
    on_postgres.add_key(key)
    writer = LedgerWriter(on_postgres, clock=clock, check=lambda: None)
    last = RecordUsage(a_row(f"after {name}", key_id=key.id))
    reserve = Reserve(key.id, limits, Cost(requests=1))
    group: list[Entry] = [reserve, *map(RecordUsage, rows), last]
    pending = [writer.submit(entry) for entry in group]
    writer.start()

    granted, *recorded = await asyncio.gather(*pending, return_exceptions=True)
    writer.stop()

    assert isinstance(granted, Grant)
    assert granted.bucket.requests_debt == MINUTE_US, "one request"
    assert [type(outcome) for outcome in recorded] == [type(None), error, type(None)]
    assert on_postgres.usage(UsageQuery(UsageBy.KEY, key_id=key.id))[0].requests == 2


def test_a_change_to_a_key_is_heard_at_once(on_postgres: Store) -> None:
    heard: queue.Queue[None] = queue.Queue()
    is_over = threading.Event()
    thread = threading.Thread(target=on_postgres.listen, args=(lambda: heard.put(None), is_over))
    thread.start()
    heard.get(timeout=60)  # it listens

    on_postgres.add_key(a_key("heard"))
    heard.get(timeout=60)
    on_postgres.change_key("key_heard", lambda key: replace(key, revoked_us=NOON_US))
    heard.get(timeout=60)

    assert heard.empty()
    is_over.set()
    on_postgres.interrupt()
    thread.join()


class Contended(MemoryStore):
    """Each commit waits a while for another process, which has written the bucket by then."""

    def __init__(self, clock: HandClock) -> None:
        super().__init__()
        self._clock = clock

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        self._clock.move(0.25)
        return super().commit(entries, now_us=now_us + 250_000)


async def test_waiting_for_another_process_is_not_taken_for_a_clock_that_is_late(
    clock: HandClock,
) -> None:
    accounts = Accounts(Contended(clock), clock=clock, secret=b"s" * 32)
    accounts.start()
    caller = await caller_with(accounts, RateLimits(1_000))
    for _ in range(10):
        await (await acquire(accounts, caller, opening())).close(closing())
    accounts.stop()

    assert abs(accounts.writer.now_us() - clock.wall_s() * 1e6) < 1_000


class CountedStore(MemoryStore):
    """Counts reservations; commits nothing while it is `broken`."""

    def __init__(self) -> None:
        super().__init__()
        self.reserves: list[Reserve] = []

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        committed = super().commit(entries, now_us=now_us)
        self.reserves += [one for one in entries if isinstance(one, Reserve)]
        return committed


@pytest.fixture
def node(clock: HandClock) -> "Iterator[Callable[[MemoryStore], Accounts]]":
    """Starts the accounts of another node over a store."""
    started: list[Accounts] = []

    def start(store: MemoryStore) -> Accounts:
        started.append(Accounts(store, clock=clock, secret=b"s" * 32, shared=True))
        started[-1].start()
        return started[-1]

    yield start
    for accounts in started:
        accounts.stop()


async def serve(accounts: Accounts, caller: Key, *, status: int = 200) -> RateLimitState:
    booking = await acquire(accounts, caller, opening(), tokens_follow=True)
    await booking.reserve_tokens(7)
    await booking.close(closing(status, tokens=7))
    assert booking.state is not None
    return booking.state


async def test_most_requests_of_a_busy_key_ask_the_store_for_nothing(
    node: Callable[[MemoryStore], Accounts],
) -> None:
    store = CountedStore()
    accounts = node(store)
    caller = await caller_with(accounts, RateLimits(100_000, 10_000_000))

    states = [await serve(accounts, caller) for _ in range(300)]

    assert len(store.reserves) < 20
    assert [state.remaining_requests for state in states] == [100_000 - n for n in range(1, 301)]
    assert [state.remaining_tokens for state in states] == [10**7 - 7 * n for n in range(1, 301)]


async def test_a_node_that_stops_gives_back_what_it_holds(
    node: Callable[[MemoryStore], Accounts], clock: HandClock
) -> None:
    store = CountedStore()
    leaving, staying = node(store), node(store)
    caller = await caller_with(leaving, RateLimits(100_000, 10_000_000))
    for _ in range(50):
        await serve(leaving, caller)
    await asyncio.to_thread(leaving.stop)

    state = await serve(staying, caller)

    assert (state.remaining_requests, state.remaining_tokens) == (100_000 - 51, 10**7 - 51 * 7)


def test_all_lock_buckets_in_one_order_whatever_the_collation(postgres: PostgresServer) -> None:
    """Else nodes that reserve and nodes that record deadlock: most locales sort `a` before `B`."""
    url = postgres.upgraded_database()
    with (
        psycopg.connect(url) as other,
        psycopg.connect(url, autocommit=True) as watch,
        contextlib.closing(SqlStore(postgres_engines(url), upgrades_itself=False)) as store,
    ):
        watch.execute('ALTER TABLE buckets ALTER key_id TYPE varchar(32) COLLATE "en-x-icu"')
        limits = RateLimits(requests_per_minute=10)
        for name in ("a", "B"):
            store.add_key(a_key(name, limits))
        rows = [a_row(name, key_id=f"key_{name}") for name in ("a", "B")]
        given_back = [RecordUsage(row, limits, Cost(requests=1)) for row in rows]
        other.execute("SELECT FROM buckets WHERE key_id = 'key_B' FOR UPDATE")
        commit = threading.Thread(target=store.commit, args=(given_back,), kwargs={"now_us": 1})
        commit.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        while watch.execute(waiting).fetchone() == (0,):
            assert commit.is_alive()
        watch.execute("SELECT FROM buckets WHERE key_id = 'key_a' FOR UPDATE NOWAIT")
        other.rollback()
        commit.join()
        assert store.usage(UsageQuery(UsageBy.KEY))[0].requests == 1


async def test_a_node_that_stops_gives_back_on_postgres_too_whose_listener_is_broken_off(
    postgres: PostgresServer,
) -> None:
    shelf, clock = postgres_shelf(postgres), HandClock()
    leaving, staying = (
        Accounts(shelf.open(), clock=clock, secret=b"s" * 32, shared=True) for _ in range(2)
    )
    for accounts in (leaving, staying):
        accounts.start()
    caller = await caller_with(leaving, RateLimits(100_000, 10_000_000))
    for _ in range(20):
        await serve(leaving, caller)
    assert leaving.leases, "it holds some"
    await asyncio.to_thread(leaving.stop)

    state = await serve(staying, caller)
    await asyncio.to_thread(staying.stop)

    assert (state.remaining_requests, state.remaining_tokens) == (100_000 - 21, 10**7 - 21 * 7)
    shelf.close()


async def test_a_node_whose_store_hangs_stops_all_the_same(clock: HandClock) -> None:
    class Hanging(CountedStore):
        is_hanging = False

        def __init__(self) -> None:
            super().__init__()
            self.begun, self.interrupted = threading.Event(), threading.Event()

        def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
            if self.is_hanging:
                self.interrupted.clear()
                self.begun.set()
                assert self.interrupted.wait(60), "nobody breaks it off"
                raise unavailable()
            return super().commit(entries, now_us=now_us)

        def interrupt(self) -> None:
            self.interrupted.set()

    store = Hanging()
    accounts = Accounts(store, clock=clock, secret=b"s" * 32, shared=True)
    accounts.start()
    caller = await caller_with(accounts, RateLimits(100_000, 10_000_000))
    for _ in range(20):
        await serve(accounts, caller)
    store.is_hanging = True
    stopping = asyncio.create_task(asyncio.to_thread(accounts.stop))
    await asyncio.to_thread(store.begun.wait)

    clock.move(CALL_S_MAX)

    await stopping


async def test_a_node_whose_store_is_away_lets_nobody_in_on_its_lease(
    node: Callable[[MemoryStore], Accounts],
) -> None:
    store = CountedStore()
    accounts = node(store)
    caller = await caller_with(accounts, RateLimits(100_000, 10_000_000))
    for _ in range(50):
        await serve(accounts, caller)
    store.broken = True

    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            await serve(accounts, caller)
    served = len(store.rows)
    store.broken = False

    assert served == 50


async def test_a_node_whose_commit_is_late_lets_nobody_in_until_it_has_come_back(
    node: Callable[[MemoryStore], Accounts], clock: HandClock
) -> None:
    class Slow(CountedStore):
        def __init__(self) -> None:
            super().__init__()
            self.begun, self.goes_on = threading.Event(), threading.Event()
            self.goes_on.set()

        def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
            self.begun.set()
            self.goes_on.wait()
            return super().commit(entries, now_us=now_us)

    store = Slow()
    accounts = node(store)
    caller = await caller_with(accounts, RateLimits(100_000, 10_000_000))
    running = await acquire(accounts, caller, opening())
    store.goes_on.clear()
    store.begun.clear()
    late = asyncio.create_task(running.close(closing()))
    await asyncio.to_thread(store.begun.wait)

    clock.move(SHARED_CALL_S)

    async with asyncio.timeout(60):
        while accounts.writable():  # noqa: ASYNC110 - another thread looks, in its own time
            await asyncio.sleep(0.01)
    with pytest.raises(StoreUnavailable):
        await acquire(accounts, caller, opening())
    store.goes_on.set()
    await late
    assert accounts.writable()


async def test_half_a_minute_without_the_store_bills_what_was_answered_and_ends_by_itself(
    node: Callable[[MemoryStore], Accounts], clock: HandClock
) -> None:
    """Requests that run when it goes away: one ends meanwhile, one fails, and one ends later."""

    class Returning(CountedStore):
        def __init__(self) -> None:
            super().__init__()
            self.is_back = threading.Event()

        def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
            committed = super().commit(entries, now_us=now_us)
            self.is_back.set()
            return committed

    store = Returning()
    accounts = node(store)
    limits = RateLimits(1_000, 100_000)
    caller = await caller_with(accounts, limits)
    for _ in range(20):
        await serve(accounts, caller)
    running = [await acquire(accounts, caller, opening(), tokens_follow=True) for _ in range(3)]
    for booking in running:
        await booking.reserve_tokens(7)
    during, failing, after = running

    store.broken = True
    for booking, status in ((during, 200), (failing, 500)):
        with pytest.raises(StoreUnavailable):  # so its client is told 503
            await booking.close(closing(status))
    for _ in range(30):
        clock.move(1.0)
        accounts.expire_leases()
        with pytest.raises(StoreUnavailable) as refused:  # and not when it is computed
            await acquire(accounts, caller, opening(), tokens_follow=True)
        assert refused.value.retry_after_s == RETRY_AFTER_S
    assert not accounts.writable()
    store.is_back.clear()
    store.broken = False
    clock.move(RETRY_S)
    await asyncio.to_thread(store.is_back.wait)
    while not accounts.writable():  # noqa: ASYNC110 - its thread is about to say so
        await asyncio.sleep(0)

    await after.close(closing(200, tokens=7))

    assert len(store.rows) == 21
    clock.move(60)
    state = await serve(accounts, caller)
    assert (state.remaining_requests, state.remaining_tokens) == (999, 99_993), "nothing is lost"


async def test_nodes_refuse_with_what_the_store_has_just_told_them(
    node: Callable[[MemoryStore], Accounts], clock: HandClock
) -> None:
    store = CountedStore()
    accounts = node(store)
    caller = await caller_with(accounts, RateLimits(requests_per_minute=3))
    told_s = []
    for _ in range(40):
        booking = Reservation(accounts, caller, opening())
        try:
            await booking.acquire()
        except RateLimitExceeded as refused:
            told_s.append(refused.retry_after_s)
            await booking.close(closing(429, tokens=0))
            assert booking.state is not None
            assert booking.state.remaining_requests == 0
    assert told_s == [20.0] * 37
    assert len(store.reserves) == 3, "the refusals ask it for nothing"

    clock.move(20)

    await acquire(accounts, caller, opening())
