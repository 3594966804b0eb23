"""One model on one device: a batch goes up, is launched without waiting, and comes back as vectors.

Several threads may call `run`. Their launches take turns under a lock and go to one stream, so the
next batch is packed and queued while the device still works on the one before it.
"""

import threading
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from trivec.backends.torch.answers import Sent, to_vectors
from trivec.backends.torch.attention import Attention
from trivec.backends.torch.encoder import Encoder, Packed, RunBlock
from trivec.backends.torch.graphs import Graphs, unpack
from trivec.backends.torch.heads import DeviceHeads
from trivec.backends.torch.layout import first_rows_left_out, lay_out, rows_wanting
from trivec.backends.torch.link import CudaLink, Fetched, Link
from trivec.backends.torch.tuning import graph_shape
from trivec.core.types import Batch, Float32Array, Output, Vectors
from trivec.models.ops import ModelConfig


@dataclass(frozen=True, slots=True)
class Parts:
    """What a model on a device is made of."""

    encoder: Encoder
    heads: DeviceHeads
    attention: Attention
    run: RunBlock  # how blocks are run: plain, or compiled
    config: ModelConfig

    def refuse(self, batch: Batch) -> None:
        """Stop at what only a mistake of ours sends down: a bad index takes a CUDA device with it."""
        assert np.diff(batch.cu_seqlens).max() <= self.config.token_count_max, "a text is too long"
        assert batch.token_ids.min() >= 0, "a token id is below the vocabulary"
        assert batch.token_ids.max() < self.config.vocab_size, "a token id is beyond it"

    def encode(self, packed: Packed) -> torch.Tensor:
        """Last hidden states: `[tokens, hidden]`."""
        return self.encoder(packed, self.attention, self.run)


@dataclass(frozen=True, slots=True)
class _OnTheWay:
    """What a batch's launches will leave on the host, and in which order."""

    fetched: Fetched
    has_sparse: bool
    has_multi: bool

    def wait(self) -> Sent:
        arrays = iter(self.fetched.wait())
        return Sent(
            dense=cast(Float32Array, next(arrays)),
            sparse_keys=cast("NDArray[np.int64]", next(arrays)) if self.has_sparse else None,
            sparse_weights=cast(Float32Array, next(arrays)) if self.has_sparse else None,
            multi=cast(Float32Array, next(arrays)) if self.has_multi else None,
        )


class DeviceModel:
    """A model and its device."""

    def __init__(self, parts: Parts, link: Link, graphs: Graphs | None = None) -> None:
        self.parts = parts
        self.link = link
        self._graphs = graphs
        self._launching = threading.Lock()

    def run(self, batch: Batch) -> Vectors:
        """Vectors of *batch*; blocks until they are on the host. Raises what torch raises."""
        self.parts.refuse(batch)
        with self._launching, self.link.entered():
            on_the_way = self._launch(batch)
        return to_vectors(on_the_way.wait(), batch, self.parts.heads.vocabulary_size)

    def _launch(self, batch: Batch) -> _OnTheWay:
        packed, hidden = self._encode(batch)
        heads = self.parts.heads
        # A replayed graph's layout ends in filler; the heads read the real sequences only.
        tensors = [heads.dense(hidden, packed.spans.cu_seqlens[: len(batch) + 1])]
        sparse_rows = rows_wanting(batch, Output.SPARSE)
        if has_sparse := heads.sparse is not None and len(sparse_rows) > 0:
            best = heads.best_weights(hidden, packed, self.link.up(sparse_rows))
            tensors += [best.keys, best.weights]
        multi_rows = rows_wanting(batch, Output.MULTI)
        if has_multi := heads.multi is not None and len(multi_rows) > 0:
            multi_rows = first_rows_left_out(multi_rows, batch.cu_seqlens)
            tensors.append(heads.token_vectors(hidden, self.link.up(multi_rows)))
        return _OnTheWay(self.link.down(tensors), has_sparse, has_multi)

    def _encode(self, batch: Batch) -> tuple[Packed, torch.Tensor]:
        """The batch on the device and its hidden states, at least `[tokens, hidden]`."""
        offset = self.parts.config.position_offset
        if self._graphs is not None and isinstance(self.link, CudaLink):
            shape = graph_shape(batch.token_count, len(batch), self._graphs.shapes)
            if shape is not None:
                layout = lay_out(batch, position_offset=offset, shape=shape)
                return self._graphs.replay(layout, self.link)
        layout = lay_out(batch, position_offset=offset)
        packed = unpack(self.link.up(layout.words), layout.shape, layout.lengths)
        return packed, self.parts.encode(packed)
