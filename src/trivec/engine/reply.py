"""From rows of batches back to one request's vectors, in the client's order. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trivec.core.types import Float32Array, Output, Row, Rows, SparseVector, Vectors


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a request's rows."""

    indices: Sequence[int]  # which of the request's sequences
    vectors: Vectors  # one row each, in that order


def slice_rows(vectors: Vectors, begin: int, end: int) -> Vectors:
    """Rows *begin* to *end*, as views."""
    return Vectors({output: rows[begin:end] for output, rows in vectors.rows.items()})


def assemble(parts: Sequence[Part], sequence_count: int) -> Vectors:
    """All rows of a request, row i for its sequence i. Every index occurs in exactly one part."""
    first = parts[0]
    if len(parts) == 1 and first.indices == list(range(sequence_count)):
        return first.vectors
    gathered: dict[Output, Rows] = {}
    for output in {output for part in parts for output in part.vectors.rows}:
        rows = first.vectors[output]
        if isinstance(rows, np.ndarray):
            array: Float32Array = np.empty((sequence_count, *rows.shape[1:]), np.float32)
            for part in parts:
                array[part.indices] = np.asarray(part.vectors[output])
            gathered[output] = array
            continue
        listed: list[Row | None] = [None] * sequence_count
        for part in parts:
            for i, row in zip(part.indices, part.vectors[output], strict=True):
                listed[i] = row
        gathered[output] = tuple(listed)
    return Vectors(gathered)


def unsound_rows(vectors: Vectors) -> list[int]:
    """Rows that hold NaN or infinity in any of their vectors."""
    unsound: set[int] = set()
    for rows in vectors.rows.values():
        if isinstance(rows, np.ndarray):
            is_finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
            unsound.update(np.flatnonzero(~is_finite).tolist())
            continue
        for i, row in enumerate(rows):
            numbers = row.weights if isinstance(row, SparseVector) else row
            if numbers is not None and not np.isfinite(numbers).all():
                unsound.add(i)
    return sorted(unsound)
