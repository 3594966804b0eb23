"""A store that cannot be written: nothing is served, nothing is ready, and it mends itself."""

import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from subprocess import Popen
from typing import Any

import psycopg
import pytest
from sqlalchemy import event
from tests.accounts.postgres import PostgresServer
from tests.accounts.processes import driver
from tests.accounts.requests import acquire, closing, opening, record
from tests.accounts.shelf import NOON_US, a_key, a_row, ask, sqlite_shelf
from tests.hand_clock import HandClock
from tests.support.memory_store import MemoryStore

from trivec.accounts import FIXED, Accounts, KeyPlan, RateLimits, UsageBy, UsageQuery
from trivec.accounts.keys import server_secret
from trivec.accounts.ledger import (
    CALL_S_MAX,
    Committed,
    Entry,
    KeyChanges,
    RecordUsage,
    unavailable,
)
from trivec.accounts.rate_limits import Cost
from trivec.accounts.stores.engines import SQLITE_FILE, Engines, postgres_engines, sqlite_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.core.clock import SystemClock
from trivec.core.errors import KeyInvalid, StoreUnavailable


@asynccontextmanager
async def accounts_over(engines: Engines, *, upgrades_itself: bool) -> AsyncIterator[Accounts]:
    accounts = Accounts(
        SqlStore(engines, upgrades_itself=upgrades_itself), clock=SystemClock(), secret=b"s" * 32
    )
    accounts.start()
    yield accounts
    accounts.stop()


async def serve(accounts: Accounts) -> None:
    await (await acquire(accounts, FIXED, opening())).close(closing())


async def served_until_refused(accounts: Accounts) -> int:
    for served in range(10_000):
        try:
            await serve(accounts)
        except StoreUnavailable:
            return served
    pytest.fail("the disk was never full")


async def is_refused(accounts: Accounts) -> None:
    """The first request may find out, those after it are refused at the door."""
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await serve(accounts)
        assert not accounts.writable()


async def is_mended(accounts: Accounts) -> None:
    """The writer tries by itself every second; writing down a refusal makes it try at once."""
    await record(accounts, FIXED, opening(), closing(503))
    assert accounts.writable()
    await serve(accounts)


async def rows_of(accounts: Accounts) -> int:
    (line,) = await accounts.usage(UsageQuery(UsageBy.KEY))
    return line.requests - line.failed


async def test_a_locked_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivec.accounts.stores.engines.LOCK_WAIT_S", 0.05)
    file = tmp_path / SQLITE_FILE
    async with accounts_over(sqlite_engines(file), upgrades_itself=True) as accounts:
        await serve(accounts)
        locker = sqlite3.connect(file, isolation_level=None)
        locker.execute("BEGIN EXCLUSIVE")

        await is_refused(accounts)
        assert "locked" in accounts.health().reason

        locker.close()
        await is_mended(accounts)
        assert await rows_of(accounts) == 2


def restore(file: Path, kept: bytes) -> None:
    """As an operator would: the copy, and no journal that belongs to another."""
    for journal in file.parent.glob(f"{file.name}-*"):
        journal.unlink()
    file.write_bytes(kept)


@pytest.mark.parametrize("whole", [False, True], ids=["the-first-page", "not-even-its-name"])
async def test_a_damaged_file_that_is_restored(tmp_path: Path, whole: bool) -> None:
    file = tmp_path / SQLITE_FILE
    async with accounts_over(sqlite_engines(file), upgrades_itself=True) as accounts:
        await serve(accounts)
    kept = file.read_bytes()
    begin = 0 if whole else 16  # the name of the format comes first
    file.write_bytes(kept[:begin] + b"garbage!" * 512 + kept[begin + 4096 :])
    async with accounts_over(sqlite_engines(file), upgrades_itself=True) as accounts:
        await is_refused(accounts)

        restore(file, kept)
        await is_mended(accounts)
        assert await rows_of(accounts) == 2


async def test_a_full_disk(tmp_path: Path) -> None:
    engines = sqlite_engines(tmp_path / SQLITE_FILE)
    with filled_up(engines):
        async with accounts_over(engines, upgrades_itself=True) as accounts:
            served = await served_until_refused(accounts)
            assert "full" in accounts.health().reason
            await is_refused(accounts)

            event.remove(engines.writing, "connect", _few_pages)
            await is_mended(accounts)
            assert await rows_of(accounts) == served + 1
            event.listen(engines.writing, "connect", _few_pages)


