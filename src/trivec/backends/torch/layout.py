"""Where each token of a batch stands, worked out on the host and carried over in one copy.

Pure numpy. A layout may be rounded up to a shape that was captured before: filler tokens form one
sequence of their own after the real ones, so no real token ever sees them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivec.core.types import Batch, BatchBudget, Int32Array, Output

ROWS = 4  # token_ids, positions, token_types, owners


@dataclass(frozen=True, slots=True)
class Shape:
    """How many tokens and sequences a layout has, filler included."""

    token_count: int
    sequence_count: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch as the encoder reads it.

    `words` holds, end to end, `token_ids`, `positions`, `token_types`, `owners` (the sequence a
    token is of), each `[tokens]`, and `starts [sequences + 1]`.
    """

    shape: Shape
    words: Int32Array  # [4 * tokens + sequences + 1]
    lengths: tuple[int, ...]  # [sequences], filler and empty sequences included

    @property
    def length_max(self) -> int:
        return max(self.lengths)


def lay_out(batch: Batch, *, position_offset: int, shape: Shape | None = None) -> Layout:
    """Positions, owners and starts of *batch*, filled up to *shape* where one is given."""
    tokens, sequences = batch.token_count, len(batch)
    shape = Shape(tokens, sequences) if shape is None else shape
    filler = shape.token_count - tokens
    assert filler >= 0
    assert shape.sequence_count >= sequences + (filler > 0), "filler is a sequence of its own"

    starts = np.full(shape.sequence_count + 1, shape.token_count, np.int32)
    starts[: sequences + 1] = batch.cu_seqlens
    lengths = np.diff(starts)
    owners = np.repeat(np.arange(shape.sequence_count, dtype=np.int32), lengths)  # [tokens]
    words = np.zeros(ROWS * shape.token_count + len(starts), np.int32)
    token_ids, positions, token_types, owners_row = words[: -len(starts)].reshape(ROWS, -1)
    token_ids[:tokens] = batch.token_ids
    positions[:tokens] = position_offset + np.arange(tokens) - starts[owners[:tokens]]
    if batch.token_types is not None:
        token_types[:tokens] = batch.token_types
    owners_row[:] = owners
    words[-len(starts) :] = starts
    return Layout(shape, words, tuple(lengths.tolist()))


def rows_wanting(batch: Batch, output: Output) -> NDArray[np.int32]:
    """Indices of the tokens whose sequence asks for *output*: int32 `[rows]`, ascending."""
    wants = (batch.outputs & output.value) != 0  # [sequences]
    return np.flatnonzero(np.repeat(wants, np.diff(batch.cu_seqlens))).astype(np.int32)


def first_rows_left_out(rows: Int32Array, cu_seqlens: Int32Array) -> Int32Array:
    """*rows* without the first token of each sequence: what the multi-vectors are made of."""
    return rows[~np.isin(rows, cu_seqlens[:-1], assume_unique=True)]


def uniform_batch(length: int, budget: BatchBudget, outputs: Output) -> Batch:
    """As many sequences of *length* as *budget* holds, at least one, all asking for *outputs*."""
    count = max(min(budget.tokens_max // length, budget.sequences_max), 1)
    return Batch(
        token_ids=np.zeros(count * length, np.int32),
        cu_seqlens=np.arange(count + 1, dtype=np.int32) * length,
        outputs=np.full(count, outputs, np.uint8),
    )
