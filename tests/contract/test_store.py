"""What every store promises, whatever it is made of."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from itertools import product

import pytest
from tests.accounts.shelf import (
    NOON_US,
    SECOND_US,
    Shelf,
    a_key,
    a_row,
    ask,
)

from trivec.accounts.administration import Administration
from trivec.accounts.ledger import Answer, Entry, RecordUsage, Store
from trivec.accounts.rate_limits import Cost, Grant, state
from trivec.accounts.types import RateLimits, UsageBy, UsageLine, UsageQuery
from trivec.accounts.utc import DAY_US
from trivec.core.clock import SystemClock
from trivec.core.errors import (
    FieldInvalid,
    RateLimitExceeded,
    ResourceUnknown,
    StoreUnavailable,
)

TEN_A_MINUTE = RateLimits(requests_per_minute=10)


def one(store: Store, entry: Entry, *, at_s: float = 0) -> Answer:
    """The outcome of a group of one, *at_s* seconds after noon."""
    committed = store.commit([entry], now_us=NOON_US + round(at_s * SECOND_US))
    (outcome,) = committed.outcomes
    return outcome


def used(store: Store, by: UsageBy = UsageBy.KEY) -> list[UsageLine]:
    return store.usage(UsageQuery(by))


def test_an_allowance_is_spent_and_refilled_with_time(shelf: Shelf) -> None:
    store = shelf.open()
    store.add_key(a_key("a", TEN_A_MINUTE))

    burst = store.commit([ask(TEN_A_MINUTE)] * 11, now_us=NOON_US).outcomes

    assert [type(outcome) for outcome in burst] == [Grant] * 10 + [RateLimitExceeded]
    assert isinstance(one(store, ask(TEN_A_MINUTE), at_s=5.999), RateLimitExceeded)
    assert isinstance(one(store, ask(TEN_A_MINUTE), at_s=6), Grant)
    assert isinstance(one(store, ask(TEN_A_MINUTE), at_s=6), RateLimitExceeded)


def test_a_refused_reservation_takes_nothing(shelf: Shelf) -> None:
    store = shelf.open()
    limits = RateLimits(requests_per_minute=10, tokens_per_minute=100)
    store.add_key(a_key("a", limits))
    too_much = ask(limits, Cost(requests=1, tokens=101))

    refused = one(store, too_much)
    granted = one(store, ask(limits, Cost(requests=1, tokens=100)))

    assert isinstance(refused, RateLimitExceeded)
    assert refused.kind == "tokens"
    assert isinstance(granted, Grant)
    left = state(granted.bucket, limits)
    assert (left.remaining_requests, left.remaining_tokens) == (9, 0)


def test_what_was_not_used_is_given_back(shelf: Shelf) -> None:
    store = shelf.open()
    limits = RateLimits(tokens_per_minute=100)
    store.add_key(a_key("a", limits))
    one(store, ask(limits, Cost(tokens=100)))

    settled = one(store, RecordUsage(a_row("r1"), limits, unused=Cost(tokens=93)))

    assert isinstance(settled, Grant)
    assert state(settled.bucket, limits).remaining_tokens == 93


def test_a_restart_does_not_refill(shelf: Shelf) -> None:
    store = shelf.open()
    store.add_key(a_key("a", TEN_A_MINUTE))
    store.commit([ask(TEN_A_MINUTE)] * 10, now_us=NOON_US)

    assert isinstance(one(shelf.open(), ask(TEN_A_MINUTE)), RateLimitExceeded)


def test_processes_share_an_allowance_to_the_last_request(shelf: Shelf) -> None:
    limits = RateLimits(requests_per_minute=150)
    stores = [shelf.open() for _ in range(4)]
    stores[0].add_key(a_key("a", limits))

    def spend(store: Store) -> int:
        return sum(isinstance(one(store, ask(limits)), Grant) for _ in range(50))

    with ThreadPoolExecutor(len(stores)) as threads:
        granted = sum(threads.map(spend, stores))

    assert granted == 150


def test_a_machine_whose_clock_is_behind_goes_on_from_the_last_instant(shelf: Shelf) -> None:
    store = shelf.open()
    store.add_key(a_key("a", TEN_A_MINUTE))
    store.commit([ask(TEN_A_MINUTE)] * 10, now_us=NOON_US)

    behind = shelf.open().commit([ask(TEN_A_MINUTE)], now_us=NOON_US - 3600 * SECOND_US)

    assert behind.now_us == NOON_US
    assert isinstance(behind.outcomes[0], RateLimitExceeded)


ROWS = [
    a_row("r1"),
    a_row("r2", model="bge", token_count=20),
    a_row("r3", key_id="key_b", time_us=NOON_US + DAY_US),
    a_row("r4", key_id="key_b", status=400, model=None, token_count=0),
]


@pytest.mark.parametrize(
    ("by", "lines"),
    [
        pytest.param(
            UsageBy.KEY,
            [UsageLine("key_a", "a", 2, 0, 27), UsageLine("key_b", "key_b", 2, 1, 7)],
            id="by-key",
        ),
        pytest.param(
            UsageBy.MODEL,
            [
                UsageLine(None, None, 1, 1, 0),
                UsageLine("bge", None, 1, 0, 20),
                UsageLine("minilm", None, 2, 0, 14),
            ],
            id="by-model",
        ),
        pytest.param(
            UsageBy.DAY,
            [UsageLine("2023-11-14", None, 3, 1, 27), UsageLine("2023-11-15", None, 1, 0, 7)],
            id="by-day",
        ),
    ],
)
def test_usage_is_the_sum_of_the_ledger(shelf: Shelf, by: UsageBy, lines: list[UsageLine]) -> None:
    store = shelf.open()
    store.add_key(a_key("a"))
    store.commit([RecordUsage(row) for row in ROWS], now_us=NOON_US)

    assert used(shelf.open(), by) == lines


@pytest.mark.parametrize(
    ("query", "tokens"),
    [
        pytest.param(UsageQuery(UsageBy.KEY, since_us=NOON_US), 34, id="since-is-included"),
        pytest.param(UsageQuery(UsageBy.KEY, since_us=NOON_US + 1), 7, id="nothing-before-since"),
        pytest.param(
            UsageQuery(UsageBy.KEY, until_us=NOON_US + DAY_US), 27, id="until-is-not-included"
        ),
        pytest.param(UsageQuery(UsageBy.KEY, key_id="key_b"), 7, id="of-one-key"),
    ],
)
def test_usage_of_a_part_of_the_ledger(shelf: Shelf, query: UsageQuery, tokens: int) -> None:
    store = shelf.open()
    store.commit([RecordUsage(row) for row in ROWS], now_us=NOON_US)

    assert sum(line.tokens for line in store.usage(query)) == tokens


HALF_US = NOON_US - NOON_US % DAY_US + DAY_US // 2  # the middle of that day
SPREAD = [  # every 8 hours from midnight: rows, and requests that are counted
    a_row(f"s{n}", time_us=HALF_US + (n * 8 - 12) * 3600 * SECOND_US, token_count=7 * (n % 2))
    for n in range(9)
]


@pytest.mark.parametrize("by", UsageBy)
def test_usage_from_totals_is_what_its_requests_add_up_to(shelf: Shelf, by: UsageBy) -> None:
    """Whole days and parts of them, at either end or within one day."""
    store = shelf.open()
    for row in SPREAD:
        store.commit([RecordUsage(row)], now_us=NOON_US)

    for since, until in product([-1, 0, 1, 3, 5, None], [2, 3, 4, 6, 8, None]):
        start_us, step_us = SPREAD[0].time_us, 8 * 3600 * SECOND_US
        since_us = None if since is None else start_us + since * step_us
        until_us = None if until is None else start_us + until * step_us
        lines = store.usage(UsageQuery(by, since_us, until_us))
        asked = [
            row
            for row in SPREAD
            if (since_us is None or row.time_us >= since_us)
            and (until_us is None or row.time_us < until_us)
        ]
        assert (
            sum(line.requests for line in lines),
            sum(line.tokens for line in lines),
        ) == (len(asked), sum(row.token_count for row in asked)), (since, until)


def test_what_costs_no_tokens_is_counted_by_the_minute(shelf: Shelf) -> None:
    store = shelf.open()
    unpaid = [
        RecordUsage(a_row(f"r{n}", status=404, model=None, token_count=0, time_us=NOON_US + n))
        for n in range(500)
    ]
    for _ in range(2):
        store.commit(unpaid, now_us=NOON_US)  # twice the same id: a row each would be refused

    assert used(store) == [UsageLine("key_a", "key_a", 1000, 1000, 0)]
    assert used(store, UsageBy.MODEL) == [UsageLine(None, None, 1000, 1000, 0)]


def test_a_group_is_written_whole_when_some_of_it_is_refused(shelf: Shelf) -> None:
    store = shelf.open()
    limits = RateLimits(requests_per_minute=1)
    store.add_key(a_key("a", limits))

    committed = store.commit(
        [ask(limits), RecordUsage(a_row("r1")), ask(limits), RecordUsage(a_row("r2"))],
        now_us=NOON_US,
    )

    kinds = [type(outcome) for outcome in committed.outcomes]
    assert kinds == [Grant, type(None), RateLimitExceeded, type(None)]
    assert used(store)[0].requests == 2


def test_a_group_of_nothing_is_written_and_adds_nothing_to_the_ledger(shelf: Shelf) -> None:
    store = shelf.open()

    assert store.commit([], now_us=NOON_US).outcomes == []
    assert used(store) == []


def test_only_keys_that_changed_are_read_again(shelf: Shelf) -> None:
    store, other = shelf.open(), shelf.open()
    store.add_key(a_key("a", TEN_A_MINUTE))
    store.add_key(replace(a_key("b"), models=frozenset({"m1", "m2"}), expires_us=5))
    first = other.keys_since(0)

    revoked = store.change_key("key_a", lambda key: replace(key, revoked_us=9, secrets=()))

    assert {key.id: key for key in first.keys} == {
        "key_a": a_key("a", TEN_A_MINUTE),
        "key_b": replace(a_key("b"), models=frozenset({"m1", "m2"}), expires_us=5),
    }
    assert other.keys_since(first.revision).keys == (revoked,)
    assert other.keys_since(other.keys_since(first.revision).revision).keys == ()


def test_two_keys_never_share_a_name_while_both_live(shelf: Shelf) -> None:
    store = shelf.open()
    store.add_key(a_key("a"))
    namesake = replace(a_key("b"), name="a")

    with pytest.raises(FieldInvalid, match="a key named a already"):
        store.add_key(namesake)
    store.change_key("key_a", lambda key: replace(key, revoked_us=9))
    store.add_key(namesake)

    assert {key.id for key in store.keys_since(0).keys} == {"key_a", "key_b"}


def test_keys_are_found_by_id_name_and_digest_and_live_ones_counted(shelf: Shelf) -> None:
    store = shelf.open()
    for number in range(3):
        key = a_key(f"k{number}")
        store.add_key(replace(key, name="a"))
        if number < 2:
            store.change_key(key.id, lambda key: replace(key, revoked_us=NOON_US))

    def found(reference: str, digest: bytes = b"none") -> set[str]:
        return {key.id for key in shelf.open().find_keys(reference, digest)}

    assert found("a") == {"key_k0", "key_k1", "key_k2"}
    assert found("key_k0") == {"key_k0"}
    assert found("tv_secret", a_key("k2").secrets[0].digest) == {"key_k2"}
    assert found("b") == set()
    assert store.count_live_keys() == 1


@pytest.mark.parametrize("reference", ["\0", "tv_\0", "\ud800", "é\u2028", "'; --", ""])
def test_any_text_may_be_sent_for_a_key(shelf: Shelf, reference: str) -> None:
    store = shelf.open()
    store.add_key(a_key("a"))
    with pytest.raises(ResourceUnknown) as unknown:
        Administration(store, clock=SystemClock(), secret=b"s" * 32).show_key(reference)
    assert str(unknown.value).isprintable()


def test_a_key_that_does_not_exist_cannot_change(shelf: Shelf) -> None:
    with pytest.raises(ResourceUnknown, match="key_none"):
        shelf.open().change_key("key_none", lambda key: key)


def test_the_first_secret_is_the_secret(shelf: Shelf) -> None:
    assert shelf.open().agree_secret_check(b"ours" * 4) == b"ours" * 4
    assert shelf.open().agree_secret_check(b"none" * 4) == b"ours" * 4


def test_a_store_that_was_interrupted_works_again(shelf: Shelf) -> None:
    store = shelf.open()
    one(store, RecordUsage(a_row("before")))

    store.interrupt()

    with suppress(StoreUnavailable):  # from a connection that was broken off
        store.keys_since(0)
    with suppress(StoreUnavailable):
        one(store, RecordUsage(a_row("perhaps")))
    one(store, RecordUsage(a_row("after")))
    assert used(store)[0].requests in (2, 3)
