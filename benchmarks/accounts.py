"""What keys, allowances and the ledger cost a request, on a SQLite file: the last line is JSON.

`python -m benchmarks.accounts [--folder FOLDER] [--seconds S]`

Lone: one request after another, each identified, booked, its tokens reserved and billed; the
median is all that the room adds to a request. At 500 requests a second: the CPU time of this
process with the accounts minus without, as a share of the machine's cores, which is the share of
its throughput that a busy server pays. A key with both limits does the most work there is.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from itertools import count
from pathlib import Path

from trivec.accounts import Accounts, Allowance, Closing, KeyPlan, Opening
from trivec.accounts.stores import open_accounts
from trivec.core.clock import SystemClock
from trivec.settings import Settings

RATE = 500
LONE_REQUESTS = 1_000
TOKENS = 64
PLENTY = 1_000_000_000
P50_MS_MAX = 3.0
THROUGHPUT_SHARE_MAX = 0.05

_numbers = count()
Request = Callable[[], Awaitable[None]]


def request_of(accounts: Accounts, bearer: str) -> Request:
    """Everything that the HTTP room asks of the accounts for one good request."""

    async def request() -> None:
        caller = await accounts.identify(bearer)
        opening = Opening(f"bench-{os.getpid()}-{next(_numbers)}", "m", None, b"")
        booking = await accounts.open(caller, opening)
        await booking.reserve_tokens(TOKENS)
        await booking.close(Closing(200, 1, TOKENS, duration_s=0.001))

    return request


async def nothing() -> None:
    """A request to a server without accounts."""
    await asyncio.sleep(0)


async def lone_ms(request: Request) -> list[float]:
    """Milliseconds of each of many requests, one after another."""
    took = []
    for _ in range(LONE_REQUESTS):
        start_s = time.perf_counter()
        await request()
        took.append((time.perf_counter() - start_s) * 1000)
    return took


async def cores_used(request: Request, *, seconds: float) -> float:
    """Cores kept busy by `RATE` requests a second, arriving evenly whatever became of the last."""
    running: set[asyncio.Task[None]] = set()
    start_s, cpu_s = time.perf_counter(), time.process_time()
    for number in range(round(RATE * seconds)):
        await asyncio.sleep(max(0.0, start_s + number / RATE - time.perf_counter()))
        task = asyncio.ensure_future(request())
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    return (time.process_time() - cpu_s) / (time.perf_counter() - start_s)


async def measure(folder: Path, *, seconds: float) -> dict[str, float]:
    accounts = open_accounts(Settings(data_dir=folder), clock=SystemClock())
    accounts.start()
    free = await accounts.create_key(KeyPlan(f"free-{os.getpid()}"))
    limits = Allowance(PLENTY, PLENTY)
    limited = await accounts.create_key(KeyPlan(f"limited-{os.getpid()}", allowance=limits))
    cores = len(os.sched_getaffinity(0))
    figures: dict[str, float] = {"cores": cores}
    idle = await cores_used(nothing, seconds=seconds)
    for name, key in (("free", free), ("limited", limited)):
        request = request_of(accounts, key.plain)
        took = await lone_ms(request)
        busy = await cores_used(request, seconds=seconds)
        figures[f"{name}_lone_p50_ms"] = round(statistics.median(took), 3)
        figures[f"{name}_lone_p99_ms"] = round(statistics.quantiles(took, n=100)[98], 3)
        figures[f"{name}_share_at_{RATE}_rps"] = round((busy - idle) / cores, 4)
    await asyncio.to_thread(accounts.stop)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the SQLite file goes")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = asyncio.run(measure(Path(folder), seconds=options.seconds))
    within = all(figures[f"{name}_lone_p50_ms"] <= P50_MS_MAX for name in ("free", "limited"))
    cheap = figures[f"free_share_at_{RATE}_rps"] <= THROUGHPUT_SHARE_MAX
    print(json.dumps({"benchmark": "accounts", **figures, "p50_ok": within, "share_ok": cheap}))


if __name__ == "__main__":
    main()
