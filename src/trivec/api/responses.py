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

from trivec.api.schemas import EmbeddingsRequest, Encoding
from trivec.core.types import Float32Array, Int32Array, ModelCard, Output, Sequences, Vectors

NO_STORE = {"cache-control": "no-store"}
# Up to these sizes encoding is about 0.2 ms of work, and a thread would only add its hand-over.
IN_LINE_BYTES_MAX: Mapping[Encoding, int] = {"float": 64 * 1024, "base64": 512 * 1024}
# What one number takes on average, in JSON with its comma.
FLOAT_TEXT_BYTES = 22
INT_TEXT_BYTES = 8
BASE64_BYTES = 16 / 3
ITEM_FRAME_BYTES = 128  # keys and punctuation around the numbers of one item
TOKEN_TEXT_BYTES = 12  # one vocabulary string in quotes, on average generously
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


def to_json(array: Float32Array | Int32Array) -> bytes:
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
    response_bytes: float = rows * ITEM_FRAME_BYTES
    vector_bytes = 4 * rows * card.dimensions
    if Output.DENSE in outputs:
        response_bytes += rows * (asked.dimensions or card.dimensions) * float_bytes
    if Output.SPARSE in outputs:
        string_bytes = TOKEN_TEXT_BYTES if asked.return_tokens else 0
        response_bytes += tokens * (float_bytes + int_bytes + string_bytes)
        vector_bytes += 8 * tokens
    if Output.MULTI in outputs:
        response_bytes += (tokens - rows) * card.dimensions * float_bytes
        vector_bytes += 4 * (tokens - rows) * card.dimensions
    return int(response_bytes), vector_bytes


def encode_embeddings(
    vectors: Vectors,
    sequences: Sequences,
    *,
    model: str,
    outputs: Output,
    encoding: Encoding,
    dimensions: int | None,
    token_strings: Sequence[list[str]] | None,  # [sequences]: of the sparse ids
) -> memoryview:
    """The body of an embeddings response; a large one is slow, so its caller encodes in a thread."""
    write = to_json if encoding == "float" else to_base64
    frame = {} if encoding == "float" else {"encoding": "base64"}
    no_vector: object = [] if encoding == "float" else ""
    dense = vectors.dense if Output.DENSE in outputs else None
    if dense is not None and dimensions not in (None, dense.shape[1]):
        # Dividing by the slice's own length undoes the model's normalisation of the whole row, so
        # this equals truncating first and normalising after.
        dense = dense[:, :dimensions]  # [sequences, dimensions]
        lengths = np.linalg.norm(dense, axis=1, keepdims=True)
        dense = dense / np.maximum(lengths, np.float32(1e-12))
    body = bytearray(b'{"object":"list","model":%b,"data":[' % _encoder.encode(model))
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
            data = msgspec.Raw(write(rows))
            item["multi_embedding"] = {**frame, "shape": rows.shape, "data": data}
        if i in sequences.truncated:
            item["truncated"] = sequences.truncated[i]
        if i:
            body += b","
        _encoder.encode_into(item, body, -1)
    tokens = sequences.token_count
    body += b'],"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (tokens, tokens)
    return memoryview(body)
