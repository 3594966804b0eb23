"""Encoder passes of small shapes captured once, replayed as one launch (CUDA graphs).

A small batch's kernels are shorter than their launches; captured, they are launched together. The
plain twin is the encoder itself. Used by one thread at a time, on the link's stream.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from trivec.backends.torch.attention import Spans
from trivec.backends.torch.encoder import Packed
from trivec.backends.torch.layout import ROWS, Layout, Shape, lay_out
from trivec.backends.torch.link import CudaLink
from trivec.core.types import Batch, Output

Encode = Callable[[Packed], torch.Tensor]


def unpack(words: torch.Tensor, shape: Shape, lengths: tuple[int, ...]) -> Packed:
    """Views of a layout's words on the device."""
    rows = words[: ROWS * shape.token_count].view(ROWS, shape.token_count)
    token_ids, positions, token_types, owners = rows.unbind()
    starts = words[ROWS * shape.token_count :]
    return Packed(token_ids, positions, token_types, owners, Spans(starts, lengths))


@dataclass(frozen=True, slots=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    words: torch.Tensor  # int32, what the graph reads
    packed: Packed  # views of it
    hidden: torch.Tensor  # [tokens, hidden], what the graph writes; whole until the next replay


class Graphs:
    """Captured passes by shape."""

    def __init__(self, captured: dict[Shape, _Captured]) -> None:
        self._captured = captured

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(self._captured)

    @classmethod
    def capture(cls, encode: Encode, shapes: tuple[Shape, ...], link: CudaLink) -> "Graphs":
        """Capture *encode* at every one of *shapes*, largest first. Nothing else may use the
        device meanwhile. Raises what torch raises where a kernel cannot be captured.
        """
        captured: dict[Shape, _Captured] = {}
        pool = None
        for shape in shapes:
            words = link.up(rehearsal(shape, sequence_count=1).words)
            # Kernels take the longest length as a plain number, so a graph is made for the worst.
            packed = unpack(words, shape, (shape.token_count,))
            encode(packed)  # libraries pick kernels and reserve memory on first use
            link.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=link.stream):
                hidden = encode(packed)
            # One pool for all: they run one after the other, and each hidden is kept alive.
            pool = graph.pool()
            captured[shape] = _Captured(graph, words, packed, hidden)
        return cls(captured)

    def replay(self, layout: Layout, link: CudaLink) -> tuple[Packed, torch.Tensor]:
        """The layout on the device and its hidden states, filler included."""
        one = self._captured[layout.shape]
        link.overwrite(one.words, layout.words)
        one.graph.replay()
        return one.packed, one.hidden


def rehearsal(shape: Shape, *, sequence_count: int) -> Layout:
    """A layout of *shape* with sequences of about one length and small ids, all of it in use.

    Its positions may exceed the model's, which is why it starts all of them at 0.
    """
    starts = np.linspace(0, shape.token_count, sequence_count + 1).astype(np.int32)
    token_ids = np.arange(shape.token_count, dtype=np.int32) % 5
    batch = Batch(token_ids, starts, np.full(sequence_count, Output.DENSE, np.uint8))
    layout = lay_out(batch, position_offset=0, shape=shape)
    layout.words[shape.token_count : 2 * shape.token_count] = 0
    return layout
