"""One SQLite file under several processes: nothing is lost, and nobody is refused who could wait."""

import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from tests.accounts.shelf import NOON_US, a_row
from tests.process.server import TRIVEC

from trivec.accounts import UsageBy, UsageQuery
from trivec.accounts.ledger import RecordUsage
from trivec.accounts.stores.engines import SQLITE_FILE, sqlite_engines
from trivec.accounts.stores.sql import SqlStore


def store_over(folder: Path) -> SqlStore:
    return SqlStore(sqlite_engines(folder / SQLITE_FILE), upgrades_itself=True)


def trivec(folder: Path, *words: str) -> str:
    """What a command says that shares a server's data folder and is done before the server is."""
    done = subprocess.run(
        [TRIVEC, *words, "--data-dir", str(folder)], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.process
def test_a_command_beside_a_server_takes_nothing_from_its_ledger(tmp_path: Path) -> None:
    """A server that lost its locks would go on in a journal that the command has deleted."""
    with closing(store_over(tmp_path)) as store:
        store.commit([RecordUsage(a_row("before"))], now_us=NOON_US)
        store.keys_since(0)  # on connections of their own, opened beside the one that writes
        trivec(tmp_path, "keys", "list")
        store.commit([RecordUsage(a_row("after"))], now_us=NOON_US)

        assert '"requests": 2' in trivec(tmp_path, "usage", "--json")


def test_stores_that_open_one_new_file_at_once_all_write_to_it(tmp_path: Path) -> None:
    stores = [store_over(tmp_path) for _ in range(4)]

    def write(number: int) -> None:
        for count in range(5):
            stores[number].commit([RecordUsage(a_row(f"r{number}-{count}"))], now_us=NOON_US)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    (line,) = stores[0].usage(UsageQuery(UsageBy.KEY))
    for store in stores:
        store.close()

    assert line.requests == 20


@pytest.fixture(params=["IMMEDIATE", "EXCLUSIVE"])
def lock(request: pytest.FixtureRequest) -> str:
    return f"BEGIN {request.param}"


@pytest.fixture
def locker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[sqlite3.Connection]":
    """Another process's connection, which lets go when somebody has begun to wait for it."""
    with closing(sqlite3.connect(tmp_path / SQLITE_FILE, isolation_level=None)) as raw:
        monkeypatch.setattr("trivec.accounts.stores.engines.time.sleep", lambda _: raw.rollback())
        yield raw


def test_whoever_opens_a_new_file_waits_for_a_lock(
    tmp_path: Path, locker: sqlite3.Connection, lock: str
) -> None:
    """SQLite itself does not: it turns to WAL at once or not at all."""
    locker.execute(lock)

    with closing(store_over(tmp_path)) as store:
        store.commit([RecordUsage(a_row("r1"))], now_us=NOON_US)

    assert not locker.in_transaction


def test_whoever_writes_waits_for_a_lock(
    tmp_path: Path, locker: sqlite3.Connection, lock: str
) -> None:
    with closing(store_over(tmp_path)) as store:
        store.prepare()
        locker.execute(lock)
        store.commit([RecordUsage(a_row("r1"))], now_us=NOON_US)

    assert not locker.in_transaction
