"""Heads: pooling and the layers after the encoder on the device, in fp32, and their rows as `Vectors`.

What `models/pooling.py` does in numpy. Nothing waits for the device: every shape is known on the
host before a kernel is launched.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from trivec.backends.torch.ops import PackedBatch
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, Float32Array, Int32Array, Output, SparseVector, Vectors
from trivec.models.pooling import (
    HeadLayer,
    HeadLinear,
    MultiHead,
    Nonlinearity,
    Pooling,
    SpladeHead,
)

DeviceLayer: TypeAlias = Callable[[Tensor], Tensor]

NONLINEARITIES: Mapping[Nonlinearity, DeviceLayer] = {
    Nonlinearity.TANH: torch.tanh,
    Nonlinearity.GELU: functional.gelu,
    Nonlinearity.RELU: torch.relu,
}
SPLADE_LOGITS_MAX = 1 << 24  # in memory at once: 64 MB


class DeviceHeads:
    """Pooling and, where the checkpoint has them, the layers after it and the token heads."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._pooler = pooler = checkpoint.pooler
        heads, head = pooler.heads, pooler.token_head
        self._vocabulary_size = checkpoint.config.vocab_size
        self._layers = _on_device(pooler.layers, device)
        self._sparse: list[DeviceLayer] = []
        self._multi: list[DeviceLayer] = []
        ignored: tuple[int, ...] = ()  # never in a lexical vector
        if heads is not None:
            sparse = HeadLinear(heads.sparse_weight, heads.sparse_bias)
            self._sparse = _on_device((sparse,), device)
            self._multi = _on_device((HeadLinear(heads.multi_weight, heads.multi_bias),), device)
            ignored = heads.ignored_token_ids
        if isinstance(head, SpladeHead):
            self._sparse = _on_device(head.layers, device)
        elif isinstance(head, MultiHead):
            self._multi = _on_device(head.layers, device)
        self._ignored_token_ids = torch.tensor(ignored, dtype=torch.int32, device=device)

    def launch(
        self,
        hidden: Tensor,
        packed: PackedBatch,
        batch: Batch,
        upload: Callable[[Int32Array], Tensor],
    ) -> dict[str, Tensor]:
        """What *batch* asks for of `[tokens, hidden]`, as `vectors` reads it.

        *hidden* and *packed* may end in filler, which is passed over.
        """
        head = self._pooler.token_head
        results: dict[str, Tensor] = {}
        if self._pooler.pooling:
            skip = None if batch.skip is None else upload(batch.skip)
            results["pooled"] = self._pooled(hidden, packed.cu_seqlens[: len(batch) + 1], skip)
        if batch.chunks is not None:
            bounds, places = _chunk_bounds(batch)
            means = torch.segment_reduce(
                hidden.float(), "mean", offsets=upload(bounds).long(), axis=0, unsafe=True
            )
            results["chunks"] = self._finished(means[upload(places)])
        sparse_tokens = _tokens_wanting(batch, Output.SPARSE) if self._sparse else ()
        if len(sparse_tokens):
            terms = self._logits if isinstance(head, SpladeHead) else self._sparse_terms
            results |= terms(hidden, packed, upload(np.asarray(sparse_tokens)))
        if self._multi and (batch.outputs & Output.MULTI.value).any():
            rows = _through(self._multi, hidden[upload(self._multi_tokens(batch))])
            is_unit = not isinstance(head, MultiHead) or head.normalize
            results["multi"] = functional.normalize(rows, dim=-1) if is_unit else rows
        return results

    def vectors(self, results: Mapping[str, NDArray[Any]], batch: Batch) -> Vectors:
        """The rows of `launch`, now on the host, cut by sequence without copies."""
        sparse: list[SparseVector | None] = [None] * len(batch)
        multi: list[Float32Array | None] = [None] * len(batch)
        asked = np.flatnonzero(batch.outputs & Output.SPARSE.value).tolist()
        if "sparse_keys" in results:
            keys, weights = results["sparse_keys"], results["sparse_weights"]
            used = ~(weights <= 0)  # NaN stays: whoever checks that rows are finite must see it
            keys, weights = keys[used], weights[used]
            token_ids = (keys % self._vocabulary_size).astype(np.int32)
            starts = np.arange(len(batch) + 1) * self._vocabulary_size
            bounds = np.searchsorted(keys, starts).tolist()
            for i in asked:
                term = slice(bounds[i], bounds[i + 1])
                sparse[i] = SparseVector(token_ids[term], weights[term])
        elif "sparse_rows" in results:
            for i in asked:
                row = results["sparse_rows"][i]
                ids = np.flatnonzero(~(row <= 0)).astype(np.int32)
                sparse[i] = SparseVector(ids, row[ids])
        if "multi" in results:
            places = np.searchsorted(self._multi_tokens(batch), batch.cu_seqlens)
            for i in np.flatnonzero(batch.outputs & Output.MULTI.value).tolist():
                multi[i] = results["multi"][places[i] : places[i + 1]]
        chunks: list[Float32Array | None] = [None] * len(batch)
        if "chunks" in results:
            assert batch.chunks is not None
            ends = np.cumsum([len(bounds) - 1 for bounds in batch.chunks]).tolist()
            for i in np.flatnonzero(batch.outputs & Output.CHUNKS.value).tolist():
                chunks[i] = results["chunks"][ends[i] - len(batch.chunks[i]) + 1 : ends[i]]
        pooled = results.get("pooled")
        if self._pooler.is_score:
            return Vectors.of(score=pooled)
        return Vectors.of(pooled, sparse, multi, chunks=chunks)

    def seen_lengths(self, batch: Batch) -> tuple[int, ...]:
        """How many leading tokens of each sequence others attend to; none where it is all of them."""
        head = self._pooler.token_head
        if not isinstance(head, MultiHead) or head.unattended_token_id is None:
            return ()
        return tuple(head.seen_lengths(batch.token_ids, batch.cu_seqlens).tolist())

    def _multi_tokens(self, batch: Batch) -> Int32Array:
        """Indices of the tokens that have a row of their own: int32 `[rows]`, ascending."""
        head = self._pooler.token_head
        tokens = _tokens_wanting(batch, Output.MULTI)
        if isinstance(head, MultiHead):
            return tokens[head.has_row(batch.token_ids, batch.cu_seqlens)[tokens]]
        # The first token, <s>, has no vector.
        return tokens[~np.isin(tokens, batch.cu_seqlens[:-1], assume_unique=True)]

    def _pooled(self, hidden: Tensor, cu_seqlens: Tensor, skip: Tensor | None) -> Tensor:
        """One row a sequence: fp32 `[sequences, dimensions]`, or `[sequences, labels]`."""
        poolings, bounds = self._pooler.pooling, cu_seqlens.long()
        parts = [_pool(pooling, hidden, bounds, skip) for pooling in poolings]
        return self._finished(torch.cat(parts, dim=1))

    def _finished(self, pooled: Tensor) -> Tensor:
        """*pooled* rows through the layers, normalised and cut where the model says so."""
        pooled = _through(self._layers, pooled)
        if self._pooler.normalize:
            pooled = functional.normalize(pooled, dim=-1)
        return pooled[:, : self._pooler.dimensions]

    def _sparse_terms(
        self, hidden: Tensor, packed: PackedBatch, tokens: Tensor
    ) -> dict[str, Tensor]:
        """relu(H W' + b) of *tokens*, the maximum a sequence and token id, by sorting.

        Keys int64 `[tokens]` are sequence * vocabulary + token id and ascend over the slots in use;
        weights fp32 `[tokens]` are 0 in the others.
        """
        weights = torch.relu(_through(self._sparse, hidden[tokens]))[:, 0]
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

    def _logits(self, hidden: Tensor, packed: PackedBatch, tokens: Tensor) -> dict[str, Tensor]:
        """SPLADE's weights of *tokens*, the maximum a sequence: fp32 `[sequences, vocabulary]`."""
        sequences, vocabulary = len(packed.cu_seqlens) - 1, self._vocabulary_size
        best = torch.zeros((sequences, vocabulary), dtype=torch.float32, device=hidden.device)
        for piece in tokens.split(max(1, SPLADE_LOGITS_MAX // vocabulary)):
            logits = _through(self._sparse, hidden[piece])  # [piece, vocabulary]
            owners = packed.sequence_ids[piece].long()[:, None].expand_as(logits)
            best.scatter_reduce_(0, owners, logits, "amax")  # from 0 on, which is relu
        best = torch.log1p(best)
        head = self._pooler.token_head
        is_double = isinstance(head, SpladeHead) and head.takes_log_twice
        return {"sparse_rows": torch.log1p(best) if is_double else best}


def _on_device(layers: Sequence[HeadLayer], device: torch.device) -> list[DeviceLayer]:
    """*layers* as functions of fp32 rows `[rows, in]` on *device*."""

    def tensor(array: Float32Array | None) -> Tensor | None:
        return None if array is None else torch.tensor(array, device=device)

    def made(layer: HeadLayer) -> DeviceLayer:
        weight, bias = tensor(layer.weight), tensor(layer.bias)
        assert weight is not None, "every layer has a weight"
        if isinstance(layer, HeadLinear):
            after = NONLINEARITIES.get(layer.nonlinearity, lambda rows: rows)
            return lambda rows: after(functional.linear(rows, weight, bias))
        eps = layer.eps
        return lambda rows: functional.layer_norm(rows, weight.shape, weight, bias, eps)

    return [made(layer) for layer in layers]


def _through(layers: Sequence[DeviceLayer], rows: Tensor) -> Tensor:
    rows = rows.float()
    for layer in layers:
        rows = layer(rows)
    return rows


def _pool(pooling: Pooling, hidden: Tensor, cu_seqlens: Tensor, skip: Tensor | None) -> Tensor:
    """One row a sequence: fp32 `[sequences, hidden]`; *skip* `[sequences]` leading rows take no part."""
    starts, ends = cu_seqlens[:-1], cu_seqlens[1:]
    first = starts if skip is None else starts + skip
    if pooling is Pooling.CLS:
        return hidden[first].float()
    if pooling is Pooling.LAST:
        return hidden[ends - 1].float()
    rows, counts = hidden.float(), (ends - first).float()[:, None]  # counts: [sequences, 1]
    how = {Pooling.MAX: "max", Pooling.MEAN: "mean"}.get(pooling, "sum")
    if pooling is Pooling.WEIGHTED_MEAN:
        tokens = torch.arange(len(rows), device=rows.device)
        owners = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
        rows = rows * (tokens - cu_seqlens[owners] + 1)[:, None]
    offsets = cu_seqlens
    if skip is not None:  # segments of what is skipped and of the rest, by turns
        offsets = torch.cat((torch.stack((starts, first), dim=1).flatten(), cu_seqlens[-1:]))
    # `unsafe` leaves out a check of the offsets that would wait for the device.
    pooled = torch.segment_reduce(rows, how, offsets=offsets, axis=0, unsafe=True)
    pooled = pooled if skip is None else pooled[1::2]
    if pooling is Pooling.WEIGHTED_MEAN:  # by the sum of the places pooled
        return pooled / (counts * (ends + first - 2 * starts + 1)[:, None] / 2)
    return pooled / counts.sqrt() if pooling is Pooling.MEAN_SQRT_LEN else pooled


def _chunk_bounds(batch: Batch) -> tuple[Int32Array, Int32Array]:
    """Where segments of the tokens begin, and the last one's end; and which of them are chunks.

    Between the chunks of two sequences lies a segment that is none: int32 `[segments + 1]` and
    `[chunks]`.
    """
    assert batch.chunks is not None
    shifted = [start + own for start, own in zip(batch.cu_seqlens[:-1], batch.chunks, strict=True)]
    is_chunk = np.ones(sum(map(len, shifted)), np.bool_)
    is_chunk[np.cumsum([len(own) for own in shifted]) - 1] = False
    return np.concatenate(shifted).astype(np.int32), np.flatnonzero(is_chunk).astype(np.int32)


def _tokens_wanting(batch: Batch, output: Output) -> Int32Array:
    """Indices of the tokens whose sequence asks for *output*: int32 `[rows]`, ascending."""
    wants = (batch.outputs & output.value) != 0  # [sequences]
    return np.flatnonzero(np.repeat(wants, np.diff(batch.cu_seqlens))).astype(np.int32)
