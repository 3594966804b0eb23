"""Good clients beside clients with a wrong key, on SQLite and on a Postgres that is 20 ms away.

Run: python -m benchmarks.soak.wrong_keys [--seconds 60] [--backend openvino|fake]

16 good clients send one list of 64 texts after another. By turns they are alone, and beside 4 clients
with a mistyped key and bursts of 1,000 wrong keys. The good ones' p99 may be 1.2 times as long.
"""

import asyncio
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from benchmarks.soak.report import Report, command
from benchmarks.soak.stands import ACCESS, body_of, stand
from tests.accounts.postgres import binaries, postgres_server
from tests.accounts.shelf import upgraded

from trivec.cli.bench.figures import percentile
from trivec.cli.bench.texts import sentences

GOOD, WRONG, TEXTS = 16, 4, 64
BURST, BURSTS, CONNECTIONS = 1000, 3, 100
ONE_WAY_S = 0.01
TURNS = 4  # alone, beside, alone, beside
RATIO_MAX = 1.2


@dataclass(slots=True)
class Turn:
    """What came of one stretch: statuses, and the good clients' seconds."""

    statuses: Counter[str] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)


@contextmanager
def far_away(port: int) -> Iterator[int]:
    """The port of a proxy before *port* that holds each piece back for `ONE_WAY_S`."""
    loop = asyncio.new_event_loop()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 16):
            loop.call_later(ONE_WAY_S, writer.write, piece)
        loop.call_later(ONE_WAY_S, writer.close)

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            there = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(pump(reader, there[1]), pump(there[0], writer))

    server = loop.run_until_complete(asyncio.start_server(join, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, name="proxy", daemon=True)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def turn(url: str, key: str, seconds: float, *, wrong: bool) -> Turn:
    seen = Turn()
    body = body_of(*sentences(TEXTS))
    limits = httpx.Limits(max_connections=CONNECTIONS)
    address = f"{url}/v1/embeddings"
    until_s = time.perf_counter() + seconds
    async with (  # pools of their own, so that nobody waits for another's connection
        httpx.AsyncClient(timeout=60) as theirs,
        httpx.AsyncClient(timeout=60, limits=limits) as strangers,
    ):

        async def send(who: str, key: str) -> None:
            access = {**ACCESS, "Authorization": f"Bearer {key}"}
            began_s = time.perf_counter()
            client = theirs if who == "good" else strangers
            answer = await client.post(address, content=body, headers=access)
            seen.statuses[f"{who} {answer.status_code}"] += 1
            if who == "good":
                seen.took_s.append(time.perf_counter() - began_s)

        async def live(who: str, key: str) -> None:
            while time.perf_counter() < until_s:
                await send(who, key)

        async def burst() -> None:
            for _ in range(BURSTS):
                await asyncio.sleep(seconds / (BURSTS + 1))
                await asyncio.gather(*(send("wrong", f"{key}{n}") for n in range(BURST)))

        clients = [live("good", key) for _ in range(GOOD)]
        if wrong:
            clients += [live("wrong", f"{key[:-1]}{n}!") for n in range(WRONG)] + [burst()]
        await asyncio.gather(*clients)
    return seen


def measure(report: Report, name: str, database: str | None, seconds: float, backend: str) -> None:
    environ = {} if database is None else {"TRIVEC_DATABASE_URL": database}
    turns = {False: Turn(), True: Turn()}
    with (
        tempfile.TemporaryDirectory() as folder,
        stand(Path(folder), "--backend", backend, environ=environ) as server,
    ):
        plan = {"name": "good", "scopes": ["embed"]}
        made = httpx.post(f"{server.url}/admin/v1/keys", json=plan, headers=ACCESS, timeout=30)
        key = made.raise_for_status().json()["key"]
        for number in range(TURNS):
            seen = asyncio.run(turn(server.url, key, seconds / 2, wrong=number % 2 == 1))
            turns[number % 2 == 1].statuses.update(seen.statuses)
            turns[number % 2 == 1].took_s += seen.took_s
    p99s_s = {wrong: percentile(one.took_s, 0.99) for wrong, one in turns.items()}
    undeserved = sum(
        count
        for one in turns.values()
        for status, count in one.statuses.items()
        if status not in ("good 200", "wrong 401")
    )
    report.at_most(f"{name}: answers that were not deserved", undeserved, 0)
    report.at_most(
        f"{name}: p99 beside wrong keys, to alone", p99s_s[True] / p99s_s[False], RATIO_MAX
    )
    report.figures[name] = {
        "beside" if wrong else "alone": {
            "p50_ms": round(percentile(one.took_s, 0.5) * 1e3, 1),
            "p99_ms": round(p99s_s[wrong] * 1e3, 1),
            "answers": dict(one.statuses),
        }
        for wrong, one in turns.items()
    }


def run(seconds: float = 60.0, backend: str = "openvino") -> Report:
    report = Report()
    measure(report, "sqlite", None, seconds, backend)
    folder = binaries()
    if folder is None:
        report.figures["postgres"] = "not installed"
        return report
    with postgres_server(folder) as server:
        database = upgraded(server.new_database())
        with far_away(server.port) as port:
            there = urlsplit(database)
            far = there._replace(netloc=there.netloc.replace(f":{server.port}", f":{port}"))
            measure(report, "postgres 20 ms away", far.geturl(), seconds, backend)
    return report


if __name__ == "__main__":
    command("wrong-keys", __doc__, run, seconds=60.0, backend="openvino")
