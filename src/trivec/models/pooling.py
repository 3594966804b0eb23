"""Pooling and heads: from packed hidden states to vectors and scores, in numpy on the host.

One pass serves any mix of outputs in a batch. A sequence's bits depend on its own rows alone: sums
run along one row or one sequence, and matrix products are made per sequence, since BLAS picks its
kernel by the number of rows.
"""

import ctypes
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trivec.core.types import Float32Array, Int32Array, Output, SparseVector, Vectors

LENGTH_FLOOR = 1e-12  # as torch.nn.functional.normalize: a zero row stays zero
SPLADE_ROWS = 64  # whose logits are in memory at once: 8 MB at 30,522 words, 64 MB at 250,002

# What sets OpenBLAS's threads, by who built it: numpy's wheels, and the distributions of Linux.
SET_BLAS_THREADS = (
    "scipy_openblas_set_num_threads64_",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)

LogitsOf: TypeAlias = Callable[[Float32Array], Float32Array]
"""A SPLADE head where it runs: at most `SPLADE_ROWS` hidden states to `[rows, vocabulary]`, which may
be memory that the next call overwrites. A row's bits depend on that row alone.
"""


class Pooling(Enum):
    """Of which tokens a vector is made."""

    CLS = "cls"  # the first token's
    MEAN = "mean"  # the mean over all tokens
    LAST = "lasttoken"  # the last token's
    MAX = "max"  # the largest number of each channel
    WEIGHTED_MEAN = "weightedmean"  # the mean, the first token counted once, the second twice, ...
    MEAN_SQRT_LEN = "mean_sqrt_len_tokens"  # the sum over the square root of the token count


class Nonlinearity(Enum):
    """What follows a linear layer of a head."""

    IDENTITY = "identity"
    TANH = "tanh"
    GELU = "gelu"  # x Φ(x) by erf
    RELU = "relu"


@dataclass(frozen=True, slots=True, eq=False)
class HeadLinear:
    """A linear layer after the encoder: f(X Wᵀ + b)."""

    weight: Float32Array  # [out, in]
    bias: Float32Array | None  # [out]
    nonlinearity: Nonlinearity = Nonlinearity.IDENTITY

    def __call__(self, rows: Float32Array) -> Float32Array:
        """Float32 `[rows, in]` to `[rows, out]`."""
        product: Float32Array = rows @ self.weight.T
        if self.bias is not None:
            product += self.bias
        if self.nonlinearity is Nonlinearity.TANH:
            np.tanh(product, out=product)
        elif self.nonlinearity is Nonlinearity.RELU:
            np.maximum(product, 0, out=product)
        elif self.nonlinearity is Nonlinearity.GELU:
            product *= 0.5 * (1 + erf(product * np.float32(0.5**0.5)))
        return product


@dataclass(frozen=True, slots=True, eq=False)
class HeadNorm:
    """A LayerNorm after the encoder: (x - mean) / sqrt(variance + eps) * weight + bias."""

    weight: Float32Array  # [width]
    bias: Float32Array | None  # [width]
    eps: float

    def __call__(self, rows: Float32Array) -> Float32Array:
        """Float32 `[rows, width]` to the same."""
        centred = rows - rows.mean(axis=1, keepdims=True)
        variance = np.square(centred).mean(axis=1, keepdims=True)
        normed: Float32Array = centred / np.sqrt(variance + np.float32(self.eps)) * self.weight
        return normed if self.bias is None else normed + self.bias


HeadLayer: TypeAlias = HeadLinear | HeadNorm


@dataclass(frozen=True, slots=True)
class Heads:
    """BGE-M3's two linear layers on the last hidden states, and what never is a lexical weight."""

    sparse_weight: Float32Array  # [1, hidden]
    sparse_bias: Float32Array  # [1]
    multi_weight: Float32Array  # [multi_dimensions, hidden]
    multi_bias: Float32Array  # [multi_dimensions]
    ignored_token_ids: tuple[int, ...]  # cls, eos, pad and unk


