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

from trivec.backends.openvino.graph import AFTER_GELU, GELU_LIFT, Encoder, Extra, linear_name
from trivec.backends.openvino.packing import pack_row
from trivec.backends.openvino.pages import mappings_of
from trivec.backends.openvino.recipe import Form, Recipe
from trivec.backends.openvino.rows import plan_rows
from trivec.backends.openvino.session import Session
from trivec.checkpoints.checkpoint import EncoderConfig
from trivec.core.errors import StartError
from trivec.core.types import Batch, Float32Array, Int32Array, Output

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

    config: EncoderConfig
    tensors: Tensors
    recipe: Recipe
    extra: Extra = Extra.NOTHING


def compiled(plan: Plan, slot_count: int) -> Session:
    """A session as the plugin makes it."""
    model = Encoder(plan.config, plan.tensors, plan.recipe).build(plan.extra)
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
    expected = Witness(plan).hidden(ids)
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


class Witness:
    """One encoder over one text, in float32 and without a plugin."""

    def __init__(self, plan: Plan) -> None:
        self._config = plan.config
        self._tensors = plan.tensors
        self._recipe = plan.recipe

    def hidden(self, ids: Int32Array) -> Float32Array:
        """Last hidden states of one text: float32 `[tokens, hidden]`."""
        places = np.arange(len(ids)) + self._config.position_offset
        x = self._words(ids) + self._float32("embeddings.token_type_embeddings.weight")[0]
        x = x + self._float32("embeddings.position_embeddings.weight")[places]
        x = self._layer_norm(x, "embeddings.LayerNorm")
        for layer in range(self._config.layer_count):
            attended = self._linear(self._attended(x, layer), layer, "attention.output.dense")
            x = self._layer_norm(x + attended, linear_name(layer, "attention.output.LayerNorm"))
            inner = self._linear(x, layer, "intermediate.dense")
            inner = inner * (0.5 * (1 + _erf(inner / math.sqrt(2)).astype(np.float32)))
            outer = self._linear(inner, layer, AFTER_GELU)
            x = self._layer_norm(x + outer, linear_name(layer, "output.LayerNorm"))
        return x

    def _float32(self, name: str) -> Float32Array:
        return self._tensors[name].astype(np.float32, copy=False)

    def _words(self, ids: Int32Array) -> Float32Array:
        table = "embeddings.word_embeddings"
        if f"{table}.weight" in self._tensors:
            return self._tensors[f"{table}.weight"][ids].astype(np.float32)
        high, low, step = (
            self._tensors[f"{table}.{part}"][ids].astype(np.float32)
            for part in ("high", "low", "step")
        )
        words: Float32Array = (high * 256 + low) * step
        return words

    def _attended(self, x: Float32Array, layer: int) -> Float32Array:
        """softmax(Q Kᵀ / sqrt(d)) V: float32 `[tokens, hidden]`."""
        heads, tokens = self._config.head_count, len(x)
        q, k, v = (
            self._linear(x, layer, f"attention.self.{part}")
            .reshape(tokens, heads, -1)
            .transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(q.shape[2]))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        together: Float32Array = (weights @ v).transpose(1, 0, 2).reshape(tokens, -1)
        return together

    def _linear(self, x: Float32Array, layer: int, part: str) -> Float32Array:
        """X Wᵀ + b, with the lift and the channel scales that the int8 forms read X through."""
        name = linear_name(layer, part)
        form = self._recipe.form_of(layer)
        if form is Form.INT8_ROWS and part == AFTER_GELU:
            x = x + np.float32(GELU_LIFT)
        source = "attention.self.query" if part.startswith("attention.self.") else part
        scale = self._tensors.get(f"{linear_name(layer, source)}.channel_scale")
        if form is not Form.FP32 and scale is not None:
            x = x * scale.astype(np.float32)
        product = x @ self._float32(f"{name}.weight").T
        if form is not Form.FP32:
            product = product * self._float32(f"{name}.scale")[:, 0]
        total: Float32Array = product + self._float32(f"{name}.bias")
        return total

    def _layer_norm(self, x: Float32Array, name: str) -> Float32Array:
        spread = np.sqrt(x.var(axis=1, keepdims=True) + np.float32(self._config.layer_norm_eps))
        unit = (x - x.mean(axis=1, keepdims=True)) / spread
        normed: Float32Array = unit * self._float32(f"{name}.weight") + self._float32(
            f"{name}.bias"
        )
        return normed


def _probe(config: EncoderConfig) -> Int32Array:
    """Token ids that no text needs to have: int32 `[tokens]`."""
    room = config.position_count - config.position_offset
    chooser = np.random.default_rng(0)
    ids = chooser.integers(0, config.vocabulary_size, min(PROBE_TOKENS, room))
    return ids.astype(np.int32)


def _hidden(session: Session, config: EncoderConfig, ids: Int32Array, *, slot: int) -> Float32Array:
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
