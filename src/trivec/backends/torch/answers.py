"""From what the device sent back to `Vectors`: cutting arrays, on the host, without copies."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivec.core.types import Batch, Float32Array, Int32Array, Output, SparseVector, Vectors


@dataclass(frozen=True, slots=True)
class Sent:
    """The arrays of one batch, on the host."""

    dense: Float32Array  # [sequences, hidden]
    sparse_keys: NDArray[np.int64] | None  # [rows]: sequence * vocabulary + token id, or unused
    sparse_weights: Float32Array | None  # [rows]: 0 in unused slots
    multi: Float32Array | None  # [rows, dimensions]


def to_vectors(sent: Sent, batch: Batch, vocabulary_size: int) -> Vectors:
    """One row a sequence; None where a sequence did not ask."""
    nothing = (None,) * len(batch)
    sparse: tuple[SparseVector | None, ...] = nothing
    if sent.sparse_keys is not None and sent.sparse_weights is not None:
        terms = _cut_sparse(sent.sparse_keys, sent.sparse_weights, len(batch), vocabulary_size)
        sparse = tuple(
            term if wants else None
            for term, wants in zip(terms, _wants(batch, Output.SPARSE), strict=True)
        )
    multi: tuple[Float32Array | None, ...] = nothing
    if sent.multi is not None:
        wants = _wants(batch, Output.MULTI)
        row_counts = np.where(wants, np.diff(batch.cu_seqlens) - 1, 0)
        rows = np.split(sent.multi, np.cumsum(row_counts)[:-1])
        multi = tuple(row if wanted else None for row, wanted in zip(rows, wants, strict=True))
    return Vectors.of(sent.dense, sparse, multi)


def _wants(batch: Batch, output: Output) -> NDArray[np.bool_]:
    wants: NDArray[np.bool_] = (batch.outputs & output.value) != 0  # [sequences]
    return wants


def _cut_sparse(
    keys: NDArray[np.int64], weights: Float32Array, sequence_count: int, vocabulary_size: int
) -> list[SparseVector]:
    """Each sequence's slots with a weight; NaN stays, so that whoever checks rows can see it."""
    used = ~(weights <= 0)
    keys, weights = keys[used], weights[used]
    token_ids: Int32Array = (keys % vocabulary_size).astype(np.int32)
    bounds = np.searchsorted(keys, np.arange(sequence_count + 1) * vocabulary_size)
    return [
        SparseVector(token_ids[first:last], weights[first:last])
        for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
    ]
