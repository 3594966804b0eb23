"""Responses: bodies sent in pieces, and vectors written as JSON text or base64.

Vectors are most of every answer, so their bytes are written by hand with no Python loop over
numbers. Both forms of an array decode to the same numbers, to the last bit, in any client. Which
way is fastest was measured: decision 0050. Nothing is joined that a socket can take in turn.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import msgspec
import numpy as np
import pybase64
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from trivec.api.context import CONTEXT, RequestContext
from trivec.api.timeout import ClientDisconnected
from trivec.core.types import Float32Array, Int32Array, Output, Sequences, Vectors

HeaderList: TypeAlias = list[tuple[bytes, bytes]]
Encoding: TypeAlias = Literal["float", "base64"]

NO_STORE: HeaderList = [(b"cache-control", b"no-store")]
# Up to these sizes encoding is about 0.2 ms of work, and a thread would only add its hand-over.
IN_LINE_BYTES_MAX: Mapping[Encoding, int] = {"float": 64 * 1024, "base64": 512 * 1024}
# What one number takes in JSON on average, comma included; in base64 it is 16/3.
FLOAT_TEXT_BYTES = 22
INT_TEXT_BYTES = 8
ITEM_FRAME_BYTES = 128  # keys and punctuation around the numbers of one item
TOKEN_TEXT_BYTES = 12  # one vocabulary string in quotes, on average generously
ROWS_AT_ONCE = 64


class ApiResponse(Response):
    """Response whose body is a list of pieces, which the client must take in time.

    The server below has no deadline for writing, so one body would let a client that never reads
    hold it in memory for ever.
    """

    def __init__(  # Starlette's own would join the pieces and encode every header
        self,
        pieces: Sequence[bytes],
        *,
        status: int = 200,
        headers: Iterable[tuple[bytes, bytes]] = (),
        media_type: bytes = b"application/json",
    ) -> None:
        self.pieces = pieces
        self.status_code = status
        self.byte_count = sum(map(len, pieces))
        length = (b"content-length", b"%d" % self.byte_count)
        self.raw_headers = [(b"content-type", media_type), length, *headers]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. Raises `ClientDisconnected` for a client that takes it too slowly."""
        context: RequestContext = scope[CONTEXT]
        limits = context.app.limits
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        if scope["method"] == "HEAD" or self.byte_count <= limits.answer_chunk_bytes:
            body = b"" if scope["method"] == "HEAD" else b"".join(self.pieces)
            await send({"type": "http.response.body", "body": body})
            return
        loop = asyncio.get_running_loop()
        began_s, sent_bytes = loop.time(), 0
        for chunk in in_chunks(self.pieces, limits.answer_chunk_bytes):
            sent_bytes += len(chunk)
            # A bound for each chunk alone would let a client hold an answer for ever at one chunk
            # in half a minute, so all together have a rate, too. The kernel and the server below
            # hold some of it for the client.
            due_s = limits.answer_chunk_s_max + sent_bytes / limits.answer_bytes_per_s_min
            left_s = min(limits.answer_chunk_s_max, began_s + due_s - loop.time())
            more = sent_bytes < self.byte_count
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    await send({"type": "http.response.body", "body": chunk, "more_body": more})
            except TimeoutError:
                raise ClientDisconnected from None


def json_response(
    value: object, *, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()
) -> ApiResponse:
    """*value*, a msgspec structure or plain data, as a response."""
    return ApiResponse([msgspec.json.encode(value)], status=status, headers=headers)


def in_chunks(pieces: Sequence[bytes], chunk_bytes: int) -> Iterator[bytes]:
    """The same bytes in chunks of *chunk_bytes*, the last one smaller."""
    gathered = bytearray()
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            taken = min(len(rest), chunk_bytes - len(gathered))
            gathered += rest[:taken]
            rest = rest[taken:]
            if len(gathered) == chunk_bytes:
                yield bytes(gathered)
                gathered.clear()
    if gathered:
        yield bytes(gathered)


def to_base64(array: NDArray[np.generic]) -> bytes:
    """The array's bytes, little-endian and in C order, as padded base64."""
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    encoded: bytes = pybase64.b64encode(little)
    return encoded


