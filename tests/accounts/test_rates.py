"""Once its burst is spent, a key is let in as often as its limit says, whoever counts."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tests.accounts.processes import long_or_short
from tests.accounts.requests import closing, let_in, opening
from tests.accounts.shelf import sqlite_shelf
from tests.hand_clock import HandClock
from tests.process.server import Server, running

from trivec.accounts import Accounts, Allowance, Caller, KeyPlan
from trivec.accounts.stores import open_administration
from trivec.core.clock import SystemClock
from trivec.core.errors import AllowanceExhausted
from trivec.settings import Settings

LIMIT = 300
TIMES_OVER = 10
SECONDS = 60


async def is_let_in(accounts: Accounts, caller: Caller) -> bool:
    try:
        booking = await let_in(accounts, caller, opening())
    except AllowanceExhausted:
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
    new = await processes[0].create_key(KeyPlan("k", allowance=Allowance(LIMIT)))
    caller = await processes[0].identify(new.plain)
    burst = [await is_let_in(processes[n % 2], caller) for n in range(LIMIT + 10)]
    processes[1].stop()
    processes[1] = started()

    let_in = 0
    for number in range(LIMIT * TIMES_OVER):
        let_in += await is_let_in(processes[number % 2], caller)
        clock.move(SECONDS / LIMIT / TIMES_OVER)

    for accounts in processes:
        accounts.stop()
    shelf.close()
    assert burst == [True] * LIMIT + [False] * 10
    assert abs(let_in - LIMIT) <= LIMIT // 100


class Asker:
    """Asks a server again and again, no oftener than told."""

    def __init__(self, server: Server, key: str) -> None:
        self._client = httpx.Client(
            base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=30
        )

    def is_let_in(self) -> bool:
        body = {"model": "all-minilm-l6-v2", "input": "hello"}
        status = self._client.post("/v1/embeddings", json=body).status_code
        assert status in (200, 429)
        return status == 200

    def ask(self, *, seconds: float, rate: float) -> int:
        """How often it was let in."""
        let_in, started_s, asked = 0, time.monotonic(), 0
        while (elapsed_s := time.monotonic() - started_s) < seconds:
            if asked > elapsed_s * rate:
                time.sleep(asked / rate - elapsed_s)
                continue
            let_in += self.is_let_in()
            asked += 1
        self._client.close()
        return let_in


@pytest.mark.process
def test_two_servers_admit_what_the_limit_allows_at_ten_times_the_limit(tmp_path: Path) -> None:
    seconds = long_or_short(long=SECONDS, short=8)
    with open_administration(Settings(data_dir=tmp_path), clock=SystemClock()) as books:
        key = books.create_key(KeyPlan("k", allowance=Allowance(LIMIT))).plain
    environ = {"TRIVEC_LIFE__DRAIN_GRACE_S": "0", "TRIVEC_LOG_LEVEL": "error"}
    with (
        running(tmp_path, "--backend", "fake", environ=environ) as one,
        running(tmp_path, "--backend", "fake", environ=environ) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        first, began_s = Asker(one, key), time.monotonic()
        burst = 0
        while first.is_let_in():
            burst += 1
        refilled = (time.monotonic() - began_s) * LIMIT / SECONDS
        rate = LIMIT * TIMES_OVER / SECONDS / 2
        askers = [first, Asker(other, key)]
        asked = [threads.submit(asker.ask, seconds=seconds, rate=rate) for asker in askers]
        let_in = sum(one.result() for one in asked)

    assert LIMIT <= burst <= LIMIT + refilled + 1
    expected = LIMIT * seconds // SECONDS
    assert abs(let_in - expected) <= max(1, expected // 100)
