"""Ops in plain numpy, float64, one text at a time: the slow twin of every family at once.

Written from the published formulas. It shares no arithmetic with the backends it is compared with.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivec.checkpoints.checkpoint import Checkpoint
from trivec.models import registry
from trivec.models.ops import (
    Activation,
    Alibi,
    AttentionSpec,
    Experts,
    Index,
    Linear,
    ModelConfig,
    Table,
)
from trivec.models.pooling import HeadLayer, HeadNorm, MultiHead, Nonlinearity, Pooling, SpladeHead

Floats = NDArray[np.float64]
erf = np.vectorize(math.erf, otypes=[np.float64])


class NumpyOps:
    """`models.ops.Ops` on the tokens of one text."""

    def __init__(
        self,
        tensors: Mapping[str, Floats],
        config: ModelConfig,
        ids: list[int],
        at: str = "",
        types: list[int] | None = None,
    ) -> None:
        self._tensors, self._config, self._ids, self._at = tensors, config, ids, at
        self._types = [0] * len(ids) if types is None else types

    def embed(self, table: Table, index: Index) -> Floats:
        ids = np.array(self._ids)
        positions = np.arange(len(ids)) + self._config.position_offset
        rows = {Index.ID: ids, Index.TYPE: np.array(self._types), Index.POSITION: positions}[index]
        looked_up: Floats = self._tensor(f"{table.name}.weight")[rows]
        return looked_up * table.scale

    def add(self, x: Floats, y: Floats) -> Floats:
        return x + y

    def layer_norm(self, x: Floats, name: str, *, eps: float, bias: bool = True) -> Floats:
        spread = np.sqrt(x.var(axis=1, keepdims=True) + eps)
        unit: Floats = (x - x.mean(axis=1, keepdims=True)) / spread
        normed = unit * self._tensor(f"{name}.weight")
        return normed + self._tensor(f"{name}.bias") if bias else normed

    def rms_norm(
        self, x: Floats, name: str, *, eps: float, width: int | None = None, offset: float = 0.0
    ) -> Floats:
        parts = x.reshape(len(x), -1, width or x.shape[1])
        unit: Floats = parts / np.sqrt((parts**2).mean(axis=-1, keepdims=True) + eps)
        return (unit * (self._tensor(f"{name}.weight") + offset)).reshape(x.shape)

    def linear(self, x: Floats, *layers: Linear) -> tuple[Floats, ...]:
        products = []
        for layer in layers:
            product = x @ self._tensor(f"{layer.name}.weight").T
            products.append(product + self._tensor(f"{layer.name}.bias") if layer.bias else product)
        return tuple(products)

    def attention(self, q: Floats, k: Floats, v: Floats, spec: AttentionSpec) -> Floats:
        attended = np.empty((len(q), spec.size))
        distance = np.arange(len(q))[None, :] - np.arange(len(q))[:, None]  # of a key from a query
        unseen = np.zeros(distance.shape, np.bool_)
        if spec.causal:
            unseen |= distance > 0
        if spec.window is not None:
            unseen |= np.abs(distance) > spec.window
        for head in range(spec.heads):
            own = slice(head * spec.head_dim, (head + 1) * spec.head_dim)
            read = head * spec.kv_heads // spec.heads
            read_at = slice(read * spec.head_dim, (read + 1) * spec.head_dim)
            query, key = self._rotated(q[:, own], spec), self._rotated(k[:, read_at], spec)
            scores = query @ key.T / math.sqrt(spec.head_dim) + self._gains(spec, head, distance)
            scores = np.where(unseen, -np.inf, scores)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            attended[:, own] = weights / weights.sum(axis=1, keepdims=True) @ v[:, read_at]
        return attended

    def mlp(
        self,
        x: Floats,
        up: Linear,
        down: Linear,
        activation: Activation,
        experts: Experts | None = None,
    ) -> Floats:
        inner = _activated(self.linear(x, up)[0], activation)
        if experts is not None:
            logits = x @ self._tensor(f"{experts.router}.weight").T
            shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            chosen = np.argsort(-shares, axis=1)[:, : experts.top_k]
            width = up.out // experts.num_experts
            gates = np.zeros_like(inner)
            for token, best in enumerate(chosen.tolist()):
                for expert in best:
                    gates[token, expert * width : (expert + 1) * width] = shares[token, expert]
            inner = inner * gates
        return self.linear(inner, down)[0]

    def gated_mlp(
        self, x: Floats, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Floats:
        gates, inner = self.linear(x, gate, up)
        return self.linear(_activated(gates, activation) * inner, down)[0]

    def keep(self, x: Floats) -> Floats:
        return x

    def block(self, function: Callable[..., Floats], at: str, *values: object) -> Floats:
        inside = NumpyOps(self._tensors, self._config, self._ids, f"{self._at}{at}.", self._types)
        return function(inside, *values)

    def _tensor(self, name: str) -> Floats:
        return self._tensors[self._at + name]

    def _gains(self, spec: AttentionSpec, head: int, distance: NDArray[np.int_]) -> Floats:
        """What a head's scores gain by the distance of a key (column) from its query (row)."""
        bias = spec.bias
        if bias is None:
            return np.zeros(distance.shape)
        if isinstance(bias, Alibi):
            return -_alibi_slopes(spec.heads)[head] * np.abs(distance)
        table = self._tensor(f"{bias.table.name}.weight")
        last = len(distance) - 1
        buckets = np.array([_bucket(one, len(table), bias.reach) for one in range(-last, last + 1)])
        gains: Floats = table[buckets[distance + last], head]
        return gains

    def _rotated(self, x: Floats, spec: AttentionSpec) -> Floats:
        """Each pair (x[i], x[i + d / 2]) of a token at position p turned by p / theta^(2 i / d)."""
        if spec.rope is None:
            return x
        half = spec.head_dim // 2
        speeds = spec.rope.theta ** (-np.arange(half) / half) / spec.rope.divisor
        turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * np.arange(len(x))[:, None] * speeds)
        return np.concatenate([turned.real, turned.imag], axis=1)


