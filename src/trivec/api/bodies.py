"""Reading a request's body within its bounds: declared type, bytes, pieces and seconds."""

import asyncio
from contextlib import suppress

from trivec.api.memory import PIECE_BYTES
from trivec.api.reading import shown
from trivec.api.visit import Visit
from trivec.core.errors import BodyTooLarge, MalformedBody, MediaTypeUnsupported
from trivec.settings import HttpLimits

BODY_TOO_SLOW = 408
PARSED_BYTES_A_BYTE = 2  # texts of one or two bytes a character, and token ids in arrays
SILENT_S_MAX = 2.0  # without a byte of a body that is only dropped


async def read_json_body(visit: Visit, limits: HttpLimits) -> bytes:
    """The body of a request that says it is JSON; else `MediaTypeUnsupported`, unread."""
    check_json_is_declared(visit)
    return await read_body(visit, limits)


def check_json_is_declared(visit: Visit) -> None:
    """Raise `MediaTypeUnsupported` unless the body says that it is plain JSON in UTF-8."""
    if visit.headers.get(b"content-type") == b"application/json" and (
        b"content-encoding" not in visit.headers
    ):
        return  # what nearly everyone sends
    content_encoding = visit.header(b"content-encoding")
    if content_encoding is not None and content_encoding.strip().lower() not in ("", "identity"):
        raise MediaTypeUnsupported(
            f"Content-Encoding {shown(content_encoding)} is not supported. Send the body as it is."
        )
    content_type = visit.header(b"content-type") or "nothing"
    kind, _, parameters = content_type.partition(";")
    charset = parameters.replace(" ", "").replace('"', "").lower().partition("charset=")[2]
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise MediaTypeUnsupported(
            f"Content-Type {shown(content_type)} is not supported. "
            "Send Content-Type: application/json, in UTF-8."
        )


async def read_body(visit: Visit, limits: HttpLimits) -> bytes:
    """The whole body. Raises `BodyTooLarge`, or `MalformedBody` if it breaks off.

    It is held in the budget as it arrives, and then with what parsing makes of it: `Overloaded`.

    How long it may take is bounded by the request's `Patience`. A declared length is refused before
    anything is read. Pieces are counted only where no length was declared: over a slow link every
    packet of an honest body is a piece.
    """
    declared = visit.headers.get(b"content-length")
    if declared is not None and declared.isdigit() and int(declared[:20]) > limits.body_bytes_max:
        raise _too_many_bytes(limits)
    assert visit.patience is not None, "a route that reads a body bounds its time"
    visit.is_reading_body = True
    visit.held.arrives(visit.patience.end)
    try:
        body = await _gather(visit, limits, counts_pieces=declared is None)
    finally:
        visit.is_reading_body = False
        visit.held.has_arrived()
    visit.held.shrink(len(body))
    visit.held.add(PARSED_BYTES_A_BYTE * len(body))
    return body


async def _gather(visit: Visit, limits: HttpLimits, *, counts_pieces: bool) -> bytes:
    pieces: list[bytes] = []
    while True:
        message = await visit.receive()
        if message["type"] != "http.request":  # a bad chunk looks like a client that left
            raise MalformedBody(
                "We could not parse the JSON body of your request (it broke off before its end). "
                "Send one JSON object in UTF-8."
            )
        if piece := message.get("body", b""):
            pieces.append(piece)
            visit.request_bytes += len(piece)
            visit.held.add(len(piece) + PIECE_BYTES)
        if visit.request_bytes > limits.body_bytes_max:
            raise _too_many_bytes(limits)
        if counts_pieces and len(pieces) > limits.body_chunks_max:
            raise BodyTooLarge(
                f"The request body came in more than {limits.body_chunks_max} chunks. "
                "Send it in larger ones, or with a Content-Length."
            )
        if not message.get("more_body", False):
            visit.is_body_read = True
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)


async def drop_rest_of_body(visit: Visit, limits: HttpLimits) -> None:
    """Read and drop what is left of the body of a request that has been answered.

    RequestUsage a connection with bytes unread resets it, and the client loses the answer that it has
    not read yet: most send all of a body before they look. Bounded in bytes, in seconds, and in
    seconds without a byte; whoever sends on after that is cut off.
    """
    if visit.is_body_read or not visit.declares_body or visit.waits_to_send:
        return
    is_slow = visit.status == BODY_TOO_SLOW
    dropped = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(SILENT_S_MAX if is_slow else limits.refused_body_s_max):
            while dropped < limits.refused_body_bytes_max:
                async with asyncio.timeout(SILENT_S_MAX):
                    message = await visit.receive()
                dropped += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return


def _too_many_bytes(limits: HttpLimits) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body has more than {limits.body_bytes_max:,} bytes. "
        "Split the input over several requests."
    )
