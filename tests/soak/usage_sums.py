"""Good clients beside clients that ask for sums over a large ledger, on SQLite and on Postgres.

Run: python -m tests.soak.usage_sums [--seconds 60] [--rows 2000000] [--backend openvino|fake]

4 good clients send one short text after another, with a key whose limits are kept in the store. By
turns they are alone, and beside 8 clients, from a process of their own, that ask `/admin/v1/usage` by
key, model and day, of everything and of parts of days: the rows of those are read one by one. The good
ones' p99 may be 1.2 times as long.
"""

import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from itertools import cycle, islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import httpx
import psycopg
from benchmarks.figures import percentile
from benchmarks.load import Load, run_load
from benchmarks.texts import sentences
from tests.accounts.postgres import binaries, postgres_server
from tests.soak.report import Report, command
from tests.soak.stands import ACCESS, body_of, stand

from trivec.accounts.stores import open_administration
from trivec.accounts.stores.engines import SQLITE_FILE
from trivec.accounts.stores.migrations.v0003_counts_and_totals import FILL_DAILY
from trivec.accounts.utc import DAY_US, moment
from trivec.core.clock import SystemClock
from trivec.settings import Settings

GOOD, ASKING = 4, 8
TURNS = 4  # alone, beside, alone, beside
RATIO_MAX = 1.2
DAYS = 4
ALLOWANCE = 1_000_000_000  # never reached, but counted with every request

NUMBERS = {
    "sqlite": "(WITH RECURSIVE s(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM s WHERE n + 1 < {rows}) "
    "SELECT n FROM s)",
    "postgres": "generate_series(0, {rows} - 1) AS s(n)",
}
FILL_LEDGER = (
    "INSERT INTO ledger (time_us, request_id, key_id, model, input_count, token_count, status, "
    "duration_us) "
    "SELECT {since_us} + n * CAST({step_us} AS BIGINT), 'filled-' || n, 'key_' || n % 20, "
    "'model-' || n % 3, 1, 100 + n % 50, CASE WHEN n % 50 = 0 THEN 500 ELSE 200 END, 20000 "
    "FROM {numbers}"
)

Queries = list[dict[str, str]]
Execute = Callable[[str], object]


def fill(execute: Execute, dialect: str, *, rows: int, since_us: int) -> None:
    """Lay *rows* rows into an empty ledger, over `DAYS` days, and their sums into the daily totals."""
    execute(
        FILL_LEDGER.format(
            since_us=since_us,
            step_us=DAYS * DAY_US // rows,
            numbers=NUMBERS[dialect].format(rows=rows),
        )
    )
    in_parts = FILL_DAILY.replace("model, day, requests", "model, day, part, requests")
    execute(in_parts.replace("86400000000, count", "86400000000, 0, count"))


def fill_sqlite(folder: Path, *, rows: int, since_us: int) -> None:
    with open_administration(Settings(data_dir=folder), clock=SystemClock()):
        pass  # it makes the tables
    with closing(sqlite3.connect(folder / SQLITE_FILE)) as books:
        fill(books.execute, "sqlite", rows=rows, since_us=since_us)
        books.commit()
        books.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def fill_postgres(url: str, *, rows: int, since_us: int) -> None:
    with psycopg.connect(url, autocommit=True) as books:
        fill(
            lambda statement: books.execute(statement.encode()),
            "postgres",
            rows=rows,
            since_us=since_us,
        )
        books.execute("VACUUM ANALYZE")  # or it does so by itself while we measure


