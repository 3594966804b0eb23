"""Ops: the vocabulary in which a family's forward pass is written, and its plan of tensors.

An op is a step of a transformer block, not elementwise arithmetic, so that a backend can pack, quantise
and fuse inside of it. `backends/openvino` emits graph nodes for each, `backends/torch` computes it at
once, and `Recorder` here follows the shapes alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from trivec.core.types import Float32Array

T = TypeVar("T")


class Index(Enum):
    """By what a table of embeddings is looked up."""

    ID = "id"
    TYPE = "type"
    POSITION = "position"  # of a token in its sequence, plus the family's offset


class Activation(Enum):
    """The nonlinearity of a feed-forward network."""

    GELU = "gelu"  # the exact one, x Φ(x) by erf
    GELU_TANH = "gelu_pytorch_tanh"  # x Φ(x), with tanh of a polynomial for erf
    SILU = "silu"  # x / (1 + exp(-x))


class Table(NamedTuple):
    """A table of embeddings: the tensor `{name}.weight` of `[rows, width]`."""

    name: str
    rows: int
    width: int
    scale: float = 1.0  # a row is multiplied by it when it is looked up


class Linear(NamedTuple):
    """A linear layer: the tensors `{name}.weight` of `[out, in]` and `{name}.bias` of `[out]`."""

    name: str
    out: int
    bias: bool = True


class Experts(NamedTuple):
    """A mixture of experts: which of the networks in a wide `mlp` a token goes through.

    The router is the tensor `{router}.weight` of `[num_experts, in]`; its softmax weighs the experts,
    and the *top_k* take part with their weights as they are. The layers hold the experts end to end.
    """

    router: str
    num_experts: int
    top_k: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions (Su et al. 2021, arXiv:2104.09864), the halves of a head rotated together."""

    theta: float
    positions: int  # for which there is an angle
    divisor: float = 1.0  # of every frequency, so that more positions share a turn

    def tables(self, head_dim: int) -> tuple[Float32Array, Float32Array]:
        """Cosines and sines: each float32 `[positions, head_dim / 2]`."""
        steps = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        frequencies = (1 / np.float32(self.theta) ** steps).astype(np.float32)
        frequencies /= np.float32(self.divisor)
        angles = np.arange(self.positions, dtype=np.float32)[:, None] * frequencies
        return np.cos(angles), np.sin(angles)


@dataclass(frozen=True, slots=True)
class Alibi:
    """A score falls with the distance, in each head at its own slope, to both sides alike.

    Press et al. 2021, arXiv:2108.12409, whose slopes these are; to both sides as in
    Günther et al. 2023, arXiv:2310.19923.
    """

    heads: int
    reach: int  # the longest distance there is

    @property
    def slopes(self) -> Float32Array:
        """2^(-8 i / n) for head i of n, n a power of two: float32 `[heads]`.

        For other counts the power of two below, and every second slope of the one above.
        """
        whole = 1 << (self.heads.bit_length() - 1)
        steps = [*range(2, 2 * whole + 1, 2), *range(1, 2 * (self.heads - whole), 2)]
        return np.array([2 ** (-4 * step / whole) for step in steps], np.float32)

    def by_distance(self) -> Float32Array:
        """What a score gains at each distance from -reach to reach: `[heads, 2 * reach + 1]`."""
        distances = np.abs(np.arange(-self.reach, self.reach + 1, dtype=np.float32))
        return -self.slopes[:, None] * distances


