"""Once its burst is spent, a key is let in as often as its limit says, whoever counts."""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tests.accounts.processes import long_or_short
from tests.accounts.requests import acquire, closing, opening
from tests.accounts.shelf import sqlite_shelf
from tests.hand_clock import HandClock
from tests.process.server import Server, started

from trivec.accounts import Accounts, Key, KeyPlan, RateLimits
from trivec.accounts.stores import open_administration
from trivec.core.clock import SystemClock
from trivec.core.errors import RateLimitExceeded
from trivec.settings import Settings

LIMIT = 300
TIMES_OVER = 10
SECONDS = 60


async def is_let_in(accounts: Accounts, caller: Key) -> bool:
    try:
        booking = await acquire(accounts, caller, opening())
    except RateLimitExceeded:
        return False
    await booking.close(closing())
    return True


async def test_two_processes_share_a_limit_that_no_restart_refills(tmp_path: Path) -> None:
    clock, shelf = HandClock(), sqlite_shelf(tmp_path)

    def started() -> Accounts:
        accounts = Accounts(shelf.open(), clock=clock, secret=b"s" * 32)
        accounts.start()
        return accounts

    processes = [started(), started()]
    new = await processes[0].create_key(KeyPlan("k", limits=RateLimits(LIMIT)))
    caller = await processes[0].identify(new.plain)
    burst = [await is_let_in(processes[n % 2], caller) for n in range(LIMIT + 10)]
    processes[1].stop()
    processes[1] = started()

    acquire = 0
    for number in range(LIMIT * TIMES_OVER):
        acquire += await is_let_in(processes[number % 2], caller)
        clock.move(SECONDS / LIMIT / TIMES_OVER)

    for accounts in processes:
        accounts.stop()
    shelf.close()
    assert burst == [True] * LIMIT + [False] * 10
    assert abs(acquire - LIMIT) <= LIMIT // 100


class HandTime:
    """The time of servers in other processes, moved by hand: see `hand_timed`."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_CREAT | os.O_WRONLY, 0o600)
        self._now_us = 0
        self.move(1_000)

    def move(self, seconds: float) -> None:
        self._now_us += round(seconds * 1_000_000)
        os.pwrite(self._file, self._now_us.to_bytes(8, "little"), 0)

    def close(self) -> None:
        os.close(self._file)


@pytest.fixture
def servers(tmp_path: Path) -> "Iterator[tuple[list[Server], HandTime]]":
    """Two servers over one data folder, and their time."""
    file = tmp_path / "time"
    program = str(Path(__file__).with_name("hand_timed.py"))
    command = [sys.executable, program, str(tmp_path / "data"), str(file)]
    time = HandTime(file)
    with started(command) as one, started(command) as other:
        yield [one, other], time
    time.close()


def is_let_in_by(client: httpx.Client) -> bool:
    body = {"model": "all-minilm-l6-v2", "input": "hello"}
    status = client.post("/v1/embeddings", json=body).status_code
    assert status in (200, 429)
    return status == 200


@pytest.mark.process
def test_two_servers_admit_what_the_limit_allows_at_ten_times_the_limit(
    tmp_path: Path, servers: tuple[list[Server], HandTime]
) -> None:
    both, time = servers
    seconds = long_or_short(long=SECONDS, short=12)
    with open_administration(Settings(data_dir=tmp_path / "data"), clock=SystemClock()) as books:
        key = books.create_key(KeyPlan("k", limits=RateLimits(LIMIT))).plain
    access = {"Authorization": f"Bearer {key}"}
    with (
        httpx.Client(base_url=both[0].url, headers=access, timeout=60) as one,
        httpx.Client(base_url=both[1].url, headers=access, timeout=60) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        burst = 0
        while burst <= LIMIT and is_let_in_by(one):
            burst += 1
        acquire = 0
        for _ in range(LIMIT * TIMES_OVER * seconds // SECONDS // 2):
            time.move(2 * SECONDS / LIMIT / TIMES_OVER)
            acquire += sum(threads.map(is_let_in_by, [one, other]))

    assert burst == LIMIT
    expected = LIMIT * seconds // SECONDS
    assert abs(acquire - expected) <= max(1, expected // 100)