@dataclass(frozen=True, slots=True)
class SpladeHead:
    """A masked language model's head, whose logits are sparse weights (arXiv:2109.10086).

    A word's weight is log(1 + relu(logit)) of the token that gives it most.
    """

    layers: tuple[HeadLayer, ...]  # from a hidden state to a logit for each token id
    takes_log_twice: bool = False  # log(1 + log(1 + relu(logit))), arXiv:2504.14839


@dataclass(frozen=True, slots=True)
class MultiHead:
    """ColBERT's layers on each hidden state (arXiv:2004.12832); each row has length 1 where said."""

    layers: tuple[HeadLayer, ...]
    normalize: bool
    skipped_token_ids: tuple[int, ...] = ()  # that have no row, but in queries
    query_token_id: int | None = None  # the first or second token of queries, and of nothing else
    unattended_token_id: int | None = None  # that no token attends to at a sequence's end

    def has_row(self, token_ids: Int32Array, cu_seqlens: Int32Array) -> NDArray[np.bool_]:
        """Which of the packed *token_ids* have a row: bool `[tokens]`."""
        starts = cu_seqlens[:-1]
        seconds = np.minimum(starts + 1, cu_seqlens[1:] - 1)
        is_query = (token_ids[starts] == self.query_token_id) | (
            token_ids[seconds] == self.query_token_id
        )
        found: NDArray[np.bool_] = ~np.isin(token_ids, self.skipped_token_ids)
        found |= np.repeat(is_query, np.diff(cu_seqlens))
        return found

    def seen_lengths(self, token_ids: Int32Array, cu_seqlens: Int32Array) -> Int32Array:
        """How many leading tokens of each sequence others attend to: int32 `[sequences]`, at least 1."""
        places = np.arange(len(token_ids)) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
        ends = np.where(token_ids == self.unattended_token_id, 1, places + 1)
        return np.maximum.reduceat(ends, cu_seqlens[:-1]).astype(np.int32)


TokenHead: TypeAlias = SpladeHead | MultiHead


class LinearName(NamedTuple):
    """Where a family's files keep a linear layer of a head: names of tensors."""

    weight: str
    bias: str | None
    nonlinearity: Nonlinearity = Nonlinearity.IDENTITY

    @classmethod
    def of(cls, name: str, nonlinearity: Nonlinearity = Nonlinearity.IDENTITY) -> "LinearName":
        """A layer with a bias, both under *name*."""
        return cls(f"{name}.weight", f"{name}.bias", nonlinearity)


class NormName(NamedTuple):
    """Where a family's files keep a LayerNorm of a head: names of tensors."""

    weight: str
    bias: str | None
    eps: float


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """The head that a family's class has: of a classifier pooling first, of SPLADE none.

    Of dense vectors it is linear, follows whatever pooling the folder says, and stands before modules.
    """

    output: Output  # SCORE, SPARSE or DENSE
    pooling: tuple[Pooling, ...]
    layers: tuple[LinearName | NormName, ...]


@dataclass(frozen=True, slots=True)
class HiddenRows:
    """Last hidden states of the tokens that a batch's outputs need, sequences end to end."""

    hidden: Float32Array  # [rows, hidden]
    token_ids: Int32Array  # [rows]
    cu_seqlens: Int32Array  # [sequences + 1]; with CLS pooling a sequence may be its first row
    outputs: NDArray[np.uint8]  # [sequences]; Output flags
    skip: Int32Array | None = None  # [sequences]; leading rows not pooled, at least one stays
    chunks: Sequence[Int32Array] | None = None  # [sequences] of [chunks + 1]; as in `Sequences`