@dataclass(frozen=True, slots=True)
class Buckets:
    """A score gains a learned number, the same for all distances in a bucket.

    Half of the buckets are for keys after the query. In each half the nearest distances have one each
    and the others widen with the logarithm (T5: Raffel et al. 2019, arXiv:1910.10683).
    """

    table: Table  # [buckets, heads]
    reach: int  # distances from here on share the last bucket

    def by_distance(self, table: Float32Array) -> Float32Array:
        """What a score gains at each distance from -reach to reach: `[heads, 2 * reach + 1]`."""
        half = self.table.rows // 2
        exact = half // 2
        distances = np.arange(-self.reach, self.reach + 1)  # of a key from its query
        # In float32 and this order, as where such models are trained: some distances are the first of
        # their bucket only so.
        steps = np.log(np.maximum(np.abs(distances), 1).astype(np.float32) / np.float32(exact))
        steps = steps / np.float32(np.log(self.reach / exact)) * np.float32(half - exact)
        buckets = np.minimum(exact + steps.astype(np.int64), half - 1)
        buckets = np.where(np.abs(distances) < exact, np.abs(distances), buckets)
        gains: Float32Array = table[buckets + half * (distances > 0)].T
        return gains


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One kind of attention: heads, positions, and which tokens a token sees."""

    heads: int
    head_dim: int
    kv_heads: int  # fewer than heads: each is read by heads / kv_heads of them
    rope: Rope | None = None
    causal: bool = False  # a token sees itself and those before
    window: int | None = None  # a token sees at most so many on either side
    bias: Alibi | Buckets | None = None  # what scores gain by distance

    def __post_init__(self) -> None:
        assert self.heads % self.kv_heads == 0

    @property
    def size(self) -> int:
        """Numbers of one token in all heads."""
        return self.heads * self.head_dim

    @property
    def sees_all(self) -> bool:
        return not self.causal and self.window is None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What every family's config has, named as in `config.json`."""

    family: str  # model_type
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    position_offset: int  # position of a sequence's first token
    pad_token_id: int

    @property
    def token_count_max(self) -> int:
        """Tokens for which there is a position, special tokens included."""
        return self.max_position_embeddings - self.position_offset

    @property
    def token_type_count(self) -> int:
        """Rows of the table of token types; 0 where the family has none."""
        return getattr(self, "type_vocab_size", 0)

    @property
    def fp32_reason(self) -> str | None:
        """Why `auto` never takes half precision, in a clause; None where it may."""
        return None


class Ops(Protocol[T]):
    """A backend's ops on packed tokens. *T* stands for rows `[tokens, width]`.

    Names of tensors are relative to the block that uses them, see `block`.
    """

    def embed(self, table: Table, index: Index) -> T:
        """A row of *table* for each token."""
        ...

    def add(self, x: T, y: T) -> T: ...

    def layer_norm(self, x: T, name: str, *, eps: float, bias: bool = True) -> T:
        """(x - mean) / sqrt(variance + eps) * weight + bias over each row."""
        ...

    def rms_norm(
        self, x: T, name: str, *, eps: float, width: int | None = None, offset: float = 0.0
    ) -> T:
        """X / sqrt(mean of squares + eps) * (weight + offset) over each row, or *width* numbers."""
        ...

    def linear(self, x: T, *layers: Linear) -> tuple[T, ...]:
        """X Wᵀ + b for each of *layers*, which share an input so that it is quantised once."""
        ...

    def attention(self, q: T, k: T, v: T, spec: AttentionSpec) -> T:
        """softmax(Q Kᵀ / sqrt(head_dim) + bias) V in each sequence: `[tokens, heads * head_dim]`."""
        ...

    def mlp(
        self, x: T, up: Linear, down: Linear, activation: Activation, experts: Experts | None = None
    ) -> T:
        """down(activation(up(x))), both linear; of *experts* the inner numbers times their weights."""
        ...

    def gated_mlp(self, x: T, gate: Linear, up: Linear, down: Linear, activation: Activation) -> T:
        """down(activation(gate(x)) * up(x)), all linear."""
        ...

    def keep(self, x: T) -> T:
        """The rows of the tokens that somebody asked for; all of them where the backend likes."""
        ...

    def block(self, function: "Callable[..., T]", at: str, *values: object) -> T:
        """`function(ops, *values)`, whose names of tensors follow *at* and a dot.

        What lies in one block is free of attention, so a backend may compile it as one.
        """
        ...


@dataclass(frozen=True, slots=True)
class LinearGroup:
    """Linear layers that read the same input."""

    names: tuple[str, ...]
    activation: Activation | None = None  # what made the input
    # The linear layer whose output attention has averaged to the input, channel by channel.
    values: str | None = None

    @property
    def layer(self) -> int:
        return layer_of(self.names[0])