def to_json(array: Float32Array | Int32Array) -> bytes:
    """The array as JSON lists, every float32 as the float64 that it is.

    Fewer digits would do to find the float32 again, but a client that reads float64s would then
    hold other numbers than from base64. Rows of a matrix go block by block: the temporaries stay
    small, and no call holds the interpreter's lock for long.
    """
    if array.ndim == 2 and len(array) > ROWS_AT_ONCE:
        blocks = (array[i : i + ROWS_AT_ONCE] for i in range(0, len(array), ROWS_AT_ONCE))
        return b"[%b]" % b",".join(to_json(block)[1:-1] for block in blocks)
    return msgspec.json.encode(array.tolist())


def leading_slice(dense: Float32Array, dimensions: int | None) -> Float32Array:
    """The first *dimensions* of each row, of length 1 again: `[sequences, dimensions]`.

    Dividing by the slice's own length undoes the model's normalisation of the whole row, so this
    equals truncating first and normalising after.
    """
    if dimensions is None or dimensions == dense.shape[1]:
        return dense
    sliced = dense[:, :dimensions]
    lengths = np.linalg.norm(sliced, axis=1, keepdims=True)
    unit: Float32Array = sliced / np.maximum(lengths, np.float32(1e-12))
    return unit


def estimate_bytes(
    outputs: Output,
    encoding: Encoding,
    *,
    rows: int,
    tokens: int,
    width: int,
    dimensions: int | None,
    with_strings: bool,
) -> tuple[int, int]:
    """What an answer takes at most, near enough, and what its vectors do as float32 and int32.

    *width* is the model's dimensions, *dimensions* those that were asked for.
    """
    float_bytes, int_bytes = 16 / 3, 16 / 3
    if encoding == "float":
        float_bytes, int_bytes = FLOAT_TEXT_BYTES, INT_TEXT_BYTES
    answer_bytes: float = rows * ITEM_FRAME_BYTES
    vector_bytes = 4 * rows * width
    if Output.DENSE in outputs:
        answer_bytes += rows * (dimensions or width) * float_bytes
    if Output.SPARSE in outputs:
        string_bytes = TOKEN_TEXT_BYTES if with_strings else 0
        answer_bytes += tokens * (float_bytes + int_bytes + string_bytes)
        vector_bytes += 8 * tokens
    if Output.MULTI in outputs:
        answer_bytes += (tokens - rows) * width * float_bytes
        vector_bytes += 4 * (tokens - rows) * width
    return int(answer_bytes), vector_bytes


def encode_embeddings(
    vectors: Vectors,
    sequences: Sequences,
    *,
    model: str,
    outputs: Output,
    encoding: Encoding,
    dimensions: int | None,
    token_strings: Sequence[list[str]] | None,  # [sequences]: of the sparse ids
) -> list[bytes]:
    """The body of an embeddings answer in pieces, one an input between the first and the last.

    Slow for large answers, which the caller encodes in a thread.
    """
    is_text = encoding == "float"
    write = to_json if is_text else lambda array: b'"%b"' % to_base64(array)
    encoding_key = b"" if is_text else b'"encoding":"base64",'
    no_vector = b"[]" if is_text else b'""'
    dense = leading_slice(vectors.dense, dimensions) if Output.DENSE in outputs else None
    sparse_rows = vectors.sparse if Output.SPARSE in outputs else ()
    multi_rows = vectors.multi if Output.MULTI in outputs else ()
    pieces = [b'{"object":"list","model":%b,"data":[' % msgspec.json.encode(model)]
    for i in range(len(vectors)):
        vector = no_vector if dense is None else write(dense[i])
        piece = b'%b{"object":"embedding","index":%d,"embedding":%b' % (
            b"," if i else b"",
            i,
            vector,
        )
        if sparse_rows and (sparse := sparse_rows[i]) is not None:
            strings = b""
            if token_strings is not None:
                strings = b',"tokens":' + msgspec.json.encode(token_strings[i])
            piece += b',"sparse_embedding":{%b"indices":%b,"values":%b%b}' % (
                encoding_key,
                write(sparse.token_ids),
                write(sparse.weights),
                strings,
            )
        if multi_rows and (multi := multi_rows[i]) is not None:
            shape = b'"shape":[%d,%d]' % multi.shape
            piece += b',"multi_embedding":{%b%b,"data":%b}' % (encoding_key, shape, write(multi))
        if i in sequences.truncated:
            cut = sequences.truncated[i]
            original = b"null" if cut.original_tokens is None else b"%d" % cut.original_tokens
            piece += b',"truncated":{"original_tokens":%b,"kept_tokens":%d}' % (
                original,
                cut.kept_tokens,
            )
        pieces.append(piece + b"}")
    tokens = sequences.token_count
    pieces.append(b'],"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (tokens, tokens))
    return pieces
