"""Request body: read whole within its bounds of type, bytes, pieces and seconds."""

import asyncio
from contextlib import suppress

from trivec.api.context import RequestContext
from trivec.api.schemas import shown
from trivec.core.errors import BodyTooLarge, MalformedBody, MediaTypeUnsupported
from trivec.settings import HttpLimits

PARSED_BYTES_A_BYTE = 2  # texts of one or two bytes a character, and token ids in arrays
PIECE_BYTES = 64  # around each piece of a body, in CPython
SILENT_S_MAX = 2.0  # without a byte of a body that is only dropped
BODY_TOO_SLOW = 408


async def read_body(context: RequestContext, *, is_optional: bool = False) -> bytes:
    """The whole body of a request that says it is JSON; empty only where it *is_optional*.

    Raises `MediaTypeUnsupported`; `BodyTooLarge`, where a length is declared before anything is
    read; `MalformedBody` if it breaks off; `Overloaded` where the byte budget does not hold it and
    what parsing makes of it. How long it may take is bounded by the request's timeout.
    """
    limits, memory, timeout = context.app.limits, context.memory, context.timeout
    assert timeout is not None, "a route that reads a body bounds its time"
    if not is_optional:
        _check_is_json(context)
    if context.declared_bytes > limits.body_bytes_max:
        raise _too_many_bytes(limits)
    # Over a slow link every packet of an honest body is a piece, so pieces are bounded only where
    # no length bounds the body.
    has_length = b"content-length" in context.headers
    pieces: list[bytes] = []
    context.is_body_asked_for = timeout.is_reading_body = has_more = True
    try:
        while has_more:
            message = await context.receive()
            if message["type"] != "http.request":  # a bad chunk looks like a client that left
                raise MalformedBody(
                    "We could not parse the JSON body of your request (it broke off before its "
                    "end). Send one JSON object in UTF-8."
                )
            has_more = message.get("more_body", False)
            if piece := message.get("body", b""):
                pieces.append(piece)
                context.request_bytes += len(piece)
                if has_more and len(pieces) == 1:
                    memory.arrives(timeout.end)
                memory.add(len(piece) + PIECE_BYTES)
            if context.request_bytes > limits.body_bytes_max:
                raise _too_many_bytes(limits)
            if not has_length and len(pieces) > limits.body_chunks_max:
                raise BodyTooLarge(
                    f"The request body came in more than {limits.body_chunks_max} chunks. "
                    "Send it in larger ones, or with a Content-Length."
                )
    finally:
        timeout.is_reading_body = False
        memory.has_arrived()
    context.is_body_read = True
    body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
    memory.shrink(len(body))
    memory.add(PARSED_BYTES_A_BYTE * len(body))
    if is_optional and body:
        _check_is_json(context)
    return body


def _check_is_json(context: RequestContext) -> None:
    """Raise `MediaTypeUnsupported` unless the body says that it is plain JSON in UTF-8."""
    headers = context.headers
    if headers.get(b"content-type") == b"application/json" and b"content-encoding" not in headers:
        return  # what nearly every client sends
    content_encoding = context.header(b"content-encoding")
    if content_encoding is not None and content_encoding.strip().lower() not in ("", "identity"):
        raise MediaTypeUnsupported(
            f"Content-Encoding {shown(content_encoding)} is not supported. Send the body as it is."
        )
    content_type = context.header(b"content-type") or "nothing"
    kind, _, parameters = content_type.partition(";")
    charset = parameters.replace(" ", "").replace('"', "").lower().partition("charset=")[2]
    if kind.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
        raise MediaTypeUnsupported(
            f"Content-Type {shown(content_type)} is not supported. "
            "Send Content-Type: application/json, in UTF-8."
        )


async def drop_rest_of_body(context: RequestContext) -> None:
    """Read and drop what is left of the body of a request that has been answered.

    Closing a connection with bytes unread resets it, and the client loses the answer that it has
    not read yet: most clients send all of a body before they look. Bounded in bytes, in seconds,
    and in seconds without a byte; after that the connection is cut.
    """
    declares_none = context.headers.get(b"content-length", b"0") == b"0"
    has_body = not declares_none or b"transfer-encoding" in context.headers
    if context.is_body_read or not has_body or context.waits_for_100:
        return
    limits, dropped = context.app.limits, 0
    is_slow = context.status == BODY_TOO_SLOW
    with suppress(TimeoutError):
        async with asyncio.timeout(SILENT_S_MAX if is_slow else limits.refused_body_s_max):
            while dropped < limits.refused_body_bytes_max:
                async with asyncio.timeout(SILENT_S_MAX):
                    message = await context.receive()
                dropped += len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return


def _too_many_bytes(limits: HttpLimits) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body has more than {limits.body_bytes_max:,} bytes. "
        "Split the input over several requests."
    )
