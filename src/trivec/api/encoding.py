"""Vectors into the bytes of an answer, written by hand because they are most of every answer.

Pure functions of arrays; slow for large answers, so the caller runs those in a thread. Each item
is one piece of bytes: nothing is joined that a socket can take in turn.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
import numpy as np

from trivec.api.numbers import FLOAT_TEXT_BYTES, INT_TEXT_BYTES, to_base64, to_json
from trivec.api.questions import EmbeddingsQuestion, Encoding
from trivec.core.errors import AnswerTooLarge
from trivec.core.types import (
    Float32Array,
    Int32Array,
    ModelCard,
    Output,
    Sequences,
    SparseVector,
    Truncated,
    Vectors,
)

ITEM_FRAME_BYTES = 128  # keys and punctuation around the numbers of one item
TOKEN_TEXT_BYTES = 12  # one vocabulary string in quotes, on average generously
Write: TypeAlias = Callable[[Float32Array | Int32Array], bytes]

# Up to these sizes encoding is about 0.2 ms of work, and a thread would only add its hand-over.
IN_LINE_BYTES_MAX: Mapping[Encoding, int] = {"float": 64 * 1024, "base64": 512 * 1024}


@dataclass(frozen=True, slots=True)
class Result:
    """All that an answer is made of."""

    question: EmbeddingsQuestion
    sequences: Sequences
    vectors: Vectors
    spelled: Sequence[list[str]] | None = None  # [sequences]: the strings of the sparse ids


def estimate_bytes(question: EmbeddingsQuestion, sequences: Sequences, card: ModelCard) -> int:
    """What the answer will take at most, near enough, before anything is computed."""
    rows = len(sequences)
    tokens = sequences.token_count
    as_text = question.encoding == "float"
    float_bytes = FLOAT_TEXT_BYTES if as_text else 16 / 3
    int_bytes = INT_TEXT_BYTES if as_text else 16 / 3
    size = _frame_and_dense_bytes(question, card)
    if Output.SPARSE in question.outputs:
        word_bytes = TOKEN_TEXT_BYTES if question.return_tokens else 0
        size += int(tokens * (float_bytes + int_bytes + word_bytes))
    if Output.MULTI in question.outputs:
        size += int((tokens - rows) * card.dimensions * float_bytes)
    return size


def _frame_and_dense_bytes(question: EmbeddingsQuestion, card: ModelCard) -> int:
    rows = len(question.inputs)
    float_bytes = FLOAT_TEXT_BYTES if question.encoding == "float" else 16 / 3
    size = rows * ITEM_FRAME_BYTES
    if Output.DENSE in question.outputs:
        size += int(rows * (question.dimensions or card.dimensions) * float_bytes)
    return size


def check_answer_fits(answer_bytes: int, *, answer_bytes_max: int) -> None:
    """Raise `AnswerTooLarge` for an estimate over the limit."""
    if answer_bytes > answer_bytes_max:
        raise AnswerTooLarge(answer_bytes=answer_bytes, answer_bytes_max=answer_bytes_max)


def estimate_dense_bytes(question: EmbeddingsQuestion, card: ModelCard) -> int:
    """What can be told before anything is tokenised: dense vectors, and their part of the answer."""
    return _frame_and_dense_bytes(question, card) + 4 * len(question.inputs) * card.dimensions


def estimate_vector_bytes(
    question: EmbeddingsQuestion, sequences: Sequences, card: ModelCard
) -> int:
    """What the vectors themselves will take, as float32 and int32."""
    rows, tokens = len(sequences), sequences.token_count
    size = 4 * rows * card.dimensions
    if Output.SPARSE in question.outputs:
        size += 8 * tokens
    if Output.MULTI in question.outputs:
        size += 4 * (tokens - rows) * card.dimensions
    return size


def encode(result: Result) -> list[bytes]:
    """The answer's body in pieces, one an input between the first and the last."""
    question, tokens = result.question, result.sequences.token_count
    pieces = [b'{"object":"list","model":%b,"data":[' % msgspec.json.encode(question.model)]
    pieces += _items(result)
    pieces.append(b'],"usage":{"prompt_tokens":%d,"total_tokens":%d}}' % (tokens, tokens))
    return pieces


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


def _items(result: Result) -> Iterator[bytes]:
    question, vectors = result.question, result.vectors
    write = to_json if question.encoding == "float" else _quoted_base64
    nothing = b"[]" if question.encoding == "float" else b'""'
    says = b"" if question.encoding == "float" else b'"encoding":"base64",'
    wants_dense = Output.DENSE in question.outputs
    dense = leading_slice(vectors.dense, question.dimensions)
    truncated = result.sequences.truncated
    for i in range(len(vectors)):
        parts = [
            b',{"object":"embedding","index":' if i else b'{"object":"embedding","index":',
            b'%d,"embedding":%b' % (i, write(dense[i]) if wants_dense else nothing),
        ]
        sparse, multi = vectors.sparse[i], vectors.multi[i]
        if sparse is not None and Output.SPARSE in question.outputs:
            spelled = result.spelled[i] if result.spelled else None
            parts.append(b',"sparse_embedding":{%b%b}' % (says, _sparse(sparse, write, spelled)))
        if multi is not None and Output.MULTI in question.outputs:
            shape = b'"shape":[%d,%d]' % multi.shape
            parts.append(b',"multi_embedding":{%b%b,"data":%b}' % (says, shape, write(multi)))
        if i in truncated:
            parts.append(_truncated(truncated[i]))
        parts.append(b"}")
        yield b"".join(parts)


def _sparse(sparse: SparseVector, write: Write, spelled: list[str] | None) -> bytes:
    tokens = b"" if spelled is None else b',"tokens":' + msgspec.json.encode(spelled)
    return b'"indices":%b,"values":%b%b' % (
        write(sparse.token_ids),
        write(sparse.weights),
        tokens,
    )


def _truncated(cut: Truncated) -> bytes:
    original = b"null" if cut.original_tokens is None else b"%d" % cut.original_tokens
    return b',"truncated":{"original_tokens":%b,"kept_tokens":%d}' % (original, cut.kept_tokens)


def _quoted_base64(array: Float32Array | Int32Array) -> bytes:
    return b'"%b"' % to_base64(array)
