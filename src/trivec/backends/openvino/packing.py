"""Packing: a batch is cut into rows, and each row written into the arrays that the graph reads.

A row is one run of the graph: tokens end to end for everything but attention, which gathers them
into `[sequences, length]`. Because a sequence's bits do not depend on its row (decision 0002), a
batch may be cut into rows at will; only speed depends on it.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivec.core.types import Batch, BatchBudget, Float32Array, Int32Array

# Best between 128 and 512 tokens: below, weights are read too often; above, activations leave the
# cache.
ROW_BUDGET = BatchBudget(tokens_max=512, sequences_max=64)

# The plugin keeps memory for each shape it has seen: 0.1 MB for multiples of 16, 0.5 MB for others
# (6 layers of BGE-M3's shape; the number of sequences costs nothing). Hence few sizes, and these.
# Lengths of attention are all multiples of 16: else bf16 would make bits depend on the padding.
TOKEN_SIZES: tuple[int, ...] = (8, *range(16, 513, 16))
LONG_SIZES: tuple[int, ...] = (*range(640, 1025, 128), *range(1280, 2049, 256))
LENGTH_SIZES: tuple[int, ...] = (16, 32, 64, 96, 128, 192, 256, 384, 512)
LONG_STEP = 512  # beyond 2,048 tokens the padding of a step is small beside the sequence

# Attention over padding costs length² a sequence. Up to this length it is too little to matter.
LENGTH_ALWAYS_SHARED = 64
LENGTH_RATIO_MAX = 1.5

HIDDEN_SCORE = -1e9  # a score of this, or lowered by this, leaves a weight of exactly 0 in softmax

# The lines of `PackedRow.tokens`.
TOKEN_ID, TOKEN_TYPE, POSITION, PLACE = range(4)


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
    ordered = lengths[order].tolist()
    cuts, tokens = [0], 0
    for end, length in enumerate(ordered):
        if end > cuts[-1] and not (
            tokens + length <= budget.tokens_max
            and end - cuts[-1] < budget.sequences_max
            and ordered[cuts[-1]] <= max(LENGTH_ALWAYS_SHARED, LENGTH_RATIO_MAX * length)
        ):
            cuts.append(end)
            tokens = 0
        tokens += length
    rows = []
    for begin, end in zip(cuts, [*cuts[1:], len(ordered)], strict=True):
        count = sum(ordered[begin:end])
        if count:
            rows.append(
                Row(order[begin:end], count, token_size(count), length_size(ordered[begin]))
            )
    return rows


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


class Buffers:
    """One slot's input memory, grown to the longest row seen. Used by the slot's thread only."""

    def __init__(self) -> None:
        self._whole: dict[str, NDArray[np.int32]] = {}

    def int32(self, name: str, *shape: int) -> Int32Array:
        """A contiguous array of *shape* with whatever was in it before."""
        count = int(np.prod(shape))
        held = self._whole.get(name)
        if held is None or len(held) < count:
            held = self._whole[name] = np.empty(count, np.int32)
        return held[:count].reshape(shape)


@dataclass(frozen=True, slots=True)
class PackedRow:
    """The graph's inputs, views of a slot's buffers and valid until its next row, and what is kept."""

    tokens: Int32Array  # [4, token_size]; see TOKEN_ID and the others
    gather: Int32Array  # [sequences, length_size]; the token at each place of attention
    bias: Float32Array  # [sequences, 1, 1, length_size]; 0 for a token, HIDDEN_SCORE for padding
    kept: Int32Array  # [2, kept_size]; tokens whose hidden states are wanted, and their places
    kept_cu_seqlens: Int32Array  # [sequences + 1]; of the rows that the graph returns
    kept_token_ids: Int32Array  # [kept]


def pack_row(
    batch: Batch,
    row: Row,
    *,
    whole: NDArray[np.bool_],
    keeps_last: bool,
    position_offset: int,
    buffers: Buffers,
) -> PackedRow:
    """Write *row* of *batch* into *buffers*.

    *whole* (bool `[sequences of the batch]`) says of which sequences all hidden states are wanted;
    of the others only one is: the first token's, or with *keeps_last* the last one's.
    """
    whole = whole[row.members]
    lengths = batch.cu_seqlens[row.members + 1] - batch.cu_seqlens[row.members]  # [sequences]
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    tokens = np.arange(row.token_count, dtype=np.int32)
    offset = tokens - np.repeat(cu_seqlens[:-1], lengths)  # [tokens]; within the sequence
    source = offset + np.repeat(batch.cu_seqlens[row.members], lengths)  # [tokens]; in the batch
    place = offset + np.repeat(np.arange(len(lengths), dtype=np.int32) * row.length_size, lengths)

    lines = buffers.int32("tokens", 4, row.token_size)
    lines[:, row.token_count :] = 0
    real = lines[:, : row.token_count]
    real[TOKEN_ID] = batch.token_ids[source]
    real[TOKEN_TYPE] = 0 if batch.token_types is None else batch.token_types[source]
    real[POSITION] = offset + position_offset
    real[PLACE] = place

    gather = buffers.int32("gather", len(lengths), row.length_size)
    gather.fill(0)
    gather.reshape(-1)[place] = tokens
    bias = buffers.int32("bias", len(lengths), 1, 1, row.length_size).view(np.float32)
    bias.fill(HIDDEN_SCORE)
    bias.reshape(-1)[place] = 0

    pooled = offset == (np.repeat(lengths, lengths) - 1 if keeps_last else 0)
    wanted = np.repeat(whole, lengths) | pooled  # [tokens]
    kept_tokens = tokens[wanted]
    kept = buffers.int32("kept", 2, token_size(len(kept_tokens)))
    kept[:, len(kept_tokens) :] = 0
    kept[0, : len(kept_tokens)] = kept_tokens
    kept[1, : len(kept_tokens)] = place[wanted]
    kept_cu_seqlens = np.zeros_like(cu_seqlens)
    np.cumsum(np.where(whole, lengths, 1), out=kept_cu_seqlens[1:])
    return PackedRow(lines, gather, bias, kept, kept_cu_seqlens, batch.token_ids[source[wanted]])
