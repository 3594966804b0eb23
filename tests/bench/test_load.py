"""The load generator: it reads answers whole, counts only 200s, and says what went wrong."""

import json
import re
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count

import pytest
from benchmarks.load import Load, LoadFailed, run_load

BODY = json.dumps({"data": "A" * 300_000}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nServer-Timing: queue;dur=1.5, compute;dur=12.5\r\n"
LENGTH = re.compile(rb"content-length: (\d+)")


def sized(body: bytes) -> list[bytes]:
    return [HEAD + b"Content-Length: %d\r\n\r\n" % len(body), body[:1000], body[1000:]]


def chunked(body: bytes) -> list[bytes]:
    pieces = [body[at : at + 65536] for at in range(0, len(body), 65536)]
    framed = [b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces]
    return [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *framed, b"0\r\n\r\n"]


class Served:
    """What a scripted server heard, and where it listens."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.requests: list[bytes] = []
        self.has_hung_up = threading.Event()


@contextmanager
def server(answer: Callable[[], list[bytes]], *, keeps_alive: bool = True) -> Iterator[Served]:
    """Answers every request of every connection with the same pieces; [] hangs up."""
    listener = socket.create_server(("127.0.0.1", 0))
    served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}/v1/embeddings")

    def talk(connection: socket.socket) -> None:
        with connection:
            while request := read_request(connection):
                served.requests.append(request)
                pieces = answer()
                if not pieces:
                    return
                for piece in pieces:
                    connection.sendall(piece)
                if not keeps_alive:
                    break
        served.has_hung_up.set()

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=ignoring_resets(talk), args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def ignoring_resets(talk: Callable[[socket.socket], None]) -> Callable[[socket.socket], None]:
    """The load leaves when its time is up, in the middle of an answer if need be."""

    def quietly(connection: socket.socket) -> None:
        with suppress(OSError):
            talk(connection)

    return quietly


def read_request(connection: socket.socket) -> bytes:
    received = b""
    while not received.partition(b"\r\n\r\n")[1]:
        piece = connection.recv(65536)
        if not piece:
            return b""
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    length = LENGTH.search(head)
    assert length is not None
    while len(body) < int(length[1]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@pytest.mark.parametrize(
    "framing", [pytest.param(sized, id="with-a-length"), pytest.param(chunked, id="in-chunks")]
)
def test_an_answer_counts_when_its_last_byte_is_in(
    framing: Callable[[bytes], list[bytes]],
) -> None:
    with server(lambda: framing(BODY)) as served:
        answers = run_load(Load(served.url, [b"{}"], client_count=3, duration_s=0.1))
    assert len(answers.latencies_s) >= 1
    whole = sum(map(len, framing(BODY)))
    assert answers.bytes_received == whole * len(answers.latencies_s)
    assert answers.rate == len(answers.latencies_s) / answers.elapsed_s


def test_a_client_that_is_through_may_be_hung_up_on_while_another_waits() -> None:
    turns = count()

    def answer() -> list[bytes]:
        assert next(turns) == 0 or served.has_hung_up.wait(60)
        return sized(b"{}")

    with server(answer, keeps_alive=False) as served:
        answers = run_load(Load(served.url, [b"{}"], client_count=2, duration_s=0))
    assert len(answers.latencies_s) == 2


def test_what_the_server_says_it_computed_is_kept() -> None:
    with server(lambda: sized(b"{}")) as served:
        answers = run_load(Load(served.url, [b"{}"], client_count=1, duration_s=0.05))
    assert set(answers.compute_s) == {0.0125}
    assert len(answers.compute_s) == len(answers.latencies_s)


def test_bodies_go_round_and_the_key_goes_along() -> None:
    with server(lambda: sized(b"{}")) as served:
        bodies = [b'{"input": 1}', b'{"input": 2}']
        run_load(Load(served.url, bodies, client_count=3, duration_s=0, key="tv_x"))
    asked = Counter(one.rpartition(b"\r\n\r\n")[2] for one in served.requests)
    assert asked == {bodies[0]: 2, bodies[1]: 1}
    assert all(b"authorization: Bearer tv_x\r\n" in one for one in served.requests)


def test_a_body_larger_than_the_socket_takes_arrives_whole() -> None:
    body = b"[" + b"1," * 2_000_000 + b"1]"
    with server(lambda: sized(b"{}")) as served:
        run_load(Load(served.url, [body], client_count=2, duration_s=0.05))
    assert served.requests[0].endswith(b"\r\n\r\n" + body)


@pytest.mark.parametrize(
    ("pieces", "complaint"),
    [
        pytest.param([b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\n\r\n{}"], "503", id="a-refusal"),
        pytest.param([], "closed a connection", id="a-hang-up"),
        pytest.param([b"HTTP/1.1 200 OK\r\n\r\n"], "neither a length nor chunks", id="no-end"),
    ],
)
def test_anything_but_a_whole_200_stops_the_measurement(
    pieces: list[bytes], complaint: str
) -> None:
    with (
        server(lambda: pieces) as served,
        pytest.raises(LoadFailed, match=complaint),
    ):
        run_load(Load(served.url, [b"{}"], client_count=1, duration_s=0.1))
