"""A lean HTTP load: many keep-alive clients, one thread, raw sockets.

It costs 8 to 13 µs an answer (`LOG.md`). Official clients cost more than the server they measure; here
a request is bytes made beforehand, and an answer is read to its end and its status looked at.
"""

import re
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from urllib.parse import urlsplit

from benchmarks.figures import percentile

from trivec.core.errors import StartError

RECEIVE_BYTES = 1 << 16
ANSWER_S_MAX = 120.0  # a client that waits longer has found a server that hangs
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_COMPUTE = re.compile(rb"compute;dur=([0-9.]+)")


class LoadFailed(StartError):
    """The server answered something else than 200, hung up, or fell silent."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is sent: each client sends its next body as soon as it has read its answer."""

    url: str  # http only: TLS would be what is measured
    bodies: Sequence[bytes]  # JSON, taken in turn by whichever client is free
    client_count: int
    duration_s: float  # no request is sent later; those sent are waited for
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Answers:
    """What came back: every request that was sent, each answered 200."""

    latencies_s: tuple[float, ...]  # [answers], in the order they came
    compute_s: tuple[float, ...]  # [answers], what `server-timing` says; empty where it is silent
    bytes_received: int
    elapsed_s: float  # from the first request to the last answer

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies_s) / self.elapsed_s

    def latency_s(self, share: float) -> float:
        return percentile(self.latencies_s, share)


@dataclass(slots=True)
class _Client:
    """One connection and the answer it is waiting for."""

    connection: socket.socket
    sent_at_s: float = 0.0
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    waits_to_send: bool = False
    received: bytearray = field(default_factory=bytearray)
    end: int | None = None  # length of the whole answer; None until the head is in, or chunked
    head_length: int = 0


def run_load(load: Load) -> Answers:
    """Keep *load* on the server for its duration; blocks. Raises `LoadFailed`."""
    address = urlsplit(load.url)
    requests = cycle(
        [_request(address.path, address.netloc, body, load.key) for body in load.bodies]
    )
    selector = selectors.DefaultSelector()
    clients: list[_Client] = []
    try:
        for _ in range(load.client_count):
            connection = socket.create_connection((address.hostname, address.port or 80), 5)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
            clients.append(_Client(connection))
        return _drive(load, clients, requests, selector)
    finally:
        selector.close()
        for client in clients:
            client.connection.close()


def _drive(
    load: Load, clients: list[_Client], requests: Iterator[bytes], selector: selectors.BaseSelector
) -> Answers:
    latencies: list[float] = []
    computes: list[float] = []
    bytes_received = 0
    started_s = last_s = time.perf_counter()
    for client in clients:
        selector.register(client.connection, selectors.EVENT_READ, client)
        _send(client, next(requests), selector)
    answers_due = len(clients)
    while answers_due:
        ready = selector.select(ANSWER_S_MAX)
        if not ready:
            raise LoadFailed(f"no answer for {ANSWER_S_MAX:g} s; is the server alive?")
        for key, events in ready:
            client = key.data
            if events & selectors.EVENT_WRITE:
                _push(client, selector)
            if not events & selectors.EVENT_READ or not _receive(client):
                continue
            last_s = time.perf_counter()
            latencies.append(last_s - client.sent_at_s)
            computed = _COMPUTE.search(client.received, 0, client.head_length)
            if computed:
                computes.append(float(computed[1]) / 1e3)
            bytes_received += len(client.received)
            if last_s - started_s < load.duration_s:
                _send(client, next(requests), selector)
            else:
                selector.unregister(client.connection)  # whether the server closes it or not
                answers_due -= 1
    return Answers(tuple(latencies), tuple(computes), bytes_received, last_s - started_s)


def _request(path: str, host: str, body: bytes, key: str | None) -> bytes:
    access = f"authorization: Bearer {key}\r\n" if key else ""
    head = (
        f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"{access}content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _send(client: _Client, request: bytes, selector: selectors.BaseSelector) -> None:
    client.received = bytearray()
    client.end = None
    client.head_length = 0
    client.unsent = memoryview(request)
    client.sent_at_s = time.perf_counter()
    _push(client, selector)


def _push(client: _Client, selector: selectors.BaseSelector) -> None:
    """Send what the socket takes; while something is left, ask to be told when it takes more."""
    with suppress(BlockingIOError):
        client.unsent = client.unsent[client.connection.send(client.unsent) :]
    if bool(client.unsent) != client.waits_to_send:
        client.waits_to_send = bool(client.unsent)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.waits_to_send else 0)
        selector.modify(client.connection, events, client)


def _receive(client: _Client) -> bool:
    """Read what is there; True when the answer is whole."""
    try:
        piece = client.connection.recv(RECEIVE_BYTES)
    except BlockingIOError:
        return False
    if not piece:
        raise LoadFailed("the server closed a connection that waited for an answer")
    client.received += piece
    if not client.head_length and not _read_head(client):
        return False
    if client.end is None:
        return client.received.endswith(b"\r\n0\r\n\r\n")
    return len(client.received) >= client.end


def _read_head(client: _Client) -> bool:
    head_end = client.received.find(b"\r\n\r\n")
    if head_end < 0:
        return False
    if not client.received.startswith(b"HTTP/1.1 200"):
        raise LoadFailed(f"answered {bytes(client.received[:600]).decode(errors='replace')}")
    client.head_length = head_end + 4
    length = _LENGTH.search(client.received, 0, head_end + 2)
    if length:
        client.end = client.head_length + int(length[1])
    elif not _CHUNKED.search(client.received, 0, head_end + 2):
        raise LoadFailed("an answer has neither a length nor chunks")
    return True
