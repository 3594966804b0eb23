"""The arrays that a row feeds to the graph, written into buffers that are used again and again.

All of it is vectorised over tokens. The buffers grow to the longest row seen and then stay.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivec.backends.openvino.graph import PLACE, POSITION, TOKEN_ID, TOKEN_TYPE
from trivec.backends.openvino.rows import Row, token_size
from trivec.core.types import Batch, Float32Array, Int32Array

NOT_A_TOKEN = -1e9  # added to a score, it leaves exactly no weight after softmax


@dataclass(frozen=True, slots=True)
class RowInputs:
    """What the graph is given; views of a slot's buffers, valid until the next row is packed."""

    tokens: Int32Array  # [4, token_size]
    gather: Int32Array  # [sequences, length_size]
    bias: Float32Array  # [sequences, 1, 1, length_size]
    kept: Int32Array  # [2, kept_size]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """A row ready to run, and what its answer will hold."""

    inputs: RowInputs
    kept_starts: Int32Array  # [sequences + 1]; of the rows that the graph returns
    kept_token_ids: Int32Array  # [kept]


class Buffers:
    """One slot's input memory. Used by the slot's thread only."""

    def __init__(self) -> None:
        self._whole: dict[str, NDArray[np.int32]] = {}

    def int32(self, name: str, *shape: int) -> Int32Array:
        """A contiguous array of *shape* with whatever was in it before."""
        count = int(np.prod(shape))
        held = self._whole.get(name)
        if held is None or len(held) < count:
            held = self._whole[name] = np.empty(count, np.int32)
        return held[:count].reshape(shape)

    def float32(self, name: str, *shape: int) -> Float32Array:
        """As `int32`, in float32."""
        return self.int32(name, *shape).view(np.float32)


def pack_row(
    batch: Batch,
    row: Row,
    *,
    whole: NDArray[np.bool_],
    position_offset: int,
    buffers: Buffers,
) -> PackedRow:
    """Write *row* of *batch* into *buffers*.

    *whole* (bool `[sequences of the batch]`) says whose tokens are all wanted back; of the others
    only the first token's hidden state is.
    """
    lengths = batch.cu_seqlens[row.members + 1] - batch.cu_seqlens[row.members]  # [sequences]
    starts = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=starts[1:])
    tokens = np.arange(row.token_count, dtype=np.int32)
    offset = tokens - np.repeat(starts[:-1], lengths)  # [tokens]; within the sequence
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
    bias = buffers.float32("bias", len(lengths), 1, 1, row.length_size)
    bias.fill(NOT_A_TOKEN)
    bias.reshape(-1)[place] = 0

    wanted = np.repeat(whole[row.members], lengths) | (offset == 0)  # [tokens]
    kept_tokens = tokens[wanted]
    kept = buffers.int32("kept", 2, token_size(len(kept_tokens)))
    kept[:, len(kept_tokens) :] = 0
    kept[0, : len(kept_tokens)] = kept_tokens
    kept[1, : len(kept_tokens)] = place[wanted]
    kept_starts = np.zeros_like(starts)
    np.cumsum(np.where(whole[row.members], lengths, 1), out=kept_starts[1:])
    inputs = RowInputs(lines, gather, bias, kept)
    return PackedRow(inputs, kept_starts, batch.token_ids[source[wanted]])
