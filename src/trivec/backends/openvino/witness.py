"""A second opinion on every load: a short text in plain numpy against what each slot makes of it.

A plugin that gives a layer another layer's weights answers as quickly as ever, and wrongly (decision
0032). So nothing that was compiled is used before its slots agree with each other to the bit, and
with arithmetic that knows no plugin. It knows one graph's formulas; not files or who asks.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivec.backends.openvino.graph import LIFTS, Extra, build_graph
from trivec.backends.openvino.packing import pack_row
from trivec.backends.openvino.pages import mappings_of
from trivec.backends.openvino.recipe import Form, Recipe
from trivec.backends.openvino.rows import plan_rows
from trivec.backends.openvino.session import Session
from trivec.core.errors import StartError
from trivec.core.types import Batch, Float32Array, Int32Array, Output
from trivec.models import registry
from trivec.models.ops import Activation, AttentionSpec, Index, Linear, ModelConfig, Table, layer_of

PROBE_TOKENS = 8
COMPILES_MAX = 3

# What honest rounding leaves of a row's cosine: fp32 sums in another order; int8 rounds the
# activations, which the witness does not. The faults seen were between 0.70 and 0.87.
COSINE_MIN = {Form.FP32: 0.9999, Form.INT8_ROWS: 0.95, Form.INT8_GROUPS: 0.95}


class NothingComputed(StartError):
    """A compiled model gives no hidden states of the text's shape: its recipe cannot run here."""