def _few_pages(raw: sqlite3.Connection, _: object) -> None:
    raw.execute("PRAGMA max_page_count=33").close()


@contextmanager
def filled_up(engines: Engines) -> Iterator[None]:
    """SQLite reports a file that may not grow exactly as it does a disk that is full."""
    event.listen(engines.writing, "connect", _few_pages)
    yield
    event.remove(engines.writing, "connect", _few_pages)


@pytest.mark.process
def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    with driver(tmp_path, disk_bytes=4 << 20) as process:
        inside = Path(f"/proc/{process.pid}/root{tmp_path}")
        assert answer_of(process) == "200 writable"
        filler = inside / "filler"
        fill(filler)
        served = 1
        while (answer := answer_of(process)) == "200 writable":  # what was allocated already
            served += 1
        assert answer == "503 not-writable"
        assert answer_of(process) == "503 not-writable"

        filler.unlink()
        answer_of(process)  # may be refused still; its record makes the writer try again
        assert answer_of(process) == "200 writable"
        copy = tmp_path / "copy"
        shutil.copytree(inside, copy)
        with contextlib.closing(sqlite3.connect(copy / SQLITE_FILE)) as raw:
            assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            (written,) = raw.execute("SELECT count(*) FROM ledger WHERE status = 200").fetchone()
        assert served < written <= served + 2


def fill(file: Path) -> None:
    """Until there is no byte left."""
    disk = os.statvfs(file.parent)
    file.write_bytes(bytes(disk.f_bavail * disk.f_frsize))


@pytest.mark.parametrize("lost_bytes", [1, 100, 5000, 20_000])
def test_a_journal_that_was_torn_loses_only_its_end(tmp_path: Path, lost_bytes: int) -> None:
    """As a power cut leaves it: what was synced is there, and what came after is not."""
    store = sqlite_store(tmp_path / "whole")
    for number in range(20):
        store.commit([RecordUsage(a_row(f"r{number:02}"))], now_us=NOON_US)
    shutil.copytree(tmp_path / "whole", tmp_path / "torn")
    journal = tmp_path / "torn" / f"{SQLITE_FILE}-wal"
    os.truncate(journal, journal.stat().st_size - lost_bytes)
    (tmp_path / "torn" / f"{SQLITE_FILE}-shm").unlink()
    store.close()

    torn = sqlite_store(tmp_path / "torn")
    torn.commit([RecordUsage(a_row("after"))], now_us=NOON_US)
    torn.close()

    with contextlib.closing(sqlite3.connect(tmp_path / "torn" / SQLITE_FILE)) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        query = "SELECT request_id FROM ledger ORDER BY sequence"
        found = [name for (name,) in raw.execute(query)]
    kept = len(found) - 1
    assert found == [*(f"r{number:02}" for number in range(kept)), "after"]
    assert 10 < kept < 20


def sqlite_store(folder: Path) -> SqlStore:
    folder.mkdir(exist_ok=True)
    return SqlStore(sqlite_engines(folder / SQLITE_FILE), upgrades_itself=True)


@pytest.mark.process
def test_a_folder_that_is_read_only_for_a_while(tmp_path: Path) -> None:
    sqlite_shelf(tmp_path)
    server_secret(tmp_path, given=None)
    for file in tmp_path.iterdir():
        file.chmod(0o400)
    tmp_path.chmod(0o500)
    with driver(tmp_path, obeys_modes=True) as process:
        assert answer_of(process) == "503 not-writable"
        assert answer_of(process) == "503 not-writable"
        tmp_path.chmod(0o700)
        for file in tmp_path.iterdir():
            file.chmod(0o600)
        answer_of(process)  # may be refused still; its record makes the writer try again
        assert answer_of(process) == "200 writable"


def answer_of(process: "Popen[str]") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.fixture
def own_postgres(postgres: PostgresServer) -> Iterator[PostgresServer]:
    """The tests' server, which this one may stop: it runs again afterwards."""
    yield postgres
    if not postgres.is_running:
        postgres.start()


async def test_postgres_that_stops_and_comes_back(own_postgres: PostgresServer) -> None:
    url = own_postgres.upgraded_database()
    async with accounts_over(postgres_engines(url), upgrades_itself=False) as accounts:
        await serve(accounts)
        own_postgres.stop()

        await is_refused(accounts)

        own_postgres.start()
        await is_mended(accounts)
        assert await rows_of(accounts) == 2


