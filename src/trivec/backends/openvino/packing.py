"""Packing: a batch is cut into micro-batches, each packed into the arrays that the graph reads.

A micro-batch is one run of the graph: tokens end to end for everything but attention, which gathers
them into `[sequences, length]`, or for a window of neighbours into blocks of these. Because a
sequence's bits do not depend on its neighbours (decision 0002), a batch may be cut at will; only speed
depends on it.
"""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from trivec.core.types import Batch, BatchBudget, Float32Array, Int32Array, Output, Sequences

Scalar = TypeVar("Scalar", bound=np.generic)

# Best between 128 and 512 tokens: below, weights are read too often; above, activations leave the
# cache.
MICRO_BATCH_BUDGET = BatchBudget(tokens_max=512, sequences_max=64)

# The plugin keeps memory for each shape it has seen: 0.1 MB for multiples of 16, 0.5 MB for others
# (6 layers of BGE-M3's shape; the number of sequences costs nothing). Hence few sizes, and these.
# Lengths of attention are all multiples of 16: else bf16 would make bits depend on the padding.
LONG_SIZES: tuple[int, ...] = (*range(640, 1025, 128), *range(1280, 2049, 256))
LONG_STEP = 512  # beyond 2,048 tokens the padding of a step is small beside the sequence
TOKEN_SIZES: tuple[int, ...] = (8, *range(16, 513, 16), *LONG_SIZES)
LENGTH_SIZES: tuple[int, ...] = (16, 32, 64, 96, 128, 192, 256, 384, 512, *LONG_SIZES)

# Attention over padding costs length² a sequence. Up to this length it is too little to matter.
LENGTH_ALWAYS_SHARED = 64
LENGTH_RATIO_MAX = 1.5

HIDDEN_SCORE = -1e9  # a score of this, or lowered by this, leaves a weight of exactly 0 in softmax

# The lines of `MicroBatch.tokens`.
TOKEN_ID, TOKEN_TYPE, POSITION, PLACE = range(4)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The graph's inputs for some sequences of a batch, and which these are."""

    members: Int32Array  # [sequences]; their indices in the batch
    tokens: Int32Array  # [4, token size]; see TOKEN_ID and the others
    gather: Int32Array  # [sequences, length size]; the token at each place of attention
    bias: Float32Array  # [sequences, 1, 1, length size]; 0 for a token, HIDDEN_SCORE for padding
    near: Int32Array  # [blocks, keys]; of each block of places those that a window reaches
    near_bias: Float32Array  # [blocks, 1, 1, keys]; as `bias`
    kept: Int32Array  # [2, kept size]; tokens whose hidden states are wanted, and their places
    kept_cu_seqlens: Int32Array  # [sequences + 1]; of the hidden states that the graph returns
    kept_token_ids: Int32Array  # [kept]


def as_batch(sequences: Sequences, outputs: Output) -> Batch:
    """*sequences* with the same *outputs* for each."""
    flags = np.full(len(sequences), int(outputs), np.uint8)
    return Batch(sequences.token_ids, sequences.cu_seqlens, flags, sequences.token_types)


def plan_micro_batches(
    lengths: Int32Array, budget: BatchBudget = MICRO_BATCH_BUDGET, *, window: int | None = None
) -> list[Int32Array]:
    """The members of each micro-batch, int32 indices: sequences whose *lengths* are similar.

    Each sequence is in exactly one; a micro-batch holds at most the budget, or one longer sequence.
    With a *window* those that go `in_blocks` are apart, so that how is a matter of the sequence.
    """
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    ordered = lengths[order].tolist()
    cuts, tokens = [0], 0
    for i, length in enumerate(ordered):
        if i > cuts[-1] and not (
            tokens + length <= budget.tokens_max
            and i - cuts[-1] < budget.sequences_max
            and ordered[cuts[-1]] <= max(LENGTH_ALWAYS_SHARED, LENGTH_RATIO_MAX * length)
            and in_blocks(ordered[cuts[-1]], window) == in_blocks(length, window)
        ):
            cuts.append(i)
            tokens = 0
        tokens += length
    return [order[begin:end] for begin, end in pairwise([*cuts, len(order)])]