Tensors = Mapping[str, NDArray[np.generic]]
_erf = np.frompyfunc(math.erf, 1, 1)


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a session is compiled from."""

    config: ModelConfig
    tensors: Tensors
    recipe: Recipe
    extra: Extra = Extra.NOTHING


def compiled(plan: Plan, slot_count: int) -> Session:
    """A session as the plugin makes it."""
    model = build_graph(plan.config, plan.tensors, plan.recipe, plan.extra)
    mapped = mappings_of(plan.tensors.values())
    return Session(model, plan.recipe, slot_count=slot_count, mapped=mapped)


def open_session(
    plan: Plan,
    *,
    slot_count: int,
    must_agree: bool,
    compiler: Callable[[Plan, int], Session] = compiled,
) -> Session:
    """Let *compiler* make a session until its slots stand up to the witness, `COMPILES_MAX` times.

    Slots must equal each other always, the witness only where *must_agree*: int8 that no certificate
    vouches for may well be far from it. What has not even the right shape, as the plugin's grouped
    int8 where oneDNN is kept from the CPU's instructions, agrees with nothing. Raises `StartError`
    when it comes to no good, and of it `NothingComputed` where the shape was wrong to the last.
    """
    ids = _probe(plan.config)
    expected = plain_hidden(plan, ids)
    for _ in range(COMPILES_MAX):
        session = compiler(plan, slot_count)
        found = [_hidden(session, plan.config, ids, slot=slot) for slot in range(slot_count)]
        slots_agree = all(np.array_equal(found[0], other) for other in found[1:])
        has_shape = all(one.shape == expected.shape for one in found)
        agrees = has_shape and cosine_min(found[0], expected) >= COSINE_MIN[plan.recipe.form]
        if slots_agree and agrees:
            return session
    if slots_agree and has_shape and not must_agree:
        return session
    kind = StartError if has_shape else NothingComputed
    raise kind(
        f"The engine computes wrong vectors in {plan.recipe.name}, {COMPILES_MAX} times in a row. "
        "Try --precision fp32, and report it with the CPU's name and the version of openvino."
    )


def cosine_min(found: Float32Array, expected: Float32Array) -> float:
    """The least cosine of two matrices' rows `[tokens, hidden]`, each taken from its own mean.

    Without its mean a row is not judged by the few large channels that every token shares.
    """
    a, b = found - expected.mean(axis=0), expected - expected.mean(axis=0)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).min())


def plain_hidden(plan: Plan, ids: Int32Array) -> Float32Array:
    """Last hidden states of one text, without a plugin: float32 `[tokens, hidden]`."""
    return registry.forward(NumpyOps(plan, ids), plan.config)


class NumpyOps:
    """`models.ops.Ops` over one text in numpy, reading a graph's own tensors, int8 ones too."""

    def __init__(self, plan: Plan, ids: Int32Array, at: str = "") -> None:
        self._plan = plan
        self._ids = ids
        self._at = at

    def embed(self, table: Table, index: Index) -> Float32Array:
        name, tensors = self._at + table.name, self._plan.tensors
        positions = np.arange(len(self._ids), dtype=np.int32) + self._plan.config.position_offset
        lines = {Index.ID: self._ids, Index.TYPE: 0 * self._ids, Index.POSITION: positions}
        rows: Int32Array = lines[index]
        if f"{name}.weight" in tensors:
            return self._float32(f"{table.name}.weight")[rows]
        high, low, step = (
            tensors[f"{name}.{part}"][rows].astype(np.float32) for part in ("high", "low", "step")
        )
        looked_up: Float32Array = (high * 256 + low) * step
        return looked_up

    def add(self, x: Float32Array, y: Float32Array) -> Float32Array:
        return x + y

    def layer_norm(
        self, x: Float32Array, name: str, *, eps: float, bias: bool = True
    ) -> Float32Array:
        spread = np.sqrt(x.var(axis=1, keepdims=True) + np.float32(eps))
        unit = (x - x.mean(axis=1, keepdims=True)) / spread
        normed: Float32Array = unit * self._float32(f"{name}.weight")
        return normed + self._float32(f"{name}.bias") if bias else normed

    def rms_norm(
        self, x: Float32Array, name: str, *, eps: float, width: int | None = None
    ) -> Float32Array:
        rows = x.reshape(len(x), -1, width or x.shape[1])
        size = np.sqrt((rows * rows).mean(axis=-1, keepdims=True) + np.float32(eps))
        normed: Float32Array = (rows / size * self._float32(f"{name}.weight")).reshape(x.shape)
        return normed

    def linear(self, x: Float32Array, *layers: Linear) -> tuple[Float32Array, ...]:
        return self._linear(x, *layers, lift=0.0)

    def attention(
        self, q: Float32Array, k: Float32Array, v: Float32Array, spec: AttentionSpec
    ) -> Float32Array:
        q, k, v = (one.reshape(len(one), -1, spec.head_dim).transpose(1, 0, 2) for one in (q, k, v))
        if spec.rope is not None:
            cosine, sine = (table[: q.shape[1]] for table in spec.rope.tables(spec.head_dim))
            q, k = (_rotated(one, cosine, sine) for one in (q, k))
        k, v = (np.repeat(one, spec.heads // spec.kv_heads, axis=0) for one in (k, v))
        scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(spec.head_dim))
        scores[:, spec.hidden_from(q.shape[1])] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        together: Float32Array = (weights @ v).transpose(1, 0, 2).reshape(-1, spec.size)
        return together

    def mlp(
        self, x: Float32Array, up: Linear, down: Linear, activation: Activation
    ) -> Float32Array:
        (inner,) = self._linear(x, up, lift=0.0)
        return self._linear(_activated(inner, activation), down, lift=LIFTS[activation])[0]

    def gated_mlp(
        self, x: Float32Array, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Float32Array:
        gates, inner = self.linear(x, gate, up)
        return self.linear(_activated(gates, activation) * inner, down)[0]

    def keep(self, x: Float32Array) -> Float32Array:
        return x

    def block(
        self, function: Callable[..., Float32Array], at: str, *values: object
    ) -> Float32Array:
        return function(NumpyOps(self._plan, self._ids, f"{self._at}{at}."), *values)

    def _linear(self, x: Float32Array, *layers: Linear, lift: float) -> tuple[Float32Array, ...]:
        """X Wᵀ + b, with the lift and the channel scales that the int8 forms read X through."""
        first = self._at + layers[0].name
        form = self._plan.recipe.form_of(layer_of(first))
        if form is Form.INT8_ROWS:
            x = x + np.float32(lift)
        scale = self._plan.tensors.get(f"{first}.channel_scale")
        if form is not Form.FP32 and scale is not None:
            x = x * scale.astype(np.float32)
        return tuple(self._product(x, layer.name, form) for layer in layers)

    def _product(self, x: Float32Array, name: str, form: Form) -> Float32Array:
        product = x @ self._float32(f"{name}.weight").T
        if form is not Form.FP32:
            product = product * self._float32(f"{name}.scale")[:, 0]
        if f"{self._at}{name}.bias" in self._plan.tensors:
            product = product + self._float32(f"{name}.bias")
        return product

    def _float32(self, name: str) -> Float32Array:
        return self._plan.tensors[self._at + name].astype(np.float32, copy=False)


def _rotated(x: Float32Array, cosine: Float32Array, sine: Float32Array) -> Float32Array:
    """*x* `[heads, tokens, head_dim]` turned by its tokens' positions."""
    left, right = np.split(x, 2, axis=-1)
    turned: Float32Array = np.concatenate(
        [left * cosine - right * sine, right * cosine + left * sine], axis=-1
    )
    return turned


def _activated(x: Float32Array, activation: Activation) -> Float32Array:
    if activation is Activation.SILU:
        silu: Float32Array = x / (1 + np.exp(-x))
        return silu
    gelu: Float32Array = x * (0.5 * (1 + _erf(x / math.sqrt(2)).astype(np.float32)))
    return gelu


def _probe(config: ModelConfig) -> Int32Array:
    """Token ids that no text needs to have: int32 `[tokens]`."""
    room = config.token_count_max
    chooser = np.random.default_rng(0)
    ids = chooser.integers(0, config.vocab_size, min(PROBE_TOKENS, room))
    return ids.astype(np.int32)


def _hidden(session: Session, config: ModelConfig, ids: Int32Array, *, slot: int) -> Float32Array:
    """What *slot* makes of the same text."""
    starts = np.array([0, len(ids)], np.int32)
    packed = pack_row(
        Batch(ids, starts, np.array([Output.DENSE], np.uint8)),
        plan_rows(np.diff(starts))[0],
        whole=np.ones(1, np.bool_),
        position_offset=config.position_offset,
        buffers=session.buffers(slot),
    )
    return session.hidden(packed.inputs, slot=slot)[: len(ids)].copy()