@dataclass(frozen=True, slots=True)
class Pooler:
    """How one model's hidden states become its vectors or scores."""

    pooling: tuple[Pooling, ...]  # laid end to end; none: the model has token heads only
    normalize: bool
    heads: Heads | None
    layers: tuple[HeadLayer, ...] = ()  # after pooling
    token_head: TokenHead | None = None
    is_score: bool = False  # the pooled row is a score, not a vector
    dimensions: int | None = None  # so many numbers of a vector are kept; None: all

    @property
    def token(self) -> Pooling | None:
        """CLS or LAST where a pooled row needs that token alone."""
        single = self.pooling[0] if len(self.pooling) == 1 else None
        return single if single in (Pooling.CLS, Pooling.LAST) else None

    def vectors(self, rows: HiddenRows, logits_of: LogitsOf | None = None) -> Vectors:
        """All that was asked for, one entry a sequence, none of it a view of `rows.hidden`.

        Dense: the pooled row through the layers, L2-normalised and cut where the model says so.
        Sparse (BGE-M3): relu(H Wsᵀ + bs), the maximum a token id. Multi: H[1:] Wcᵀ + bc, each row
        L2-normalised. SPLADE's head is *logits_of*.
        """
        pooled = self._pooled(rows) if self.pooling else None
        sparse: list[SparseVector | None] = [None] * len(rows.outputs)
        multi: list[Float32Array | None] = [None] * len(rows.outputs)
        if self.heads is not None:
            _fill_sparse(self.heads, rows, sparse)
            _fill_multi(self.heads, rows, multi)
        if isinstance(self.token_head, SpladeHead):
            assert logits_of is not None, "a backend runs the head"
            _fill_splade(self.token_head, rows, sparse, logits_of)
        elif isinstance(self.token_head, MultiHead):
            _fill_colbert(self.token_head, rows, multi)
        if self.is_score:
            return Vectors.of(score=pooled)
        return Vectors.of(pooled, tuple(sparse), tuple(multi), chunks=self._chunks(rows))

    def _chunks(self, rows: HiddenRows) -> Sequence[Float32Array | None]:
        """The vectors of each sequence's chunks: the mean of each, and then as dense ones."""
        if rows.chunks is None:
            return ()
        found: list[Float32Array | None] = [None] * len(rows.outputs)
        for i in _asked(rows, Output.CHUNKS).tolist():
            bounds = rows.chunks[i]  # [chunks + 1]
            own = rows.hidden[rows.cu_seqlens[i] : rows.cu_seqlens[i] + bounds[-1]]
            sums: Float32Array = np.add.reduceat(own, bounds[:-1], axis=0)
            found[i] = self._finished(sums / np.diff(bounds).astype(np.float32)[:, None])
        return found

    def _pooled(self, rows: HiddenRows) -> Float32Array:
        """One row a sequence: float32 `[sequences, dimensions]`, or `[sequences, labels]`."""
        parts = [_pool(pooling, rows) for pooling in self.pooling]
        return self._finished(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1))

    def _finished(self, pooled: Float32Array) -> Float32Array:
        """*pooled* rows through the layers, normalised and cut where the model says so."""
        if self.layers:
            each = [through(self.layers, pooled[i : i + 1]) for i in range(len(pooled))]
            pooled = np.concatenate(each)
        if self.normalize:
            pooled = _unit(pooled)
        return pooled[:, : self.dimensions]


def use_one_blas_thread() -> None:
    """Let numpy compute each product on the thread that asks for it, in this process from now on.

    OpenBLAS would divide even a head's product of one row among all cores, whose threads then spin for
    some 50 ms in wait of the next. Beside slots that keep the cores busy such a product took 10 ms
    instead of 0.2, and a reranker of 3 layers lost a fifth of its rate. Another library is left as it is.
    """
    library = ctypes.CDLL(sys.modules["numpy._core._multiarray_umath"].__file__)
    for name in SET_BLAS_THREADS:
        if (set_threads := getattr(library, name, None)) is not None:
            set_threads(ctypes.c_int(1))


def through(layers: Sequence[HeadLayer], rows: Float32Array) -> Float32Array:
    """*rows* of one sequence, float32 `[rows, width]`, through *layers*."""
    for layer in layers:
        rows = layer(rows)
    return rows


