"""Sums over the ledger beside requests: however long they take, keys are checked meanwhile."""

import asyncio
import threading
from pathlib import Path

import pytest
from tests.accounts.shelf import sqlite_shelf
from tests.support.memory_store import MemoryStore

from trivec.accounts import Accounts, UsageBy, UsageLine, UsageQuery
from trivec.accounts.accounts import SUMS_MAX
from trivec.accounts.stores.engines import READERS_MAX, SQLITE_FILE, sqlite_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.core.clock import SystemClock
from trivec.core.errors import KeyInvalid, Overloaded

BY_KEY = UsageQuery(by=UsageBy.KEY)


class SlowSums(MemoryStore):
    """Its sums end when they are told to; it knows how many run at once."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = threading.Event()
        self.may_end = threading.Event()
        self.running = 0
        self.running_max = 0

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        self.running += 1
        self.running_max = max(self.running_max, self.running)
        self.begun.set()
        assert self.may_end.wait(60)
        self.running -= 1
        return super().usage(query)


async def test_sums_run_one_at_a_time_and_a_crowd_of_them_is_refused() -> None:
    store = SlowSums()
    accounts = Accounts(store, clock=SystemClock(), secret=b"s" * 32)
    accounts.start()
    try:
        sums = [asyncio.create_task(accounts.usage(BY_KEY)) for _ in range(SUMS_MAX)]
        assert await asyncio.to_thread(store.begun.wait, 60)
        with pytest.raises(Overloaded) as refused:
            await accounts.usage(BY_KEY)
        assert refused.value.retry_after_s > 0
        with pytest.raises(KeyInvalid):  # an answer, while a sum runs and others wait
            await accounts.identify("tv_stranger")
        store.may_end.set()
        await asyncio.gather(*sums)
        assert store.running_max == 1
        assert await accounts.usage(BY_KEY) == []
    finally:
        store.may_end.set()
        accounts.stop()


def test_sums_and_keys_are_read_over_connections_of_their_own(tmp_path: Path) -> None:
    sqlite_shelf(tmp_path).close()
    engines = sqlite_engines(tmp_path / SQLITE_FILE)
    store = SqlStore(engines, upgrades_itself=True)
    store.prepare()
    try:
        held = [engines.reading.connect() for _ in range(READERS_MAX)]
        assert store.usage(BY_KEY) == []
        for connection in held:
            connection.close()
        with engines.summing.connect():  # a sum that goes on
            assert store.keys_since(0).keys == ()
    finally:
        store.close()
