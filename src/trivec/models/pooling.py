"""Pooling: from packed hidden states to vectors, in numpy on the host.

One pass serves any mix of outputs in a batch. A sequence's bits depend on its own rows alone: sums
run along one row or one sequence, and matrix products are made per sequence, since BLAS picks its
kernel by the number of rows.
"""

from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from trivec.core.types import Float32Array, Int32Array, Output, SparseVector, Vectors

LENGTH_FLOOR = 1e-12  # as torch.nn.functional.normalize: a zero row stays zero


class Pooling(Enum):
    """Of which tokens the dense vector is made."""

    CLS = "cls"  # the first token's
    MEAN = "mean"  # the mean over all tokens
    LAST = "lasttoken"  # the last token's


@dataclass(frozen=True, slots=True)
class Heads:
    """BGE-M3's two linear layers on the last hidden states, and what never is a lexical weight."""

    sparse_weight: Float32Array  # [1, hidden]
    sparse_bias: Float32Array  # [1]
    multi_weight: Float32Array  # [multi_dimensions, hidden]
    multi_bias: Float32Array  # [multi_dimensions]
    ignored_token_ids: tuple[int, ...]  # cls, eos, pad and unk


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """Last hidden states of the tokens that a batch's outputs need, sequences end to end."""

    hidden: Float32Array  # [rows, hidden]
    token_ids: Int32Array  # [rows]
    cu_seqlens: (
        Int32Array  # [sequences + 1]; with CLS pooling a sequence may have its first row only
    )
    outputs: NDArray[np.uint8]  # [sequences]; Output flags
    skip: Int32Array | None = (
        None  # [sequences]; leading rows left out of a mean, at least one stays
    )


@dataclass(frozen=True, slots=True)
class Pooler:
    """How one model's hidden states become its vectors."""

    pooling: Pooling
    normalize: bool
    heads: Heads | None

    def vectors(self, rows: HiddenRows) -> Vectors:
        """All that was asked for, one entry a sequence, none of it a view of `rows.hidden`.

        Dense: the pooled row, L2-normalised where the model says so. Sparse (BGE-M3):
        relu(H Wsᵀ + bs), the maximum a token id. Multi: H[1:] Wcᵀ + bc, each row L2-normalised.
        """
        dense = self._pool(rows)  # [sequences, hidden]
        if self.normalize:
            dense = _unit(dense)
        sparse: list[SparseVector | None] = [None] * len(rows.outputs)
        multi: list[Float32Array | None] = [None] * len(rows.outputs)
        if self.heads is not None:
            _fill_sparse(self.heads, rows, sparse)
            _fill_multi(self.heads, rows, multi)
        return Vectors.of(dense, tuple(sparse), tuple(multi))

    def _pool(self, rows: HiddenRows) -> Float32Array:
        first = rows.cu_seqlens[:-1]
        if self.pooling is Pooling.CLS:
            return rows.hidden[first]
        if self.pooling is Pooling.LAST:
            return rows.hidden[rows.cu_seqlens[1:] - 1]
        skip = 0 if rows.skip is None else rows.skip
        lengths = (np.diff(rows.cu_seqlens) - skip).astype(np.float32)
        if rows.skip is None:
            pooled: Float32Array = np.add.reduceat(rows.hidden, first, axis=0)
        else:  # sums of what is skipped and of the rest, by turns
            bounds = np.column_stack((first, first + skip)).reshape(-1)  # [2 * sequences]
            pooled = np.add.reduceat(rows.hidden, bounds, axis=0)[1::2]
        pooled /= lengths[:, None]
        return pooled


def _unit(rows: Float32Array) -> Float32Array:
    """Each row divided by its L2 norm: float32 `[rows, dimensions]`."""
    norms = np.sqrt(np.einsum("rd,rd->r", rows, rows)).astype(np.float32)
    unit: Float32Array = rows / np.maximum(norms, np.float32(LENGTH_FLOOR))[:, None]
    return unit


def _asked(rows: HiddenRows, output: Output) -> NDArray[np.intp]:
    """Indices of the sequences that asked for *output*."""
    return np.flatnonzero(rows.outputs & np.uint8(output))


def _fill_sparse(heads: Heads, rows: HiddenRows, sparse: list[SparseVector | None]) -> None:
    """Lexical weights of every sequence that asked, all of them in one sort by (sequence, id)."""
    asked = _asked(rows, Output.SPARSE)
    if not len(asked):
        return
    lengths = np.diff(rows.cu_seqlens)
    wanted = np.repeat((rows.outputs & np.uint8(Output.SPARSE)) != 0, lengths)  # [rows]
    wanted &= ~np.isin(rows.token_ids, heads.ignored_token_ids)
    places = np.flatnonzero(wanted)
    weights = np.einsum("rh,h->r", rows.hidden[places], heads.sparse_weight[0])
    weights += heads.sparse_bias[0]
    sequence = np.repeat(np.arange(len(lengths)), lengths)[places]
    # NaN is kept on purpose: the engine must see that the row is not finite.
    positive = ~(weights <= 0)
    sequence, ids, weights = sequence[positive], rows.token_ids[places][positive], weights[positive]
    order = np.lexsort((ids, sequence))
    sequence, ids, weights = sequence[order], ids[order], weights[order]
    is_first = np.ones(len(ids), np.bool_)
    is_first[1:] = (sequence[1:] != sequence[:-1]) | (ids[1:] != ids[:-1])
    firsts = np.flatnonzero(is_first)
    if len(firsts):
        weights = np.maximum.reduceat(weights, firsts)
    ids, sequence = ids[firsts], sequence[firsts]
    ends = np.searchsorted(sequence, asked, side="right")
    begins = np.searchsorted(sequence, asked, side="left")
    for i, begin, end in zip(asked.tolist(), begins.tolist(), ends.tolist(), strict=True):
        sparse[i] = SparseVector(ids[begin:end].copy(), weights[begin:end].copy())


def _fill_multi(heads: Heads, rows: HiddenRows, multi: list[Float32Array | None]) -> None:
    """Token vectors of those who asked: `<s>` dropped, `</s>` kept."""
    for i in _asked(rows, Output.MULTI).tolist():
        own = rows.hidden[rows.cu_seqlens[i] + 1 : rows.cu_seqlens[i + 1]]  # [tokens - 1, hidden]
        multi[i] = _unit(own @ heads.multi_weight.T + heads.multi_bias)
