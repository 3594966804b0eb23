"""Which sequences run together, and in which shapes: pure decisions on lengths.

A row is one run of the graph: tokens end to end for everything but attention, which gathers them
into `[sequences, length]`. Because a sequence's bits do not depend on its row (decision 0002), a
batch may be cut into rows at will; only speed depends on it.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from trivec.core.types import BatchBudget, Int32Array

# Best between 128 and 512 tokens: below, weights are read too often; above, activations leave the
# cache.
ROW_BUDGET = BatchBudget(tokens_max=512, sequences_max=64)

# The plugin keeps memory for each shape it has seen: 0.1 MB for multiples of 16, 0.5 MB for others
# (6 layers of BGE-M3's shape; the number of sequences costs nothing). Hence few sizes, and these.
TOKEN_SIZES: tuple[int, ...] = (8, *range(16, 513, 16))
LONG_SIZES: tuple[int, ...] = (*range(640, 1025, 128), *range(1280, 2049, 256))
LENGTH_SIZES: tuple[int, ...] = (16, 32, 64, 96, 128, 192, 256, 384, 512)
LONG_STEP = 512  # beyond 2,048 tokens the padding of a step is small beside the sequence

# Attention over padding costs length² a sequence. Up to this length it is too little to matter.
LENGTH_ALWAYS_SHARED = 64
LENGTH_RATIO_MAX = 1.5


@dataclass(frozen=True, slots=True)
class Row:
    """Sequences of a batch that run together, and the rounded shape they run in."""

    members: Int32Array  # [sequences]; their indices in the batch, in the row's order
    token_count: int  # of the sequences themselves
    token_size: int  # tokens of the row, padding included
    length_size: int  # tokens a sequence has in attention, padding included


def plan_rows(lengths: Int32Array, budget: BatchBudget = ROW_BUDGET) -> list[Row]:
    """Cut sequences of *lengths* (int32 `[sequences]`) into rows of similar lengths.

    Each sequence is in exactly one row; a row holds at most the budget, or one longer sequence.
    """
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    rows: list[Row] = []
    begin = tokens = 0
    for end, length in enumerate(lengths[order].tolist()):
        longest = int(lengths[order[begin]])
        if end > begin and not (
            tokens + length <= budget.tokens_max
            and end - begin < budget.sequences_max
            and longest <= max(LENGTH_ALWAYS_SHARED, LENGTH_RATIO_MAX * length)
        ):
            rows.append(_row(order[begin:end], lengths))
            begin, tokens = end, 0
        tokens += length
    if len(order):
        rows.append(_row(order[begin:], lengths))
    return rows


def _row(members: Int32Array, lengths: Int32Array) -> Row:
    own = lengths[members]
    return Row(members, int(own.sum()), token_size(int(own.sum())), length_size(int(own.max())))


def token_size(count: int) -> int:
    """*count* rounded up to a size that rows run in."""
    return _round_up(count, TOKEN_SIZES)


def length_size(length: int) -> int:
    """*length* rounded up to a size that attention runs in."""
    return _round_up(length, LENGTH_SIZES)


def _round_up(count: int, sizes: tuple[int, ...]) -> int:
    if count <= sizes[-1]:
        return sizes[bisect_left(sizes, count)]
    if count <= LONG_SIZES[-1]:
        return LONG_SIZES[bisect_left(LONG_SIZES, count)]
    return -(-count // LONG_STEP) * LONG_STEP