def erf(x: Float32Array) -> Float32Array:
    """The error function to 1.5e-7 (Abramowitz and Stegun 1964, 7.1.26); numpy has none."""
    size = np.abs(x)
    t = 1 / (1 + np.float32(0.3275911) * size)
    series = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(factor)) * t
    found: Float32Array = np.copysign(1 - series * np.exp(-size * size), x)
    return found


def _pool(pooling: Pooling, rows: HiddenRows) -> Float32Array:
    """One row a sequence: float32 `[sequences, hidden]`."""
    starts, hidden = rows.cu_seqlens[:-1], rows.hidden
    skip = np.zeros_like(starts) if rows.skip is None else rows.skip
    first: Int32Array = starts + skip
    if pooling is Pooling.CLS:
        return hidden[first]
    if pooling is Pooling.LAST:
        return hidden[rows.cu_seqlens[1:] - 1]
    lengths = np.diff(rows.cu_seqlens)
    counts: Float32Array = (lengths - skip).astype(np.float32)
    if pooling is Pooling.WEIGHTED_MEAN:
        places = np.arange(1, len(hidden) + 1) - np.repeat(starts, lengths)  # from 1 in each
        hidden = hidden * places.astype(np.float32)[:, None]
        counts *= ((lengths + skip + 1) / 2).astype(np.float32)  # the sum of the places pooled
    elif pooling is Pooling.MEAN_SQRT_LEN:
        counts = np.sqrt(counts)
    reduced = np.maximum if pooling is Pooling.MAX else np.add
    if rows.skip is None:
        pooled: Float32Array = reduced.reduceat(hidden, first, axis=0)
    else:  # of what is skipped and of the rest, by turns
        bounds = np.column_stack((starts, first)).reshape(-1)  # [2 * sequences]
        pooled = reduced.reduceat(hidden, bounds, axis=0)[1::2]
    if pooling is not Pooling.MAX:
        pooled /= counts[:, None]
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


def _fill_splade(
    head: SpladeHead, rows: HiddenRows, sparse: list[SparseVector | None], logits_of: LogitsOf
) -> None:
    """Weights of the words that the tokens of each sequence that asked suggest."""
    asked = _asked(rows, Output.SPARSE)
    lengths = np.diff(rows.cu_seqlens)
    owners = np.repeat(np.arange(len(lengths)), lengths)  # [rows]
    wanted = np.flatnonzero(np.isin(owners, asked))
    best: dict[int, Float32Array] = {}  # by sequence the largest logit of each word
    for begin in range(0, len(wanted), SPLADE_ROWS):
        piece = wanted[begin : begin + SPLADE_ROWS]
        logits = logits_of(rows.hidden[piece])
        found, firsts = np.unique(owners[piece], return_index=True)
        for i, own in zip(found.tolist(), np.split(logits, firsts[1:]), strict=True):
            largest = own.max(axis=0)
            best[i] = np.maximum(best[i], largest) if i in best else largest
        for i in [one for one in best if one != owners[piece[-1]]]:
            sparse[i] = _weighed(head, best.pop(i))
    for i, logits in best.items():
        sparse[i] = _weighed(head, logits)


def _weighed(head: SpladeHead, logits: Float32Array) -> SparseVector:
    """The weights of the words whose *logits* `[vocabulary]` are above 0."""
    ids = np.flatnonzero(~(logits <= 0)).astype(np.int32)  # NaN is kept on purpose
    weights = np.log1p(logits[ids])
    return SparseVector(ids, np.log1p(weights) if head.takes_log_twice else weights)


def _fill_colbert(head: MultiHead, rows: HiddenRows, multi: list[Float32Array | None]) -> None:
    """A row for each token, of every sequence that asked, but for those that are skipped."""
    has_row = head.has_row(rows.token_ids, rows.cu_seqlens)
    for i in _asked(rows, Output.MULTI).tolist():
        own = slice(rows.cu_seqlens[i], rows.cu_seqlens[i + 1])
        projected = through(head.layers, rows.hidden[own][has_row[own]])
        multi[i] = _unit(projected) if head.normalize else projected
