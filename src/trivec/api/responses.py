"""Responses: JSON, and vectors in it as JSON text or base64.

Vectors are most of every response, so no Python loop touches their numbers. Both forms of an array
decode to the same numbers, to the last bit, in any client. Which way is fastest was measured:
decision 0006.
"""

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np
import pybase64
from numpy.typing import NDArray
from starlette.responses import Response

from trivec.api.rules import of_length_one
from trivec.api.schemas import Chunk, EmbeddingsRequest, Encoding
from trivec.core.quantisation import cut, quantise
from trivec.core.types import ModelCard, Output, Sequences, Vectors

NO_STORE = {"cache-control": "no-store"}
# Up to these sizes encoding is about 0.2 ms of work, and a thread would only add its hand-over.
IN_LINE_BYTES_MAX: Mapping[Encoding, int] = {"float": 64 * 1024, "base64": 512 * 1024}
# What one number takes on average, in JSON with its comma.
FLOAT_TEXT_BYTES = 22
INT_TEXT_BYTES = 8
BYTE_TEXT_BYTES = 5  # -128,
BASE64_BYTES = 16 / 3
ITEM_FRAME_BYTES = 128  # keys and punctuation around the numbers of one item
TOKEN_TEXT_BYTES = 12  # one vocabulary string in quotes, on average generously
SPLADE_TERMS = 512  # of a text whose words may be any of the vocabulary: usual are 100 to 300
ROWS_AT_ONCE = 64
_encoder = msgspec.json.Encoder()


def json_response(
    value: object, *, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """*value*, a msgspec structure or plain data, as a response."""
    return Response(_encoder.encode(value), status, headers, media_type="application/json")


def to_base64(array: NDArray[np.generic]) -> bytes:
    """The array's bytes, little-endian and in C order, as padded base64 in quotes."""
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return b'"%b"' % pybase64.b64encode(little)


def to_json(array: NDArray[np.generic]) -> bytes:
    """The array as JSON lists, every float32 as the float64 that it is.

    Fewer digits would do to find the float32 again, but a client that reads float64s would then
    hold other numbers than from base64. Rows of a matrix go block by block: the temporaries stay
    small, and no call holds the interpreter's lock for long.
    """
    if array.ndim == 2 and len(array) > ROWS_AT_ONCE:
        blocks = (array[i : i + ROWS_AT_ONCE] for i in range(0, len(array), ROWS_AT_ONCE))
        return b"[%b]" % b",".join(to_json(block)[1:-1] for block in blocks)
    return _encoder.encode(array.tolist())


def estimate_bytes(
    asked: EmbeddingsRequest, outputs: Output, card: ModelCard, *, rows: int, tokens: int
) -> tuple[int, int]:
    """What a response takes at most, near enough, and what its vectors do as float32 and int32."""
    is_text = asked.encoding == "float"
    float_bytes = FLOAT_TEXT_BYTES if is_text else BASE64_BYTES
    int_bytes = INT_TEXT_BYTES if is_text else BASE64_BYTES
    number_bytes = float_bytes  # of dense and multi vectors
    if asked.dtype != "float":
        number_bytes = BYTE_TEXT_BYTES if is_text else BASE64_BYTES / 4
        number_bytes /= 8 if asked.dtype in ("binary", "ubinary") else 1
    response_bytes: float = rows * ITEM_FRAME_BYTES
    vector_bytes = 4 * rows * card.dimensions
    if Output.DENSE in outputs:
        response_bytes += rows * (asked.size or card.dimensions) * number_bytes
    if Output.SPARSE in outputs:
        string_bytes = TOKEN_TEXT_BYTES if asked.return_tokens else 0
        terms = tokens if Output.DENSE in card.outputs else rows * SPLADE_TERMS
        response_bytes += terms * (float_bytes + int_bytes + string_bytes)
        vector_bytes += 8 * terms
    if Output.MULTI in outputs:
        response_bytes += (tokens - rows) * card.dimensions * number_bytes
        vector_bytes += 4 * (tokens - rows) * card.dimensions
    return int(response_bytes), vector_bytes


def encode_embeddings(
    vectors: Vectors,
    sequences: Sequences,
    *,
    asked: EmbeddingsRequest,
    outputs: Output,
    token_strings: Sequence[list[str]] | None,  # [sequences]: of the sparse ids
    token_encoding: str | None,
    chunks: Sequence[Chunk] = (),  # of each row, where texts were cut into them
) -> memoryview:
    """The body of an embeddings response; a large one is slow, so its caller encodes in a thread.

    Raises `FieldInvalid` where vectors of length 1 are to be others.
    """
    write = to_json if asked.encoding == "float" else to_base64
    frame = {} if asked.encoding == "float" else {"encoding": "base64"}
    no_vector: object = [] if asked.encoding == "float" else ""
    dense: NDArray[np.generic] | None = None  # [sequences, numbers]
    if Output.DENSE in outputs:
        numbers = vectors.dense
        if asked.size is not None:
            numbers = cut(numbers, asked.size)
        if asked.normalized is not None:
            numbers = of_length_one(numbers, wanted=asked.normalized, param="normalized")
        dense = numbers if asked.dtype == "float" else quantise(numbers, asked.dtype)
    body = bytearray(b'{"object":"list","model":%b,"data":[' % _encoder.encode(asked.model))
    for i, (terms, rows) in enumerate(zip(vectors.sparse, vectors.multi, strict=True)):
        item: dict[str, object] = {
            "object": "embedding",
            "index": i,
            "embedding": no_vector if dense is None else msgspec.Raw(write(dense[i])),
        }
        if terms is not None:
            item["sparse_embedding"] = {
                **frame,
                "indices": msgspec.Raw(write(terms.token_ids)),
                "values": msgspec.Raw(write(terms.weights)),
                **({} if token_strings is None else {"tokens": token_strings[i]}),
            }
        if rows is not None:
            own = rows if asked.dtype == "float" else quantise(rows, asked.dtype)
            data = msgspec.Raw(write(own))
            item["multi_embedding"] = {**frame, "shape": own.shape, "data": data}
        if i in sequences.truncated:
            item["truncated"] = sequences.truncated[i]
        if chunks:
            item["chunk"] = chunks[i]
        if i:
            body += b","
        _encoder.encode_into(item, body, -1)
    tokens = sequences.token_count
    body += b'],"usage":{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    if token_encoding is not None:
        body += b',"token_encoding":%b' % _encoder.encode(token_encoding)
    body += b"}"
    return memoryview(body)
