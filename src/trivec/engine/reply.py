"""From rows of batches back to one request's vectors, in the client's order. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trivec.core.types import Float32Array, SparseVector, Vectors


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a request's rows."""

    indices: Sequence[int]  # which of the request's sequences
    vectors: Vectors  # one row each, in that order


def slice_rows(vectors: Vectors, begin: int, end: int) -> Vectors:
    """Rows *begin* to *end*, as views."""
    return Vectors(vectors.dense[begin:end], vectors.sparse[begin:end], vectors.multi[begin:end])


def assemble(parts: Sequence[Part], sequence_count: int) -> Vectors:
    """All rows of a request, row i for its sequence i. Every index occurs in exactly one part."""
    first = parts[0]
    if len(parts) == 1 and first.indices == list(range(sequence_count)):
        return first.vectors
    dimensions = first.vectors.dense.shape[1]
    dense: Float32Array = np.empty((sequence_count, dimensions), np.float32)
    sparse: list[SparseVector | None] = [None] * sequence_count
    multi: list[Float32Array | None] = [None] * sequence_count
    for part in parts:
        dense[part.indices] = part.vectors.dense
        for row, i in enumerate(part.indices):
            sparse[i] = part.vectors.sparse[row]
            multi[i] = part.vectors.multi[row]
    return Vectors(dense, tuple(sparse), tuple(multi))


def unsound_rows(vectors: Vectors) -> list[int]:
    """Rows that hold NaN or infinity in any of their vectors."""
    unsound = set(np.flatnonzero(~np.isfinite(vectors.dense).all(axis=1)).tolist())
    for row, (sparse, multi) in enumerate(zip(vectors.sparse, vectors.multi, strict=True)):
        if sparse is not None and not np.isfinite(sparse.weights).all():
            unsound.add(row)
        if multi is not None and not np.isfinite(multi).all():
            unsound.add(row)
    return sorted(unsound)
