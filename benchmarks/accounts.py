"""What keys, allowances and the ledger cost a request, on a SQLite file: the last line is JSON.

`python -m benchmarks.accounts [--folder FOLDER] [--seconds S]`

Lone: one request after another, each identified, booked, its tokens reserved and billed; the
median is all that the room adds to a request. Throughput: a server whose cores are all busy with
about 500 requests a second (each hashes for as long as a text would be embedded, off the event
loop, 16 connections), with accounts and without, in turns; the loss is one minus the ratio of their
processor times, which other work on the machine disturbs less than a count of requests. A key with
both limits does the most work there is.
"""

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from trivec.accounts import Accounts, KeyPlan, RateLimits, RequestMeta, RequestUsage
from trivec.accounts.stores import open_accounts
from trivec.core.clock import SystemClock
from trivec.settings import Settings

RATE = 500
LONE_REQUESTS = 1_000
TOKENS = 64
PLENTY = 1_000_000_000
P50_MS_MAX = 3.0
LOSS_MAX = 0.05
CONNECTIONS = 16
ROUNDS = 5

_numbers = count()
Request = Callable[[], Awaitable[None]]


def request_of(accounts: Accounts, bearer: str) -> Request:
    """Everything that the HTTP room asks of the accounts for one good request."""

    async def request() -> None:
        caller = await accounts.identify(bearer)
        opening = RequestMeta(f"bench-{os.getpid()}-{next(_numbers)}", "m")
        booking = accounts.reserve(caller, opening)
        await booking.acquire(tokens_follow=True)
        await booking.reserve_tokens(TOKENS)
        await booking.close(RequestUsage(200, 1, TOKENS, duration_s=0.001))

    return request


async def nothing() -> None:
    """A request to a server without accounts."""


async def lone_ms(request: Request) -> list[float]:
    """Milliseconds of each of many requests, one after another."""
    took = []
    for _ in range(LONE_REQUESTS):
        start_s = time.perf_counter()
        await request()
        took.append((time.perf_counter() - start_s) * 1000)
    return took


class Device:
    """Every core busy with work that holds no lock of Python's, as an engine's is."""

    def __init__(self, cores: int) -> None:
        self._pool = ThreadPoolExecutor(cores)
        self._block = bytes(1 << 20)
        start_s = time.perf_counter()
        for _ in range(50):
            hashlib.sha256(self._block)
        block_s = (time.perf_counter() - start_s) / 50
        self._size = round(len(self._block) * cores / RATE / block_s)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._pool, hashlib.sha256, memoryview(bytes(self._size)))


async def cpu_s(device: Device, request: Request, *, seconds: float) -> float:
    """Processor time of one request, over `CONNECTIONS` that each wait before they ask again."""
    deadline_s, start_s = time.perf_counter() + seconds, time.process_time()

    async def connection() -> int:
        served = 0
        while time.perf_counter() < deadline_s:
            await device.run()
            await request()
            served += 1
        return served

    served = sum(await asyncio.gather(*(connection() for _ in range(CONNECTIONS))))
    return (time.process_time() - start_s) / served


async def loss(device: Device, request: Request, *, seconds: float) -> float:
    """The median share of a busy machine's throughput that *request* costs, over rounds."""
    lost = []
    for _ in range(ROUNDS):
        without = await cpu_s(device, nothing, seconds=seconds / ROUNDS / 2)
        lost.append(1 - without / await cpu_s(device, request, seconds=seconds / ROUNDS / 2))
    return statistics.median(lost)


async def measure(folder: Path, *, seconds: float) -> dict[str, float]:
    accounts = open_accounts(Settings(data_dir=folder), clock=SystemClock())
    accounts.start()
    free = await accounts.create_key(KeyPlan("free"))
    limited = await accounts.create_key(KeyPlan("limited", limits=RateLimits(PLENTY, PLENTY)))
    cores = len(os.sched_getaffinity(0))
    device = Device(cores)
    figures: dict[str, float] = {"cores": cores}
    figures["rps_without"] = round(cores / await cpu_s(device, nothing, seconds=1))
    for name, key in (("free", free), ("limited", limited)):
        request = request_of(accounts, key.plain)
        took = await lone_ms(request)
        figures[f"{name}_lone_p50_ms"] = round(statistics.median(took), 3)
        figures[f"{name}_lone_p99_ms"] = round(statistics.quantiles(took, n=100)[98], 3)
        figures[f"{name}_throughput_loss"] = round(await loss(device, request, seconds=seconds), 4)
    await asyncio.to_thread(accounts.stop)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the SQLite file goes")
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        figures = asyncio.run(measure(Path(folder), seconds=options.seconds))
    within = all(figures[f"{name}_lone_p50_ms"] <= P50_MS_MAX for name in ("free", "limited"))
    cheap = all(figures[f"{name}_throughput_loss"] <= LOSS_MAX for name in ("free", "limited"))
    print(json.dumps({"benchmark": "accounts", **figures, "p50_ok": within, "loss_ok": cheap}))


if __name__ == "__main__":
    main()
