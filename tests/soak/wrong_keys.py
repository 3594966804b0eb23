"""Good clients beside clients with a wrong key, on SQLite and on a Postgres that is 20 ms away.

Run: python -m tests.soak.wrong_keys [--seconds 60] [--backend openvino|fake]

16 good clients send one list of 64 texts after another. By turns they are alone, and beside 4 clients
with a mistyped key and bursts of 1,000 wrong keys on 100 connections, from a process of their own. The
good ones' p99 may be 1.2 times as long.
"""

import asyncio
import selectors
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from benchmarks.figures import percentile
from benchmarks.load import Answers, Load, run_load
from benchmarks.texts import sentences
from tests.accounts.postgres import binaries, postgres_server
from tests.soak.report import Report, command
from tests.soak.stands import ACCESS, body_of, stand

GOOD, WRONG, TEXTS = 16, 4, 64
BURST, BURSTS, CONNECTIONS = 1000, 3, 100
ONE_WAY_S = 0.01
TURNS = 4  # alone, beside, alone, beside
RATIO_MAX = 1.2


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


def strangers(url: str, key: str, seconds: float, pipe: Connection) -> None:
    """Be all clients with a wrong key for *seconds*; then say how often each status was answered.

    Plain sockets in a process of their own: what these clients cost must not be what is measured.
    """
    address = urlsplit(url)
    body = body_of(*sentences(TEXTS))
    selector = selectors.DefaultSelector()
    statuses: Counter[str] = Counter()
    numbers = count()
    began_s = time.perf_counter()
    bursts_s = [began_s + seconds * (n + 1) / (BURSTS + 1) for n in range(BURSTS)]
    left = [0] * WRONG + [0] * CONNECTIONS  # requests that each connection has yet to send
    received = [b""] * len(left)

    def connect(number: int) -> None:
        made = socket.create_connection((address.hostname, address.port), 30)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        selector.register(made, selectors.EVENT_READ, number)
        connections[number] = made

    def send(number: int) -> None:
        head = (
            f"POST /v1/embeddings HTTP/1.1\r\nHost: bound\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {key}{next(numbers)}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connections[number].sendall(head.encode() + body)

    connections: list[socket.socket] = [socket.socket() for _ in left]
    for number in range(len(left)):
        connect(number)
    for number in range(WRONG):
        send(number)
    waiting = WRONG
    while waiting:
        now_s = time.perf_counter()
        if bursts_s and now_s >= bursts_s[0]:
            bursts_s.pop(0)
            for number in range(WRONG, len(left)):
                if not left[number]:
                    waiting += 1
                    send(number)
                left[number] += BURST // CONNECTIONS
        for event, _ in selector.select(0.05):
            number = event.data
            piece = connections[number].recv(1 << 16)
            received[number] += piece
            if piece and not received[number].endswith(b"}}"):
                continue
            statuses[
                received[number].split(b" ", 2)[1].decode() if received[number] else "cut"
            ] += 1
            closing = not piece or b"connection: close" in received[number].lower()
            received[number] = b""
            if closing:
                selector.unregister(connections[number])
                connections[number].close()
                connect(number)
            left[number] = max(0, left[number] - 1)
            if left[number] or (number < WRONG and time.perf_counter() - began_s < seconds):
                send(number)
            else:
                waiting -= 1
    pipe.send(dict(statuses))


def turn(url: str, key: str, seconds: float, *, wrong: bool) -> tuple[Answers, dict[str, int]]:
    """The good clients' answers, and how often strangers were answered with each status."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    crowd = context.Process(target=strangers, args=(url, key, seconds, theirs))
    if wrong:
        crowd.start()
        time.sleep(1.0)
    load = Load(f"{url}/v1/embeddings", [body_of(*sentences(TEXTS))], GOOD, seconds, key)
    answers = run_load(load)
    if not wrong:
        return answers, {}
    statuses = ours.recv()
    crowd.join()
    return answers, statuses


def measure(report: Report, name: str, database: str | None, seconds: float, backend: str) -> None:
    """Any answer to a good client but 200 raises `LoadFailed`."""
    environ = {} if database is None else {"TRIVEC_DATABASE_URL": database}
    took_s: dict[bool, list[float]] = {False: [], True: []}
    texts_s: dict[bool, list[float]] = {False: [], True: []}
    statuses: Counter[str] = Counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        stand(Path(folder), "--backend", backend, environ=environ) as server,
    ):
        plan = {"name": "good", "scopes": ["embed"]}
        made = httpx.post(f"{server.url}/admin/v1/keys", json=plan, headers=ACCESS, timeout=30)
        key = made.raise_for_status().json()["key"]
        turn(server.url, key, 2.0, wrong=False)
        for number in range(TURNS):
            wrong = number % 2 == 1
            answers, theirs = turn(server.url, key, seconds / 2, wrong=wrong)
            took_s[wrong] += answers.latencies_s
            texts_s[wrong].append(answers.rate * TEXTS)
            statuses.update(theirs)
    p99s_s = {wrong: percentile(took, 0.99) for wrong, took in took_s.items()}
    report.at_most(f"{name}: wrong keys not answered 401", statuses.total() - statuses["401"], 0)
    report.at_most(
        f"{name}: p99 beside wrong keys, to alone", p99s_s[True] / p99s_s[False], RATIO_MAX
    )
    report.figures[name] = {
        "wrong keys a second": round(statuses.total() / seconds),
        **{
            "beside" if wrong else "alone": {
                "p50_ms": round(percentile(took_s[wrong], 0.5) * 1e3, 1),
                "p99_ms": round(p99s_s[wrong] * 1e3, 1),
                "texts_a_second": round(sum(texts_s[wrong]) / len(texts_s[wrong])),
            }
            for wrong in took_s
        },
    }


def run(seconds: float = 60.0, backend: str = "openvino") -> Report:
    report = Report()
    measure(report, "sqlite", None, seconds, backend)
    folder = binaries()
    if folder is None:
        report.figures["postgres"] = "not installed"
        return report
    with postgres_server(folder, is_durable=True) as server:
        database = server.upgraded_database()
        with far_away(server.port) as port:
            there = urlsplit(database)
            far = there._replace(netloc=there.netloc.replace(f":{server.port}", f":{port}"))
            measure(report, "postgres 20 ms away", far.geturl(), seconds, backend)
    return report


if __name__ == "__main__":
    command("wrong-keys", __doc__, run, seconds=60.0, backend="openvino")