def queries(since_us: int) -> Queries:
    """Of everything, and from the middle of the first day to the middle of the last."""
    part = {
        "since": moment(since_us + DAY_US // 4).isoformat().replace("+00:00", "Z"),
        "until": moment(since_us + DAYS * DAY_US - DAY_US // 4).isoformat().replace("+00:00", "Z"),
    }
    return [{"by": by, **times} for times in ({}, part) for by in ("key", "model", "day")]


def askers(url: str, asked: Queries, seconds: float, pipe: Connection) -> None:
    """Be all clients that ask for sums; then say each one's status and seconds."""
    until_s = time.perf_counter() + seconds
    answers: list[tuple[int, float]] = []

    def ask(number: int) -> None:
        with httpx.Client(base_url=url, headers=ACCESS, timeout=120) as client:
            for count, query in enumerate(islice(cycle(asked), number, None)):
                began_s = time.perf_counter()
                if count and began_s >= until_s:  # each asks once, however slowly it came up
                    return
                status = client.get("/admin/v1/usage", params=query).status_code
                answers.append((status, time.perf_counter() - began_s))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(ASKING)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pipe.send(answers)


def turn(
    url: str, key: str, asked: Queries, seconds: float
) -> tuple[tuple[float, ...], list[tuple[int, float]]]:
    """How long the good clients waited, and the sums' answers; none are asked for without *asked*."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    crowd = context.Process(target=askers, args=(url, asked, seconds, theirs))
    if asked:
        crowd.start()
        time.sleep(1.5)  # it imports
    load = Load(f"{url}/v1/embeddings", [body_of(*sentences(1))], GOOD, seconds, key)
    latencies_s = run_load(load).latencies_s
    if not asked:
        return latencies_s, []
    sums = ours.recv()
    crowd.join()
    return latencies_s, sums


def measure(
    report: Report, name: str, server_url: str, *, rows: int, since_us: int, seconds: float
) -> None:
    """Any answer to a good client but 200 raises `LoadFailed`."""
    admin = httpx.Client(base_url=f"{server_url}/admin/v1", headers=ACCESS, timeout=120)
    with admin:
        found = admin.get("/usage", params={"by": "day"}).raise_for_status().json()["data"]
        plan = {"name": "good", "scopes": ["embed"], "requests_per_minute": ALLOWANCE}
        key = admin.post("/keys", json=plan).raise_for_status().json()["key"]
    missed = abs(rows - sum(line["requests"] for line in found))
    took_s: dict[bool, list[float]] = {False: [], True: []}
    sums: list[tuple[int, float]] = []
    turn(server_url, key, [], 2.0)
    for number in range(TURNS):
        beside = number % 2 == 1
        latencies_s, answers = turn(
            server_url, key, queries(since_us) if beside else [], seconds / 2
        )
        took_s[beside] += latencies_s
        sums += answers
    statuses = Counter(status for status, _ in sums)
    p99s_s = {beside: percentile(taken, 0.99) for beside, taken in took_s.items()}
    report.at_most(f"{name}: rows that the sums miss", missed, 0)
    report.at_least(f"{name}: sums answered 200", statuses[200], ASKING)
    report.at_most(f"{name}: sums not answered 200", statuses.total() - statuses[200], 0)
    report.at_most(f"{name}: p99 beside sums, to alone", p99s_s[True] / p99s_s[False], RATIO_MAX)
    sums_s = [sum_s for _, sum_s in sums]
    report.figures[name] = {
        "sums_a_second": round(len(sums) / seconds, 2),
        "sums_p50_ms": round(percentile(sums_s, 0.5) * 1e3, 1),
        "sums_p99_ms": round(percentile(sums_s, 0.99) * 1e3, 1),
        **{
            "beside" if beside else "alone": {
                "requests": len(taken),
                "p50_ms": round(percentile(taken, 0.5) * 1e3, 2),
                "p99_ms": round(p99s_s[beside] * 1e3, 2),
            }
            for beside, taken in took_s.items()
        },
    }


def run(seconds: float = 60.0, rows: int = 2_000_000, backend: str = "openvino") -> Report:
    report = Report()
    since_us = (time.time_ns() // 1000 // DAY_US - DAYS) * DAY_US
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill_sqlite(folder, rows=rows, since_us=since_us)
        with stand(folder, "--backend", backend) as server:
            measure(report, "sqlite", server.url, rows=rows, since_us=since_us, seconds=seconds)
    programs = binaries()
    if programs is None:
        report.figures["postgres"] = "not installed"
        return report
    with postgres_server(programs, is_durable=True) as books, tempfile.TemporaryDirectory() as name:
        url = books.upgraded_database()
        fill_postgres(url, rows=rows, since_us=since_us)
        environ = {"TRIVEC_DATABASE_URL": url}
        with stand(Path(name), "--backend", backend, environ=environ) as server:
            measure(report, "postgres", server.url, rows=rows, since_us=since_us, seconds=seconds)
    return report


if __name__ == "__main__":
    command("usage-sums", __doc__, run, seconds=60.0, rows=2_000_000, backend="openvino")
