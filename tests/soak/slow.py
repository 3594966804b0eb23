"""Clients that are slow on purpose, and what good traffic notices of them.

Run: python -m tests.soak.slow [--clients 1000] [--bound-s 30]

As many clients drip a head, a fifth as many a body, and as many again never read their answer; each
kind by itself. Each must be let go of within the bound, which is the setting's default and can be
lowered; the good traffic's p99 is compared with that of the seconds before.
"""

import json
import os
import signal
import socket
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.load import Load, run_load
from tests.process.server import Server
from tests.soak.report import Report, command
from tests.soak.service import MODEL
from tests.soak.stands import COUNTED, KEY, body_of, stand

DEVICE_TOKENS_PER_S = 40_000
GOOD_CLIENTS = 4
GOOD_TEXTS = 8  # of 64 tokens: tens of ms a request, so that a p99 is not the noise of a core
GOOD_TEXT = "a question that is neither long nor short " * 7
BASELINE_S = 8.0
DRIP_S = 1.0
LOOK_EVERY_S = 0.25
LET_GO_S = 3.0  # beyond the bound, for the server to get round to it
READER_TEXTS = 64  # as floats half a megabyte: more than the stand's sockets take
SETTLE_S = 2.0  # for what slow readers asked to be computed: that is work like any other
HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: stand\r\nContent-Type: application/json\r\n"
    b"Authorization: Bearer " + KEY.encode() + b"\r\n"
)


@dataclass(frozen=True, slots=True)
class Kind:
    """How a client begins, and what it sends every second after that."""

    name: str
    opening: bytes
    drip: bytes
    share: float  # of the clients asked for


def kinds() -> list[Kind]:
    many = json.dumps({"model": MODEL, "input": ["a"] * READER_TEXTS}).encode()
    asked = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(many), many)
    return [
        Kind("slow heads", HEAD + b"X-Slow: ", b"a", 1.0),
        Kind("slow bodies", HEAD + b'Content-Length: 100000\r\n\r\n{"input":"', b"a", 0.2),
        Kind("slow readers", asked, b"", 0.2),
    ]


class Crowd:
    """Slow clients of one kind: opened at once, dripped on by a thread of their own."""

    def __init__(self, url: str, kind: Kind, count: int) -> None:
        address = urlsplit(url)
        self._kind = kind
        self._connections: list[socket.socket] = []
        self.longest_s = 0.0  # that one of them was held
        self.refused = 0
        for _ in range(count):
            made = socket.socket()
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            made.settimeout(60)
            made.connect((address.hostname, address.port or 80))
            made.sendall(kind.opening)
            made.setblocking(False)
            self._connections.append(made)
        self._began_s = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._drip)
        self._thread.start()

    @property
    def held(self) -> int:
        return len(self._connections)

    def _drip(self) -> None:
        while not self._over.wait(DRIP_S) and self._connections and self._kind.drip:
            self._connections = [one for one in self._connections if self._is_held(one)]

    def _is_held(self, one: socket.socket) -> bool:
        try:
            one.send(self._kind.drip)
            said = one.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            said = b""
        self.longest_s = max(self.longest_s, time.monotonic() - self._began_s)
        self.refused += said.startswith(b"HTTP/1.1 408 ")
        one.close()
        return False

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        for one in self._connections:
            one.close()


def good_p99_s(server: Server, duration_s: float) -> float:
    """The p99 of traffic that behaves; any answer but 200 fails the form."""
    body = body_of(*[GOOD_TEXT] * GOOD_TEXTS)
    load = Load(f"{server.url}/v1/embeddings", [body], GOOD_CLIENTS, duration_s, KEY)
    return run_load(load).latency_s(0.99)


def files_open(server: Server, *, asked_before: int) -> int:
    """What the serving process holds open."""
    os.kill(server.process.pid, signal.SIGUSR1)
    return int(server.wait_until_it_says(COUNTED.pattern, times=asked_before + 1)[3])


def _still_held(server: Server, before_files: int) -> int:
    """How many are held after `LET_GO_S`, or none as soon as it is none."""
    until_s, asked = time.monotonic() + LET_GO_S, 1
    while held := max(0, files_open(server, asked_before=asked) - before_files):
        if time.monotonic() >= until_s:
            break
        time.sleep(LOOK_EVERY_S)
        asked += 1
    return held


def run(clients: int = 1000, bound_s: float = 30.0) -> Report:
    report = Report()
    names = ("IDLE_S_MAX", "BODY_S_MAX", "ANSWER_CHUNK_S_MAX")
    environ = {f"TRIVEC_HTTP__{name}": str(round(bound_s)) for name in names}
    for kind in kinds():
        with (
            tempfile.TemporaryDirectory() as folder,
            stand(
                Path(folder), "--tokens-per-s", str(DEVICE_TOKENS_PER_S), environ=environ
            ) as server,
        ):
            _meet(report, server, kind, count=max(1, round(clients * kind.share)), bound_s=bound_s)
    return report


def _meet(report: Report, server: Server, kind: Kind, *, count: int, bound_s: float) -> None:
    before_s = good_p99_s(server, min(BASELINE_S, bound_s))
    before_files = files_open(server, asked_before=0)
    crowd = Crowd(server.url, kind, count)
    try:
        good_p99_s(server, SETTLE_S)
        beside_s = good_p99_s(server, max(1.0, bound_s - SETTLE_S))
        held = _still_held(server, before_files)
    finally:
        crowd.end()
    report.at_most(f"{kind.name} of {count} still held after {bound_s + LET_GO_S:g} s", held, 0)
    report.at_most(f"p99 of good traffic beside {kind.name}, to before", beside_s / before_s, 1.5)
    report.figures[kind.name] = {
        "clients": count,
        "answered_408": crowd.refused,
        "p99_before_ms": round(before_s * 1e3, 1),
        "p99_beside_ms": round(beside_s * 1e3, 1),
    }


if __name__ == "__main__":
    command("slow", __doc__, run, clients=1000, bound_s=30.0)
