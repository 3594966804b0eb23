"""Who a bearer is: every way to be somebody, and every way to be nobody."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.hand_clock import HandClock
from tests.support.memory_store import MemoryStore

from trivec.accounts import (
    ANONYMOUS,
    FIXED,
    Accounts,
    KeyPlan,
    RateLimits,
    Scope,
    UsageBy,
    UsageQuery,
    key_cache,
    keys,
)
from trivec.accounts.key_cache import STALE_S
from trivec.accounts.ledger import CALL_S_MAX, KeyChanges
from trivec.accounts.stores import open_accounts
from trivec.core.errors import KeyInvalid, KeyMissing, StoreUnavailable
from trivec.settings import Settings

FIXED_KEY = "0123456789abcdef"
Process = Callable[..., Accounts]


async def test_a_key_is_known_with_everything_that_was_decided_about_it(
    accounts: Accounts,
) -> None:
    plan = KeyPlan("t", frozenset({Scope.ADMIN}), frozenset({"m"}), RateLimits(5, None))
    new = await accounts.create_key(plan)

    caller = await accounts.identify(new.plain)

    assert (caller.id, caller.name) == (new.key.id, "t")
    assert (caller.scopes, caller.models) == (frozenset({Scope.ADMIN}), frozenset({"m"}))
    assert caller.limits == RateLimits(5, None)


@pytest.mark.parametrize("bearer", [None, ""], ids=["no-header", "an-empty-one"])
async def test_no_key_is_another_refusal_than_a_wrong_one(
    accounts: Accounts, bearer: str | None
) -> None:
    with pytest.raises(KeyMissing):
        await accounts.identify(bearer)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda plain: plain[:-1], id="cut"),
        pytest.param(lambda plain: plain + " ", id="with-a-blank"),
        pytest.param(lambda plain: plain.swapcase(), id="in-other-case"),
        pytest.param(lambda plain: plain[:8] + keys.new_plain_key()[8:], id="same-beginning"),
        pytest.param(lambda plain: keys.new_plain_key(), id="well-formed-stranger"),
        pytest.param(lambda plain: plain * 1000, id="very-long"),
        pytest.param(lambda plain: "' OR '1'='1", id="an-injection"),
        pytest.param(lambda plain: "\ud800", id="a-lone-surrogate"),
    ],
)
async def test_whatever_is_not_the_key_is_nobody(
    accounts: Accounts, change: Callable[[str], str]
) -> None:
    new = await accounts.create_key(KeyPlan("t"))

    with pytest.raises(KeyInvalid):
        await accounts.identify(change(new.plain))


async def test_unknown_revoked_and_expired_keys_are_refused_in_the_same_words(
    accounts: Accounts, clock: HandClock
) -> None:
    revoked = await accounts.create_key(KeyPlan("revoked"))
    await accounts.revoke_key("revoked")
    expires_us = int(clock.wall_s() * 1_000_000) + 5_000_000
    expired = await accounts.create_key(KeyPlan("expired", expires_us=expires_us))
    clock.move(5)

    words = set()
    for bearer in ("unknown", revoked.plain, expired.plain):
        with pytest.raises(KeyInvalid) as refusal:
            await accounts.identify(bearer)
        words.add(str(refusal.value))

    assert len(words) == 1


async def test_a_key_works_until_the_instant_it_expires(
    accounts: Accounts, clock: HandClock
) -> None:
    expires_us = int(clock.wall_s() * 1_000_000) + 5_000_000
    new = await accounts.create_key(KeyPlan("t", expires_us=expires_us))

    clock.move(4.999)
    assert (await accounts.identify(new.plain)).name == "t"
    clock.move(0.001)
    with pytest.raises(KeyInvalid):
        await accounts.identify(new.plain)


async def test_a_revoked_key_is_refused_within_a_second_by_every_process(
    process: Process, clock: HandClock
) -> None:
    one, other = process(), process()
    new = await one.create_key(KeyPlan("t"))
    await other.identify(new.plain)

    await one.revoke_key("t")

    with pytest.raises(KeyInvalid):
        await one.identify(new.plain)
    clock.move(STALE_S + 0.001)
    with pytest.raises(KeyInvalid):
        await other.identify(new.plain)
    assert STALE_S < 1


async def test_a_new_key_is_known_to_every_process_at_once(
    process: Process, clock: HandClock
) -> None:
    one, other = process(), process()
    with pytest.raises(KeyInvalid):
        await other.identify("nobody")
    new = await one.create_key(KeyPlan("t"))

    clock.move(0.001)

    assert (await other.identify(new.plain)).id == new.key.id


async def test_after_a_rotation_both_keys_are_the_same_caller_until_the_old_one_ends(
    accounts: Accounts, clock: HandClock
) -> None:
    old = await accounts.create_key(KeyPlan("t"))
    new = await accounts.rotate_key("t", overlap_s=60)

    assert await accounts.identify(old.plain) == await accounts.identify(new.plain)
    clock.move(60)
    assert (await accounts.identify(new.plain)).id == old.key.id
    with pytest.raises(KeyInvalid):
        await accounts.identify(old.plain)


async def test_at_most_two_secrets_live_and_a_third_ends_the_first(accounts: Accounts) -> None:
    first = await accounts.create_key(KeyPlan("t"))
    second = await accounts.rotate_key("t")
    third = await accounts.rotate_key("t")

    assert (await accounts.identify(second.plain)).name == "t"
    assert (await accounts.identify(third.plain)).name == "t"
    with pytest.raises(KeyInvalid):
        await accounts.identify(first.plain)


async def test_the_environments_key_opens_everything_and_is_stored_nowhere(
    process: Process, store: MemoryStore
) -> None:
    accounts = process(fixed_key=FIXED_KEY)

    assert await accounts.identify(FIXED_KEY) == FIXED
    assert set(Scope) == FIXED.scopes
    assert FIXED.limits == RateLimits()
    assert store.keys_since(0).keys == ()
    with pytest.raises(KeyInvalid):
        await accounts.identify(FIXED_KEY + "0")


async def test_made_keys_work_beside_the_environments(process: Process) -> None:
    accounts = process(fixed_key=FIXED_KEY)
    new = await accounts.create_key(KeyPlan("t"))

    assert (await accounts.identify(new.plain)).name == "t"


@pytest.mark.parametrize("bearer", [None, "", "anything"], ids=["none", "empty", "some"])
async def test_without_authentication_everybody_is_anonymous(
    process: Process, bearer: str | None
) -> None:
    assert await process(no_auth=True).identify(bearer) == ANONYMOUS


async def test_without_authentication_a_store_in_memory_serves_an_administrator(
    tmp_path: Path, clock: HandClock
) -> None:
    accounts = open_accounts(Settings(no_auth=True, data_dir=tmp_path / "none"), clock=clock)
    accounts.start()
    try:
        plans = [KeyPlan(f"k{number}") for number in range(8)]
        made = await asyncio.gather(*map(accounts.create_key, plans))
        await accounts.revoke_key("k0")
        asked = [accounts.usage(UsageQuery(UsageBy.KEY)) for _ in range(4)]
        assert await asyncio.gather(*asked) == [[]] * 4
        assert {key.id for key in await accounts.list_keys()} == {new.key.id for new in made}
        assert accounts.health().writable
    finally:
        accounts.stop()
    assert not (tmp_path / "none").exists()


async def test_no_key_is_taken_on_trust_while_the_store_cannot_be_read(
    accounts: Accounts, store: MemoryStore, clock: HandClock
) -> None:
    new = await accounts.create_key(KeyPlan("t"))
    await accounts.identify(new.plain)
    store.broken = True

    clock.move(STALE_S + 0.001)

    with pytest.raises(StoreUnavailable):
        await accounts.identify(new.plain)
    store.broken = False
    assert (await accounts.identify(new.plain)).name == "t"


def test_a_caller_may_use_its_models_and_no_other() -> None:
    caller = replace(FIXED, models=frozenset({"m"}))

    assert caller.may_use(("other", "m"))
    assert FIXED.may_use(("any",))
    assert not caller.may_use(("other",))


async def test_the_first_start_makes_one_key_and_no_second(process: Process) -> None:
    first = await process().create_first_key()

    assert first is not None
    assert first.key.scopes == set(Scope)
    assert await process().create_first_key() is None


async def test_no_first_key_where_none_is_needed(process: Process, store: MemoryStore) -> None:
    assert await process(no_auth=True).create_first_key() is None
    assert await process(fixed_key=FIXED_KEY).create_first_key() is None
    assert store.keys_since(0).keys == ()


async def test_no_key_that_was_revoked_comes_back_as_a_first_key(accounts: Accounts) -> None:
    await accounts.create_first_key()
    await accounts.revoke_key("first")

    assert await accounts.create_first_key() is None


class SlowReads(MemoryStore):
    """Each read of keys takes *read_s* on a clock that only it and the test move."""

    def __init__(self, clock: HandClock, read_s: float) -> None:
        super().__init__()
        self.reads = 0
        self._clock, self._read_s = clock, read_s

    def keys_since(self, revision: int) -> KeyChanges:
        self.reads += 1
        assert self.reads < 100, "one request reads the store for ever"
        self._clock.move(self._read_s)
        return super().keys_since(revision)


async def test_a_burst_of_wrong_keys_shares_two_reads(clock: HandClock) -> None:
    store = SlowReads(clock, 0.04)
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    store.reads = 0
    try:
        found = await asyncio.gather(
            *(accounts.identify(f"mistyped{n}") for n in range(1000)), return_exceptions=True
        )
    finally:
        accounts.stop()
    assert all(isinstance(one, KeyInvalid) for one in found)
    assert store.reads <= 2  # the cache's own and theirs


@pytest.mark.parametrize("read_s", [0.04, 0.06, 0.6], ids=lambda s: f"{s}s-a-read")
async def test_a_slow_store_still_tells_right_keys_from_wrong_ones(
    clock: HandClock, read_s: float
) -> None:
    store = SlowReads(clock, read_s)
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    try:
        new = await accounts.create_key(KeyPlan("t"))
        store.reads = 0
        for _ in range(3):
            assert (await accounts.identify(new.plain)).name == "t"
            with pytest.raises(KeyInvalid):
                await accounts.identify("mistyped")
    finally:
        accounts.stop()


async def test_a_read_that_is_done_but_not_yet_called_back_does_not_stop_the_loop(
    clock: HandClock,
) -> None:
    """Many right and wrong keys at once, each read older than allowed as soon as it is done."""
    store = SlowReads(clock, 0.06)
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    try:
        new = await accounts.create_key(KeyPlan("t"))
        store.reads = 0
        bearers = [new.plain, "mistyped"] * 100
        told = await asyncio.gather(*map(accounts.identify, bearers), return_exceptions=True)
        assert [type(one).__name__ for one in told] == ["Key", "KeyInvalid"] * 100
        assert store.reads <= 3
    finally:
        accounts.stop()


class HeldReads(MemoryStore):
    """Reads of keys wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.let_go = threading.Event()
        self.reads = 0

    def keys_since(self, revision: int) -> KeyChanges:
        self.reads += 1
        self.begun.set()
        self.let_go.wait()
        return super().keys_since(revision)


async def test_a_store_that_does_not_answer_is_503_and_one_read_serves_all_who_left(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_cache, "READ_S_MAX", 0.01)
    store = HeldReads()
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    try:
        tasks = len(asyncio.all_tasks())
        for _ in range(5):
            with pytest.raises(StoreUnavailable) as refusal:
                await accounts.identify("anybody")
            assert refusal.value.retry_after_s > 0
        assert store.reads == 1
        assert len(asyncio.all_tasks()) == tasks + 1
        leaver = asyncio.create_task(accounts.identify("leaves"))
        await asyncio.sleep(0)
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert store.reads == 1
        monkeypatch.setattr(key_cache, "READ_S_MAX", 60)
        clock.move(CALL_S_MAX)
        with pytest.raises(StoreUnavailable):  # at once, for the read hangs
            await asyncio.wait_for(accounts.identify("anybody"), 30)
        assert not accounts.writable()
    finally:
        store.let_go.set()
        accounts.stop()