def layer_of(name: str) -> int:
    """The number of the layer that a tensor or module *name* belongs to."""
    return next(int(part) for part in name.split(".") if part.isdecimal())


@dataclass(frozen=True, slots=True)
class Plan:
    """What a forward pass reads: every tensor's shape, and which linear layers share an input."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # linear weights [out, in]
    linears: list[LinearGroup] = field(default_factory=list)
    token_tables: list[str] = field(default_factory=list)  # looked up by token id
    attention: list[AttentionSpec] = field(default_factory=list)  # of each layer
    blocks: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Traced:
    """Rows of which only the width and the origin are known."""

    width: int
    linear: str | None = None  # the linear layer that made them
    values: str | None = None  # the one whose values attention averaged
    activation: Activation | None = None


class Recorder:
    """`Ops` that compute nothing and write a `Plan`."""

    def __init__(self, plan: Plan, at: str = "") -> None:
        self._plan = plan
        self._at = at

    def embed(self, table: Table, index: Index) -> Traced:
        self._plan.shapes[f"{self._at}{table.name}.weight"] = (table.rows, table.width)
        if index is Index.ID:
            self._plan.token_tables.append(self._at + table.name)
        return Traced(table.width)

    def add(self, x: Traced, y: Traced) -> Traced:
        assert x.width == y.width
        return Traced(x.width)

    def layer_norm(self, x: Traced, name: str, *, eps: float, bias: bool = True) -> Traced:
        for part in ("weight", "bias") if bias else ("weight",):
            self._plan.shapes[f"{self._at}{name}.{part}"] = (x.width,)
        return Traced(x.width)

    def rms_norm(
        self, x: Traced, name: str, *, eps: float, width: int | None = None, offset: float = 0.0
    ) -> Traced:
        self._plan.shapes[f"{self._at}{name}.weight"] = (width or x.width,)
        return Traced(x.width)

    def linear(self, x: Traced, *layers: Linear) -> tuple[Traced, ...]:
        names = tuple(self._at + layer.name for layer in layers)
        for name, layer in zip(names, layers, strict=True):
            self._plan.shapes[f"{name}.weight"] = (layer.out, x.width)
            if layer.bias:
                self._plan.shapes[f"{name}.bias"] = (layer.out,)
        self._plan.linears.append(LinearGroup(names, x.activation, x.values))
        return tuple(
            Traced(layer.out, linear=name) for name, layer in zip(names, layers, strict=True)
        )

    def attention(self, q: Traced, k: Traced, v: Traced, spec: AttentionSpec) -> Traced:
        assert q.width == spec.size
        assert k.width == v.width == spec.kv_heads * spec.head_dim
        if isinstance(spec.bias, Buckets):
            table = spec.bias.table
            self._plan.shapes[f"{self._at}{table.name}.weight"] = (table.rows, table.width)
        self._plan.attention.append(spec)
        return Traced(spec.size, values=v.linear if spec.heads == spec.kv_heads else None)

    def mlp(
        self,
        x: Traced,
        up: Linear,
        down: Linear,
        activation: Activation,
        experts: Experts | None = None,
    ) -> Traced:
        if experts is not None:
            assert up.out % experts.num_experts == 0
            self._plan.shapes[f"{self._at}{experts.router}.weight"] = (experts.num_experts, x.width)
        (inner,) = self.linear(x, up)
        made_by = activation if experts is None else None  # its numbers are then weighted
        return self.linear(Traced(inner.width, activation=made_by), down)[0]

    def gated_mlp(
        self, x: Traced, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Traced:
        inner, _ = self.linear(x, gate, up)
        return self.linear(Traced(inner.width), down)[0]

    def keep(self, x: Traced) -> Traced:
        return x

    def block(self, function: Callable[..., Traced], at: str, *values: object) -> Traced:
        self._plan.blocks.append(self._at + at)
        return function(Recorder(self._plan, f"{self._at}{at}."), *values)