def _activated(x: Floats, activation: Activation) -> Floats:
    if activation is Activation.SILU:
        silu: Floats = x / (1 + np.exp(-x))
        return silu
    if activation is Activation.GELU_TANH:
        by_tanh: Floats = x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        return by_tanh
    gelu: Floats = x * 0.5 * (1 + erf(x / math.sqrt(2)))
    return gelu


def _alibi_slopes(heads: int) -> list[float]:
    """The geometric series of the paper; for a count between powers of two its neighbours' mix."""
    if heads & (heads - 1) == 0:
        return [2 ** (-8 * (i + 1) / heads) for i in range(heads)]
    below = 2 ** int(math.log2(heads))
    return _alibi_slopes(below) + _alibi_slopes(2 * below)[0::2][: heads - below]


def _bucket(distance: int, buckets: int, reach: int) -> int:
    """The paper's buckets in both directions; at a border of two what float32 says."""
    half = buckets // 2
    exact, size = half // 2, abs(distance)
    if size < exact:
        place = size
    else:
        steps = np.float32(np.log(np.float32(size / exact))) / np.float32(math.log(reach / exact))
        place = min(exact + int(steps * np.float32(half - exact)), half - 1)
    return place + (half if distance > 0 else 0)


@dataclass(frozen=True, slots=True)
class TwinVectors:
    """The vectors that one text should have; sparse and multi are empty without heads."""

    dense: Floats  # [dimensions]; or the scores [labels]; empty where nothing is pooled
    sparse: dict[int, float]
    multi: Floats  # [rows, dimensions]


class Twin:
    """One checkpoint, in float64."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        with checkpoint.weights() as weights:
            self._tensors = {
                name: weights.take(name).astype(np.float64)
                for name in registry.tensor_shapes(checkpoint.config)
            }

    def hidden(self, ids: list[int], types: list[int] | None = None) -> Floats:
        """Last hidden states: `[tokens, hidden]`."""
        config = self._checkpoint.config
        return registry.forward(NumpyOps(self._tensors, config, ids, types=types), config)

    def vectors(self, ids: list[int], types: list[int] | None = None) -> TwinVectors:
        hidden, heads = self.hidden(ids, types), self._checkpoint.heads
        parts = [pooled(pooling, hidden) for pooling in self._checkpoint.pooling]
        dense = np.concatenate([*parts, np.empty(0)])
        dense = through(self._checkpoint.layers, dense[None])[0]
        dense = dense / np.linalg.norm(dense) if self._checkpoint.normalize else dense
        dense = dense[: self._checkpoint.truncate_dim]
        rows, sparse = np.empty((0, 0)), dict[int, float]()
        if heads is not None:
            for token, row in zip(ids, hidden, strict=True):
                weight = float(row @ heads.sparse_weight[0] + heads.sparse_bias[0])
                if weight > 0 and token not in heads.ignored_token_ids:
                    sparse[token] = max(weight, sparse.get(token, 0.0))
            rows = hidden[1:] @ heads.multi_weight.T + heads.multi_bias
            rows = np.array([row / np.linalg.norm(row) for row in rows])
        head = self._checkpoint.token_head
        if isinstance(head, SpladeHead):
            weights = np.log1p(np.maximum(through(head.layers, hidden), 0)).max(axis=0)
            weights = np.log1p(weights) if head.takes_log_twice else weights
            sparse = {token: float(weights[token]) for token in np.flatnonzero(weights).tolist()}
        elif isinstance(head, MultiHead):
            rows = through(head.layers, hidden)
            if head.normalize:
                rows = np.array([row / np.linalg.norm(row) for row in rows])
        return TwinVectors(dense, sparse, rows)


def pooled(pooling: Pooling, hidden: Floats) -> Floats:
    """One vector of the hidden states `[tokens, hidden]` of one text."""
    places = np.arange(1, len(hidden) + 1)
    made: dict[Pooling, Floats] = {
        Pooling.CLS: hidden[0],
        Pooling.MEAN: hidden.mean(axis=0),
        Pooling.LAST: hidden[-1],
        Pooling.MAX: hidden.max(axis=0),
        Pooling.WEIGHTED_MEAN: np.average(hidden, axis=0, weights=places),
        Pooling.MEAN_SQRT_LEN: hidden.sum(axis=0) / math.sqrt(len(hidden)),
    }
    return made[pooling]


def through(layers: Sequence[HeadLayer], rows: Floats) -> Floats:
    """*rows* through a head's layers."""
    for layer in layers:
        weight, bias = (0.0 if one is None else one for one in (layer.weight, layer.bias))
        if isinstance(layer, HeadNorm):
            spread = np.sqrt(rows.var(axis=1, keepdims=True) + layer.eps)
            rows = (rows - rows.mean(axis=1, keepdims=True)) / spread * weight + bias
            continue
        rows = rows @ np.asarray(weight, np.float64).T + bias
        if layer.nonlinearity is Nonlinearity.TANH:
            rows = np.tanh(rows)
        elif layer.nonlinearity is Nonlinearity.GELU:
            rows = _activated(rows, Activation.GELU)
        elif layer.nonlinearity is Nonlinearity.RELU:
            rows = np.maximum(rows, 0)
    return rows
