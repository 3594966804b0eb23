"""A store that cannot be written: nothing is served, nothing is ready, and it mends itself."""

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from subprocess import Popen

import pytest
from sqlalchemy import event
from tests.accounts.postgres import PostgresServer, binaries, postgres_server
from tests.accounts.processes import driver
from tests.accounts.requests import closing, opening
from tests.accounts.shelf import upgraded

from trivec.accounts import FIXED, Accounts, UsageBy, UsageQuery
from trivec.accounts.stores.connect import SQLITE_FILE, Engines, postgres_engines, sqlite_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.core.clock import SystemClock
from trivec.core.errors import StoreUnavailable


@asynccontextmanager
async def accounts_over(engines: Engines, *, upgrades_itself: bool) -> AsyncIterator[Accounts]:
    accounts = Accounts(
        SqlStore(engines, upgrades_itself=upgrades_itself), clock=SystemClock(), secret=b"s" * 32
    )
    accounts.start()
    yield accounts
    accounts.stop()


async def serve(accounts: Accounts) -> None:
    await (await accounts.open(FIXED, opening())).close(closing())


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
    await accounts.record(FIXED, opening(), closing(503))
    assert accounts.writable()
    await serve(accounts)


async def rows_of(accounts: Accounts) -> int:
    (line,) = await accounts.usage(UsageQuery(UsageBy.KEY))
    return line.requests - line.failed


async def test_a_locked_database(tmp_path: Path) -> None:
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
    raw.execute("PRAGMA max_page_count=40").close()


@contextmanager
def filled_up(engines: Engines) -> Iterator[None]:
    """SQLite reports a file that may not grow exactly as it does a disk that is full."""
    event.listen(engines.writing, "connect", _few_pages)
    yield
    event.remove(engines.writing, "connect", _few_pages)


@pytest.mark.process
def test_a_folder_that_is_read_only_for_a_while(tmp_path: Path) -> None:
    with driver(tmp_path, None, "ask", obeys_modes=True) as first:
        assert answer_of(first) == "200 writable"
    for file in tmp_path.iterdir():
        file.chmod(0o400)
    tmp_path.chmod(0o500)
    with driver(tmp_path, None, "ask", obeys_modes=True) as process:
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
def own_postgres() -> Iterator[PostgresServer]:
    """A server that this test alone may stop."""
    folder = binaries()
    if folder is None:
        pytest.skip("Postgres is not installed (no initdb on PATH or in /usr/lib/postgresql)")
    with postgres_server(folder) as server:
        yield server


async def test_postgres_that_stops_and_comes_back(own_postgres: PostgresServer) -> None:
    url = upgraded(own_postgres.new_database())
    async with accounts_over(postgres_engines(url), upgrades_itself=False) as accounts:
        await serve(accounts)
        own_postgres.stop()

        await is_refused(accounts)

        own_postgres.start()
        await is_mended(accounts)
        assert await rows_of(accounts) == 2


async def test_postgres_that_is_not_there_at_the_start(own_postgres: PostgresServer) -> None:
    url = upgraded(own_postgres.new_database())
    own_postgres.stop()
    async with accounts_over(postgres_engines(url), upgrades_itself=False) as accounts:
        await is_refused(accounts)
        assert await accounts.create_first_key() is None

        own_postgres.start()
        await is_mended(accounts)
