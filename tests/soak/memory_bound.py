"""What clients can make the server hold: half-sent bodies, slow readers, large requests to tokenize.

Run: python -m tests.soak.memory_bound [--clients 1024] [--tokenizers 64] [--seconds 25]

One server with the real small model and default bounds, but for twice the connections, so that memory
is what runs out. Once each kind of client holds what it can, good traffic is measured beside it and divided
by its rate alone; the resident memory of the serving process is sampled throughout. The clients are one
process of plain sockets, which keeps nothing.
"""

import json
import selectors
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
from benchmarks.load import Load, run_load
from tests.process.server import Server, running
from tests.soak.report import Report, command
from tests.soak.service import MODEL
from tests.soak.stands import KEY, QUIET

GROWTH_MIB_MAX = 1024.0
RATE_RATIO_MIN = 0.8
CONNECTIONS_MAX = 2048
MEBIBYTE = 1024 * 1024
BODY_BYTES = 8 * MEBIBYTE
HALF_SENT_BYTES = 6 * MEBIBYTE
GOOD_CLIENTS = 4
GOOD_TEXTS = 8
GOOD_TEXT = "a question that is neither long nor short " * 4
READ_EVERY_S = 1.0
READ_BYTES = 12 * 1024  # each second, of an answer of 17 MB
PACE_BYTES_S = 64 * MEBIBYTE  # of all clients together, so that memory is what is measured
SAMPLE_EVERY_S = 0.05
SETTLE_S = 8.0  # what the few that are let in asked to be computed is work like any other


@dataclass(frozen=True, slots=True)
class Kind:
    """What each client of a kind sends, how many they are, and whether they read on."""

    name: str
    head: bytes
    body: bytes  # sent over and over until `byte_count` of it are out
    byte_count: int
    count: int


def kinds(clients: int, tokenizers: int) -> list[Kind]:
    texts = json.dumps({"model": MODEL, "input": ["a"] * 2048}).encode()
    counted = json.dumps({"model": MODEL, "input": ["!?" * 2020] * 2048}).encode()
    return [
        Kind(
            "half-sent bodies",
            _head("embeddings", BODY_BYTES),
            b'"' + b"a" * (MEBIBYTE - 1),
            HALF_SENT_BYTES,
            clients,
        ),
        Kind("slow readers", _head("embeddings", len(texts)), texts, len(texts), clients),
        Kind("tokenize", _head("tokenize", len(counted)), counted, len(counted), tokenizers),
    ]


def _head(route: str, length: int) -> bytes:
    return (
        f"POST /v1/{route} HTTP/1.1\r\nHost: bound\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {KEY}\r\nContent-Length: {length}\r\n\r\n"
    ).encode()


@dataclass(slots=True)
class _Client:
    connection: socket.socket
    unsent_head: bytes
    left: int
    status: str = "held"


def crowd(url: str, kind: Kind, pipe: Connection) -> None:
    """Be all clients of *kind* until told to end and all is sent; then say how many came to what."""
    address = urlsplit(url)
    selector = selectors.DefaultSelector()
    clients = []
    for _ in range(kind.count):
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        made.settimeout(30)
        made.connect((address.hostname, address.port))
        made.setblocking(False)
        client = _Client(made, kind.head, kind.byte_count)
        clients.append(client)
        selector.register(made, selectors.EVENT_WRITE, client)
    began_s, sent, read_s = time.monotonic(), 0, 0.0
    while not pipe.poll() or any(client.left for client in clients):
        now_s = time.monotonic()
        if sent < PACE_BYTES_S * (now_s - began_s):
            for key, _ in selector.select(READ_EVERY_S / 20):
                sent += _push(key.data, kind, selector)
        else:
            time.sleep(READ_EVERY_S / 100)
        if now_s - read_s >= READ_EVERY_S:
            read_s = now_s
            for client in clients:
                _read(client, selector)
    pipe.recv()
    time.sleep(READ_EVERY_S)  # for the last refusals
    for client in clients:
        _read(client, selector)
    pipe.send(dict(Counter(client.status for client in clients)))


def _push(client: _Client, kind: Kind, selector: selectors.BaseSelector) -> int:
    sent = 0
    try:
        if client.unsent_head:
            client.unsent_head = client.unsent_head[client.connection.send(client.unsent_head) :]
        else:
            at = (kind.byte_count - client.left) % len(kind.body)
            piece = memoryview(kind.body)[at : at + min(client.left, 64 * 1024)]
            sent = client.connection.send(piece)
            client.left -= sent
    except BlockingIOError:
        return 0
    except OSError:
        client.left = 0
    if not client.left and not client.unsent_head:
        selector.unregister(client.connection)
    return sent


