"""Heads: pooling and BGE-M3's two linear layers on the device, in fp32, and their rows as `Vectors`.

What `models/pooling.py` does in numpy. Nothing waits for the device: every shape is known on the
host before a kernel is launched.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trivec.backends.torch.ops import PackedBatch
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, Float32Array, Int32Array, Output, SparseVector, Vectors
from trivec.models.pooling import Pooling


class DeviceHeads:
    """Pooling and, where the checkpoint has them, the sparse and multi-vector heads."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        heads = checkpoint.heads
        self._pooling = checkpoint.pooling
        self._normalize = checkpoint.normalize
        self._vocabulary_size = checkpoint.config.vocab_size
        names = ("sparse_weight", "sparse_bias", "multi_weight", "multi_bias")
        self._linear = {  # fp32, shaped as in `models.pooling.Heads`; empty where there are no heads
            name: torch.tensor(getattr(heads, name), dtype=torch.float32, device=device)
            for name in (names if heads is not None else ())
        }
        ignored = heads.ignored_token_ids if heads is not None else ()  # never in a sparse vector
        self._ignored_token_ids = torch.tensor(ignored, dtype=torch.int32, device=device)

    def launch(
        self,
        hidden: Tensor,
        packed: PackedBatch,
        batch: Batch,
        upload: Callable[[Int32Array], Tensor],
    ) -> dict[str, Tensor]:
        """What *batch* asks for of `[tokens, hidden]`, as `to_vectors` reads it.

        *hidden* and *packed* may end in filler, which is passed over.
        """
        skip = None if batch.skip is None else upload(batch.skip)
        results = {"dense": self._dense(hidden, packed.cu_seqlens[: len(batch) + 1], skip)}
        if not self._linear:
            return results
        sparse_tokens = _tokens_wanting(batch, Output.SPARSE)
        if len(sparse_tokens):
            results |= self._sparse_terms(hidden, packed, upload(sparse_tokens))
        multi_tokens = _tokens_wanting(batch, Output.MULTI)
        if len(multi_tokens):
            # The first token, <s>, has no vector.
            is_first = np.isin(multi_tokens, batch.cu_seqlens[:-1], assume_unique=True)
            rows = self._project(hidden[upload(multi_tokens[~is_first])], "multi")
            results["multi"] = functional.normalize(rows, dim=-1)
        return results

    def _project(self, rows: Tensor, head: str) -> Tensor:
        weight, bias = self._linear[f"{head}_weight"], self._linear[f"{head}_bias"]
        return functional.linear(rows.float(), weight, bias)

    def _dense(self, hidden: Tensor, cu_seqlens: Tensor, skip: Tensor | None) -> Tensor:
        """One row a sequence: fp32 `[sequences, hidden]`. A mean leaves out *skip* `[sequences]`."""
        if self._pooling is Pooling.CLS:
            pooled = hidden[cu_seqlens[:-1]].float()
        elif self._pooling is Pooling.LAST:
            pooled = hidden[cu_seqlens[1:] - 1].float()
        else:
            offsets = cu_seqlens.long()
            if skip is not None:  # segments of what is skipped and of the rest, by turns
                starts = torch.stack((offsets[:-1], offsets[:-1] + skip), dim=1).flatten()
                offsets = torch.cat((starts, offsets[-1:]))
            # `unsafe` leaves out a check of the offsets that would wait for the device.
            pooled = torch.segment_reduce(
                hidden.float(), "mean", offsets=offsets, axis=0, unsafe=True
            )
            pooled = pooled if skip is None else pooled[1::2]
        return functional.normalize(pooled, dim=-1) if self._normalize else pooled

    def _sparse_terms(
        self, hidden: Tensor, packed: PackedBatch, tokens: Tensor
    ) -> dict[str, Tensor]:
        """relu(H W' + b) of *tokens*, the maximum a sequence and token id, by sorting.

        Keys int64 `[tokens]` are sequence * vocabulary + token id and ascend over the slots in use;
        weights fp32 `[tokens]` are 0 in the others.
        """
        weights = torch.relu(self._project(hidden[tokens], "sparse"))[:, 0]
        token_ids = packed.token_ids[tokens]
        weights = weights.masked_fill(torch.isin(token_ids, self._ignored_token_ids), 0.0)
        keys = packed.sequence_ids[tokens].long() * self._vocabulary_size + token_ids
        keys, order = torch.sort(keys)
        is_new = torch.ones_like(keys)
        is_new[1:] = keys[1:] != keys[:-1]
        slots = torch.cumsum(is_new, 0) - 1
        return {
            "sparse_keys": torch.zeros_like(keys).scatter_(0, slots, keys),
            "sparse_weights": torch.zeros_like(weights).scatter_reduce(
                0, slots, weights[order], "amax"
            ),
        }


def to_vectors(results: Mapping[str, NDArray[Any]], batch: Batch, vocabulary_size: int) -> Vectors:
    """The rows of `DeviceHeads.launch`, now on the host, cut by sequence without copies."""
    sparse: list[SparseVector | None] = [None] * len(batch)
    multi: list[Float32Array | None] = [None] * len(batch)
    if "sparse_keys" in results:
        keys, weights = results["sparse_keys"], results["sparse_weights"]
        used = ~(weights <= 0)  # NaN stays: whoever checks that rows are finite must see it
        keys, weights = keys[used], weights[used]
        token_ids = (keys % vocabulary_size).astype(np.int32)
        bounds = np.searchsorted(keys, np.arange(len(batch) + 1) * vocabulary_size).tolist()
        for i in np.flatnonzero(batch.outputs & Output.SPARSE.value).tolist():
            term = slice(bounds[i], bounds[i + 1])
            sparse[i] = SparseVector(token_ids[term], weights[term])
    if "multi" in results:
        asked = np.flatnonzero(batch.outputs & Output.MULTI.value)
        ends = np.cumsum(np.diff(batch.cu_seqlens)[asked] - 1)
        for i, rows in zip(asked.tolist(), np.split(results["multi"], ends[:-1]), strict=True):
            multi[i] = rows
    return Vectors.of(results["dense"], sparse, multi)


def _tokens_wanting(batch: Batch, output: Output) -> Int32Array:
    """Indices of the tokens whose sequence asks for *output*: int32 `[rows]`, ascending."""
    wants = (batch.outputs & output.value) != 0  # [sequences]
    return np.flatnonzero(np.repeat(wants, np.diff(batch.cu_seqlens))).astype(np.int32)
