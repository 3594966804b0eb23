"""What only a socket shows: broken chunks, slow bodies, slow readers, early leavers."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
import pytest
from starlette.types import Message
from tests.api.house import MODEL, House

from trivec.settings import HttpLimits

LIMITS = HttpLimits(answer_chunk_bytes=4096)


@pytest.fixture(scope="module")
def piece_house() -> Iterator[House]:
    house = House(limits=LIMITS)
    yield house
    house.close()


@pytest.fixture(scope="module")
def piece_address(piece_house: House) -> Iterator[str]:
    with piece_house.listening() as address:
        yield address


@contextmanager
def connection(address: str) -> Iterator[socket.socket]:
    url = httpx.URL(address)
    with socket.create_connection((url.host, url.port or 80), timeout=60) as opened:
        yield opened


def head(house: House, *lines: str) -> bytes:
    return "\r\n".join(
        [
            "POST /v1/embeddings HTTP/1.1",
            "Host: house",
            f"Authorization: Bearer {house.key}",
            "Content-Type: application/json",
            *lines,
            "",
            "",
        ]
    ).encode()


def answer_to(sent: socket.socket) -> bytes:
    """All that comes back until the server closes, or until an answer with a length is whole."""
    received = b""
    while piece := sent.recv(65_536):
        received += piece
        top, found, body = received.partition(b"\r\n\r\n")
        if found and b"connection: close" not in top.lower():
            length = int(top.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            if len(body) >= length:
                break
    return received


def answer_to_half_a_body(house: House, address: str, framing: str, half: bytes) -> bytes:
    """What comes back once the time for a body is up and only *half* of it was sent."""
    with connection(address) as sent:
        sent.sendall(head(house, framing, "Expect: 100-continue"))
        assert b" 100 " in sent.recv(4096)  # the app is reading the body, and its time runs
        sent.sendall(half)
        house.let_pass(LIMITS.body_s_max)
        return answer_to(sent)


def test_a_body_that_does_not_arrive_in_time_is_408(piece_house: House, piece_address: str) -> None:
    answer = answer_to_half_a_body(piece_house, piece_address, "Content-Length: 100", b'{"model":')
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"type":"invalid_request_error"' in answer


def test_a_body_without_end_is_408(piece_house: House, piece_address: str) -> None:
    answer = answer_to_half_a_body(
        piece_house, piece_address, "Transfer-Encoding: chunked", b"1\r\n{\r\n"
    )
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_broken_chunk_is_400_in_our_own_shape(piece_house: House, piece_address: str) -> None:
    with connection(piece_address) as sent:
        sent.sendall(head(piece_house, "Transfer-Encoding: chunked") + b"5\r\nhello\r\nZZ\r\n")
        answer = answer_to(sent)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":null' in answer


def test_a_client_that_closes_its_sending_side_has_left(
    piece_house: House, piece_address: str
) -> None:
    """The HTTP library closes; nothing is left behind, and the next client is served."""
    body = b'{"model":"%b","input":"hello"}' % MODEL.encode()
    request = head(piece_house, f"Content-Length: {len(body)}") + body
    count = len(piece_house.heard.served)
    with connection(piece_address) as sent:
        sent.sendall(request)
        sent.shutdown(socket.SHUT_WR)
        while sent.recv(65_536):
            pass
    with connection(piece_address) as sent:
        sent.sendall(request)
        assert answer_to(sent).startswith(b"HTTP/1.1 200 ")
    assert piece_house.heard.wait(count + 1, within_s=60)


def test_a_body_declared_too_large_is_refused_before_it_is_sent(
    piece_house: House, piece_address: str
) -> None:
    with connection(piece_address) as sent:
        sent.sendall(head(piece_house, "Content-Length: 99999999999999999999999"))
        answer = answer_to(sent)
    assert answer.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 "))


def test_an_honest_body_in_small_pieces_is_read(piece_house: House, piece_address: str) -> None:
    body = b'{"model":"%b","input":"hello"}' % MODEL.encode()
    with connection(piece_address) as sent:
        sent.sendall(head(piece_house, f"Content-Length: {len(body)}"))
        for i in range(0, len(body), 5):
            sent.sendall(body[i : i + 5])
        assert answer_to(sent).startswith(b"HTTP/1.1 200 ")


def test_a_refused_key_does_not_have_to_send_its_body(piece_address: str) -> None:
    with connection(piece_address) as sent:
        sent.sendall(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: house\r\nContent-Length: 1000000\r\n\r\n"
        )
        assert answer_to(sent).startswith(b"HTTP/1.1 401 ")


def test_a_connection_serves_one_request_after_another(
    piece_house: House, piece_address: str
) -> None:
    body = b'{"model":"%b","input":"hello"}' % MODEL.encode()
    request = head(piece_house, f"Content-Length: {len(body)}") + body
    with connection(piece_address) as sent:
        for _ in range(3):
            sent.sendall(request)
            assert answer_to(sent).startswith(b"HTTP/1.1 200 ")


def test_a_large_answer_comes_whole_in_pieces(piece_house: House, piece_address: str) -> None:
    headers = {"authorization": f"Bearer {piece_house.key}"}
    body = {"model": MODEL, "input": ["text"] * 2048, "encoding_format": "base64"}
    response = httpx.post(f"{piece_address}/v1/embeddings", json=body, headers=headers, timeout=60)
    assert len(response.content) == int(response.headers["content-length"]) > 100_000
    assert len({datum["embedding"] for datum in response.json()["data"]}) == 1


async def test_no_piece_of_an_answer_is_larger_than_the_setting(piece_house: House) -> None:
    body = b'{"model":"%b","input":[%b]}' % (MODEL.encode(), b",".join([b'"text"'] * 300))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": body}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = {"authorization": f"Bearer {piece_house.key}", "content-type": "application/json"}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/embeddings",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    await piece_house.app(scope, receive, send)
    start, *pieces = sent
    sizes = [len(piece["body"]) for piece in pieces]
    assert sum(sizes) == int(dict(start["headers"])[b"content-length"])
    assert len(sizes) > 2
    assert set(sizes[:-1]) == {LIMITS.answer_chunk_bytes}
    assert [piece["more_body"] for piece in pieces] == [True] * (len(pieces) - 1) + [False]


def test_a_client_that_does_not_read_is_cut_off(piece_house: House, piece_address: str) -> None:
    heard = len(piece_house.heard.served)
    text = "x" * 60
    inputs = ",".join([f'"{text}"'] * 2048)
    body = b'{"model":"%b","output_type":"multi","input":[%b]}' % (MODEL.encode(), inputs.encode())
    with connection(piece_address) as sent:
        sent.sendall(head(piece_house, f"Content-Length: {len(body)}") + body)
        assert sent.recv(1, socket.MSG_PEEK), "the answer has begun to leave"
        let_pass_until_served(piece_house, heard + 1)
        received = answer_to_the_end(sent)
    served = piece_house.heard.served[heard]
    assert served.code == "client_gone"
    length = int(received.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert len(received) < length, "half an answer must not look whole"


def let_pass_until_served(house: House, count: int) -> None:
    """Again and again, for only what is already stuck is ended by time that passes."""
    for _ in range(600):
        house.let_pass(LIMITS.answer_chunk_s_max)
        if house.heard.wait(count, within_s=0.1):
            return
    pytest.fail("the server still holds the answer")


def answer_to_the_end(sent: socket.socket) -> bytes:
    received = bytearray()
    try:
        while piece := sent.recv(1 << 20):
            received += piece
    except ConnectionResetError:
        pass
    return bytes(received)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param([f"X: {'a' * 1_000_000}"], id="a-huge-field"),
        pytest.param([f"X{i}: a" for i in range(300)], id="a-host-of-fields"),
    ],
)
def test_a_head_too_large_is_431(fields: list[str], piece_house: House, piece_address: str) -> None:
    received = b"HTTP/1.1 431 "  # which a reset may overtake while we still send
    with connection(piece_address) as sent, suppress(ConnectionError):
        sent.sendall(head(piece_house, *fields))
        received = sent.recv(65_536)
    assert received.startswith(b"HTTP/1.1 431 ")


def test_a_head_that_does_not_end_is_cut_off_and_makes_room_for_others() -> None:
    """The cap on connections holds newcomers back, not out, and nobody keeps a place for ever."""
    house = House(limits=HttpLimits(connections_max=2, idle_s_max=1))
    try:
        with house.listening() as address, connection(address) as one, connection(address) as two:
            for held in (one, two):
                held.sendall(b"GET /livez HTTP/1.1\r\nHos")
            assert httpx.get(f"{address}/livez", timeout=60).status_code == 200
            for held in (one, two):
                with suppress(ConnectionResetError):  # where the server was quicker than our head
                    assert held.recv(1) == b""
    finally:
        house.close()