def _read(client: _Client, selector: selectors.BaseSelector) -> None:
    """Take a little of the answer; of one that is a refusal nothing more is sent."""
    try:
        piece = client.connection.recv(READ_BYTES)
    except BlockingIOError:
        return
    except OSError:
        piece = b""
    if client.status != "held":
        return
    client.status = piece[9:12].decode() if piece.startswith(b"HTTP/1.1 ") else "cut"
    if client.status == "503" and b"retry-after:" not in piece.lower():
        client.status = "503 without retry-after"
    if client.status != "200" and client.left:
        selector.unregister(client.connection)
        client.left = 0
        client.connection.close()


@contextmanager
def crowd_of(url: str, kind: Kind) -> Iterator[dict[str, int]]:
    """All clients of *kind* beside the block; what came of them is in the dictionary at its end."""
    processes = get_context("spawn")
    ours, theirs = processes.Pipe()
    process = processes.Process(target=crowd, args=(url, kind, theirs))
    process.start()
    found: dict[str, int] = {}
    try:
        yield found
    finally:
        ours.send(None)
        found |= ours.recv()
        process.join()


class Memory:
    """The resident memory of a process, sampled by a thread."""

    def __init__(self, pid: int) -> None:
        self._file = Path(f"/proc/{pid}/statm")
        self.peak_mib = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def now_mib(self) -> float:
        return int(self._file.read_text().split()[1]) * 4096 / MEBIBYTE

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_EVERY_S):
            self.peak_mib = max(self.peak_mib, self.now_mib())

    def end(self) -> None:
        self._over.set()
        self._thread.join()


def good_rate(server: Server, duration_s: float) -> float:
    """Answers a second; any answer but 200 fails the form."""
    asked = {"model": MODEL, "input": [GOOD_TEXT] * GOOD_TEXTS, "encoding_format": "base64"}
    url = f"{server.url}/v1/embeddings"
    load = Load(url, [json.dumps(asked).encode()], GOOD_CLIENTS, duration_s, KEY)
    return run_load(load).rate


def run(
    clients: int = 1024,
    tokenizers: int = 64,
    seconds: float = 25.0,
    backend: str = "auto",
    memory_mib: int = 0,
) -> Report:
    report = Report()
    environ = {**QUIET, "TRIVEC_HTTP__CONNECTIONS_MAX": str(CONNECTIONS_MAX)}
    if memory_mib:  # else the default
        environ["TRIVEC_HTTP__MEMORY_BYTES_MAX"] = str(memory_mib * MEBIBYTE)
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder), "--backend", backend, environ=environ) as server,
    ):
        good_rate(server, min(SETTLE_S, seconds))
        memory = Memory(server.process.pid)
        idle_mib = memory.now_mib()
        report.figures["idle_mib"] = round(idle_mib, 1)
        try:
            for kind in kinds(clients, tokenizers):
                _meet(report, server, kind, memory=memory, idle_mib=idle_mib, seconds=seconds)
        finally:
            memory.end()
        report.at_most("peak memory above idle, MiB", memory.peak_mib - idle_mib, GROWTH_MIB_MAX)
        ready = httpx.get(f"{server.url}/readyz", timeout=30).status_code
        report.at_most("status of /readyz afterwards", ready, 200)
    return report


def _meet(
    report: Report,
    server: Server,
    kind: Kind,
    *,
    memory: Memory,
    idle_mib: float,
    seconds: float,
) -> None:
    alone = good_rate(server, seconds)
    memory.peak_mib, before_mib = 0.0, memory.peak_mib
    with crowd_of(server.url, kind) as found:
        good_rate(server, min(SETTLE_S, seconds))
        beside = good_rate(server, seconds)
    report.at_least(f"good traffic beside {kind.name}, to alone", beside / alone, RATE_RATIO_MIN)
    unexplained = found.get("503 without retry-after", 0) + found.get("500", 0)
    report.at_most(f"{kind.name} refused without a time to return", unexplained, 0)
    report.figures[kind.name] = {
        "clients": kind.count,
        "came_to": found,
        "peak_mib_above_idle": round(memory.peak_mib - idle_mib, 1),
        "rate_alone": round(alone, 1),
        "rate_beside": round(beside, 1),
    }
    memory.peak_mib = max(memory.peak_mib, before_mib)


if __name__ == "__main__":
    defaults = {"clients": 1024, "tokenizers": 64, "seconds": 25.0, "backend": "auto"}
    command("memory_bound", __doc__, run, **defaults, memory_mib=0)
