"""Sending an answer, in pieces that a client must take in time."""

import asyncio
from collections.abc import Iterator, Sequence

from starlette.types import Send

from trivec.api.answers import Answer
from trivec.api.presence import ClientGone
from trivec.settings import HttpLimits


async def send_answer(answer: Answer, send: Send, limits: HttpLimits, *, method: str) -> None:
    """Send *answer*; its body only if *method* is not HEAD. Raises `ClientGone` for a slow reader.

    The server below has no deadline for writing, so one body would let a client that never reads
    hold it in memory for ever.
    """
    length = answer.byte_count
    headers = [
        (b"content-type", answer.media_type),
        (b"content-length", b"%d" % length),
        *answer.headers,
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    if method == "HEAD":
        await send({"type": "http.response.body", "body": b""})
        return
    if length <= limits.answer_chunk_bytes:
        body = answer.body[0] if len(answer.body) == 1 else b"".join(answer.body)
        await send({"type": "http.response.body", "body": body})
        return
    loop = asyncio.get_running_loop()
    began_s, left = loop.time(), length
    for piece in in_pieces(answer.body, limits.answer_chunk_bytes):
        left -= len(piece)
        message = {"type": "http.response.body", "body": piece, "more_body": left > 0}
        try:
            async with asyncio.timeout(
                piece_s_max(limits, elapsed_s=loop.time() - began_s, byte_count=length - left)
            ):
                await send(message)
        except TimeoutError:
            raise ClientGone from None


def piece_s_max(limits: HttpLimits, *, elapsed_s: float, byte_count: int) -> float:
    """Seconds that the next piece may take, with which *byte_count* bytes are out in all.

    A piece by itself would let a client hold an answer for ever at one piece in half a minute, so
    all pieces together have a rate, too. The kernel and the server below hold some for the client.
    """
    due_s = limits.answer_chunk_s_max + byte_count / limits.answer_bytes_per_s_min
    return max(0.0, min(limits.answer_chunk_s_max, due_s - elapsed_s))


def in_pieces(body: Sequence[bytes], piece_bytes: int) -> Iterator[bytes]:
    """The same bytes in pieces of *piece_bytes*, the last one smaller."""
    gathered = bytearray()
    for part in body:
        rest = memoryview(part)
        while rest:
            taken = min(len(rest), piece_bytes - len(gathered))
            gathered += rest[:taken]
            rest = rest[taken:]
            if len(gathered) == piece_bytes:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)