def round_up(count: int, sizes: tuple[int, ...]) -> int:
    """The least of *sizes* that holds *count*; above them a multiple of `LONG_STEP`."""
    if count > sizes[-1]:
        return -(-count // LONG_STEP) * LONG_STEP
    return sizes[bisect_left(sizes, count)]


def block_size(window: int) -> int:
    """Places of a block, whose own, those before and those after hold all that a *window* reaches.

    A power of two: up to 512 every length size from four blocks on is a whole number of them.
    """
    return max(LENGTH_SIZES[0], 1 << (window - 1).bit_length())


def in_blocks(length: int, window: int | None) -> bool:
    """Whether a sequence is attended to in blocks of three: from four on that is less work."""
    if window is None:
        return False
    size, block = round_up(length, LENGTH_SIZES), block_size(window)
    return size >= 4 * block and size % block == 0


def _around(places: NDArray[Scalar], block: int, outside: float) -> NDArray[Scalar]:
    """Of *places* `[sequences, length]` each block between its neighbours: `[blocks, 3 * block]`."""
    padded = np.pad(places, ((0, 0), (block, block)), constant_values=outside)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 3 * block, axis=1)
    return windows[:, ::block].copy().reshape(-1, 3 * block)


def pack_micro_batch(
    batch: Batch,
    members: Int32Array,
    *,
    whole: NDArray[np.bool_],
    keeps_last: bool,
    position_offset: int,
    seen_lengths: Int32Array | None = None,
    window: int | None = None,
) -> MicroBatch:
    """Pack the sequences *members* of *batch*.

    *seen_lengths* `[sequences of the batch]`: tokens of each that others attend to; None: all.
    *window*: to how many tokens on either side some layers attend; None: no layer is so.

    *whole* (bool `[sequences of the batch]`) says of which sequences all hidden states are wanted;
    of the others only one is: the first token's, or with *keeps_last* the last one's.
    """
    starts = batch.cu_seqlens[members]
    lengths = batch.cu_seqlens[members + 1] - starts  # [sequences]
    cu_seqlens = np.zeros(len(members) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    count, length_size = int(cu_seqlens[-1]), round_up(int(lengths.max()), LENGTH_SIZES)
    token = np.arange(count, dtype=np.int32)
    offset = token - np.repeat(cu_seqlens[:-1], lengths)  # [tokens]; within the sequence
    source = offset + np.repeat(starts, lengths)  # [tokens]; in the batch
    place = offset + np.repeat(np.arange(len(members), dtype=np.int32) * length_size, lengths)

    tokens = np.zeros((4, round_up(count, TOKEN_SIZES)), np.int32)
    tokens[TOKEN_ID, :count] = batch.token_ids[source]
    if batch.token_types is not None:
        tokens[TOKEN_TYPE, :count] = batch.token_types[source]
    tokens[POSITION, :count] = offset + position_offset
    tokens[PLACE, :count] = place

    gather = np.zeros((len(members), length_size), np.int32)
    gather.reshape(-1)[place] = token
    bias = np.full((len(members), 1, 1, length_size), HIDDEN_SCORE, np.float32)
    is_seen = (
        slice(None) if seen_lengths is None else offset < seen_lengths[members].repeat(lengths)
    )
    bias.reshape(-1)[place[is_seen]] = 0

    near, near_bias = gather, bias
    if window is not None and in_blocks(int(lengths.max()), window):
        block = block_size(window)
        near = _around(gather, block, 0)
        near_bias = _around(bias[:, 0, 0], block, HIDDEN_SCORE)[:, None, None]

    pooled = offset == (np.repeat(lengths, lengths) - 1 if keeps_last else 0)
    wanted = np.repeat(whole[members], lengths) | pooled  # [tokens]
    kept_count = int(np.count_nonzero(wanted))
    kept = np.zeros((2, round_up(kept_count, TOKEN_SIZES)), np.int32)
    kept[0, :kept_count] = token[wanted]
    kept[1, :kept_count] = place[wanted]
    kept_cu_seqlens = np.zeros_like(cu_seqlens)
    np.cumsum(np.where(whole[members], lengths, 1), out=kept_cu_seqlens[1:])
    kept_ids = batch.token_ids[source[wanted]]
    return MicroBatch(
        members, tokens, gather, bias, near, near_bias, kept, kept_cu_seqlens, kept_ids
    )