async def test_postgres_that_is_not_there_at_the_start(own_postgres: PostgresServer) -> None:
    url = own_postgres.upgraded_database()
    own_postgres.stop()
    async with accounts_over(postgres_engines(url), upgrades_itself=False) as accounts:
        await is_refused(accounts)
        assert await accounts.create_first_key() is None

        own_postgres.start()
        await is_mended(accounts)


def test_a_connection_that_dies_under_reservations_is_our_error_and_no_line_of_the_driver(
    postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    url, limits = postgres.upgraded_database(), RateLimits(requests_per_minute=100)
    with contextlib.closing(SqlStore(postgres_engines(url), upgrades_itself=False)) as store:
        store.add_key(a_key("a", limits))
        store.commit([ask(limits)], now_us=NOON_US)
        with psycopg.connect(url, autocommit=True) as connection:
            others = "FROM pg_stat_activity WHERE datname = current_database()"
            connection.execute(
                f"SELECT pg_terminate_backend(pid, 60000) {others} AND pid <> pg_backend_pid()"
            )
        with pytest.raises(StoreUnavailable):
            store.commit([ask(limits), ask(limits)], now_us=NOON_US)
        store.commit([ask(limits)], now_us=NOON_US)
    assert caplog.records == []


@pytest.mark.parametrize("writes", [True, False], ids=["a-request", "nothing"])
def test_a_node_that_is_cut_off_inside_a_transaction_keeps_no_other_from_writing(
    postgres: PostgresServer, writes: bool
) -> None:
    url = postgres.upgraded_database()
    limits = RateLimits(requests_per_minute=100)
    entries = [RecordUsage(a_row("r1"), limits, Cost(1))] if writes else []
    cut_off = postgres_engines(url)
    with contextlib.closing(SqlStore(postgres_engines(url), upgrades_itself=False)) as store:
        store.add_key(a_key("a", limits))
        with contextlib.closing(cut_off.writing.raw_connection()) as pooled:
            raw: Any = pooled.driver_connection
            cut_off.begin(raw, True)
            raw.execute("UPDATE probe SET at_us = 1")
            raw.execute("UPDATE buckets SET at_us = 1")

            store.commit(entries, now_us=NOON_US)

            with pytest.raises(psycopg.errors.IdleInTransactionSessionTimeout):
                raw.execute("COMMIT")
            pooled.invalidate()
    cut_off.dispose()


@contextmanager
def backends_stopped(server: PostgresServer, database: str) -> Iterator[None]:
    """Every backend that serves *database* hangs; its kernel still acknowledges what is sent."""
    query = "SELECT pid FROM pg_stat_activity WHERE datname = %s AND pid <> pg_backend_pid()"
    with psycopg.connect(server.url(database)) as connection:
        pids = [pid for (pid,) in connection.execute(query, [database])]
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


async def test_postgres_that_hangs_is_given_up_and_comes_back(
    own_postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("trivec.accounts.accounts.CALL_S_MAX", 1.0)
    url = own_postgres.upgraded_database()
    async with accounts_over(postgres_engines(url), upgrades_itself=False) as accounts:
        await serve(accounts)
        new = await accounts.create_key(KeyPlan("t"))
        await accounts.identify(new.plain)
        with backends_stopped(own_postgres, url.rpartition("/")[2]):
            with pytest.raises(StoreUnavailable):
                await serve(accounts)
            assert "has not come back" in caplog.text  # it may be writable again by now
            await is_mended(accounts)  # over a new connection, while the old ones still hang
            assert (await accounts.identify(new.plain)).name == "t"
        await serve(accounts)
        assert await rows_of(accounts) in (3, 4)  # the one that hung may have been written, once


class Hanging(MemoryStore):
    """Hangs in *method* once `hangs` is set, until it is let go or, if it *breaks*, interrupted."""

    def __init__(self, method: str, *, breaks: bool) -> None:
        super().__init__()
        self._method, self._breaks = method, breaks
        self.hangs = False
        self.begun, self.let_go, self.told = (threading.Event() for _ in range(3))
        self._is_interrupted = False

    def _hang(self, method: str) -> None:
        if self.hangs and method == self._method:
            self.begun.set()
            self.let_go.wait()
            if self._is_interrupted:
                raise unavailable() from OSError("interrupted")

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        self._hang("commit")
        return super().commit(entries, now_us=now_us)

    def keys_since(self, revision: int) -> KeyChanges:
        self._hang("keys_since")
        return super().keys_since(revision)

    def interrupt(self) -> None:
        if self._breaks:
            self._is_interrupted = True
            self.hangs = False
            self.let_go.set()
        self.told.set()


@pytest.mark.parametrize("breaks", [True, False], ids=["is-broken-off", "cannot-be-broken-off"])
async def test_a_commit_that_hangs_is_503_for_all_who_wait(clock: HandClock, breaks: bool) -> None:
    store = Hanging("commit", breaks=breaks)
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    await serve(accounts)
    first = await acquire(accounts, FIXED, opening())
    second = await acquire(accounts, FIXED, opening())
    store.hangs = True
    closings = [asyncio.create_task(first.close(closing()))]
    await asyncio.to_thread(store.begun.wait)
    closings.append(asyncio.create_task(second.close(closing())))
    await asyncio.sleep(0)
    assert accounts.writable()

    clock.move(CALL_S_MAX)

    assert not accounts.writable()
    told = await asyncio.gather(*closings, return_exceptions=True)
    assert [type(one) for one in told] == [StoreUnavailable] * 2
    await asyncio.to_thread(store.told.wait)
    if not breaks:
        with pytest.raises(StoreUnavailable):
            await acquire(accounts, FIXED, opening())
    store.hangs = False
    store.let_go.set()
    await is_mended(accounts)
    accounts.stop()
    good = sum(row.status == 200 for row in store.rows)
    assert good == (2 if breaks else 3)  # what could not be broken off stands, once


async def test_a_read_of_keys_that_hangs_makes_the_store_unready(clock: HandClock) -> None:
    store = Hanging("keys_since", breaks=True)
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    store.hangs = True
    asking = asyncio.create_task(accounts.identify("anybody"))
    await asyncio.sleep(0)
    await asyncio.to_thread(store.begun.wait)

    clock.move(CALL_S_MAX)

    with pytest.raises(StoreUnavailable):
        await asking
    await asyncio.to_thread(store.told.wait)
    with pytest.raises(KeyInvalid):
        await accounts.identify("anybody")
    accounts.stop()
    assert accounts.writable()


class Faulty(MemoryStore):
    """Raises what no store should, for one request and for a group of nothing."""

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        ids = [entry.row.request_id for entry in entries if isinstance(entry, RecordUsage)]
        if not entries or "bad" in ids:
            raise ArithmeticError("a bug of ours")
        return super().commit(entries, now_us=now_us)


async def test_a_bug_in_one_entry_or_in_the_idle_check_ends_neither_its_neighbours_nor_the_thread(
    clock: HandClock,
) -> None:
    store = Faulty()
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    names = ("good", "bad", "better")
    bookings = [await acquire(accounts, FIXED, opening(name)) for name in names]
    closings = [booking.close(closing()) for booking in bookings]

    told = await asyncio.gather(*closings, return_exceptions=True)

    assert [type(one) for one in told] == [type(None), ArithmeticError, type(None)]
    await serve(accounts)
    accounts.stop()
    assert [row.request_id for row in store.rows[:2]] == ["good", "better"]
    assert len(store.rows) == 3
    assert accounts.writable()


class Miscounting(MemoryStore):
    """Returns too few outcomes once it `is_wrong`: a bug of ours that no entry is to blame for."""

    is_wrong = False

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        committed = super().commit(entries, now_us=now_us)
        return replace(committed, outcomes=[]) if self.is_wrong else committed


async def test_a_writer_thread_that_dies_is_told_of_and_nothing_more_is_served(
    clock: HandClock,
) -> None:
    store = Miscounting()
    accounts = Accounts(store, clock=clock, secret=b"s" * 32)
    accounts.start()
    lost = asyncio.create_task(accounts.lost())
    await serve(accounts)
    assert not lost.done()
    store.is_wrong = True

    with pytest.raises(StoreUnavailable):
        await serve(accounts)

    assert await lost == "the thread that writes the ledger has died: ValueError"
    assert not accounts.writable()
    with pytest.raises(StoreUnavailable):
        await serve(accounts)
    with pytest.raises(StoreUnavailable):
        await accounts.create_key(KeyPlan("t"))
    accounts.stop()
