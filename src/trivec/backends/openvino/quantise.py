"""From a checkpoint's float32 weights to the int8 tensors that the graph reads.

Weights: symmetric, one scale an output channel. A token's activations share one scale, so channels
that differ are first evened out: each is divided by a factor that moves half of its size into the
weights (SmoothQuant, Xiao et al. 2022, alpha 0.5). What follows GELU is never far below zero; it is
lifted to start there, which doubles its resolution. All of it is undone: the factor in the weights,
the lift in the bias, and there also what rounding the weights does to the mean input.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from trivec.backends.openvino.graph import LIFTS
from trivec.backends.openvino.recipe import Form, Recipe
from trivec.core.types import Float32Array
from trivec.models.ops import LinearGroup, ModelConfig
from trivec.models.registry import plan_of

INT8_MAX = 127
INT16_MAX = 127 * 256  # so that the high half is at most 127
TABLE_ROWS = 16384  # of a table at a time
SCALE_FLOOR = 1e-8

Take = Callable[[str], Float32Array]
Tensors = dict[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class ChannelRanges:
    """What the channels of one linear layer's input did over the calibration texts: each `[in]`."""

    largest: Float32Array  # of |x|
    mean: Float32Array


@dataclass(frozen=True, slots=True)
class Evened:
    """Channels of an input as the int8 kernel will see them: (x + lift) / factor."""

    factor: Float32Array  # [in]
    lift: float
    mean: Float32Array  # [in]; of x / factor


Ranges = Mapping[str, ChannelRanges]  # by the first name of a `LinearGroup`


def int8_tensors(take: Take, config: ModelConfig, recipe: Recipe, ranges: Ranges) -> Tensors:
    """Every tensor of the graph, each weight taken once, in *recipe*'s forms.

    Tables of token embeddings become 16-bit numbers in two halves; see `halves`.
    """
    plan = plan_of(config)
    tensors: Tensors = {}
    for layer, group in groupby(plan.linears, key=lambda group: group.layer):
        groups = list(group)
        names = [name for group in groups for name in group.names]
        weights = {name: take(f"{name}.weight") for name in names}
        biases = {name: take(f"{name}.bias") for name in names if f"{name}.bias" in plan.shapes}
        if recipe.form_of(layer) is not Form.FP32:
            tensors |= _int8_layer(groups, weights, biases, ranges, recipe.form_of(layer))
        else:
            tensors |= {f"{name}.weight": weight for name, weight in weights.items()}
            tensors |= {f"{name}.bias": bias for name, bias in biases.items()}
    for table in plan.token_tables:
        parts = halves(take(f"{table}.weight"))
        tensors |= {
            f"{table}.high": parts.high,
            f"{table}.low": parts.low,
            f"{table}.step": parts.step,
        }
    linear = {name for group in plan.linears for name in group.names}
    for name in plan.shapes:
        owner = name.rpartition(".")[0]
        if owner not in linear and owner not in plan.token_tables:
            tensors[name] = take(name)
    return tensors


def _int8_layer(
    groups: list[LinearGroup],
    weights: dict[str, Float32Array],
    biases: dict[str, Float32Array],
    ranges: Ranges,
    form: Form,
) -> Tensors:
    """The linear layers of one layer."""
    weights, biases, tensors = dict(weights), dict(biases), Tensors()
    evened = [
        even_out(
            ranges[group.names[0]],
            np.max([np.abs(weights[name]).max(axis=0) for name in group.names], axis=0),
            lift=LIFTS[group.activation] if group.activation and form is Form.INT8_ROWS else 0.0,
        )
        for group in groups
    ]
    for group, even in zip(groups, evened, strict=True):
        if group.values is not None:
            # Attention averages values over tokens; so its output is divided where they are made.
            weights[group.values] = weights[group.values] / even.factor[:, None]
            if group.values in biases:
                biases[group.values] = biases[group.values] / even.factor
    for group, even in zip(groups, evened, strict=True):
        if group.values is None:
            tensors[f"{group.names[0]}.channel_scale"] = 1 / even.factor
        for name in group.names:
            matrix = weights[name] * even.factor
            whole, scale = quantise(matrix)
            tensors[f"{name}.weight"], tensors[f"{name}.scale"] = whole, scale
            tensors[f"{name}.bias"] = _corrected(
                biases.get(name, np.float32(0)), matrix, whole * scale, even
            )
    return tensors


def even_out(ranges: ChannelRanges, columns: Float32Array, *, lift: float) -> Evened:
    """Factors for an input; *columns* `[in]` is max |weight| of its readers.

    A channel that is always zero, or that nobody reads, keeps factor 1.
    """
    usable = (ranges.largest > SCALE_FLOOR) & (columns > SCALE_FLOOR)
    ratio = np.where(usable, ranges.largest + lift, 1) / np.where(usable, columns, 1)
    factor = np.sqrt(ratio).astype(np.float32)
    return Evened(factor, lift, (ranges.mean / factor).astype(np.float32))


def _corrected(
    bias: Float32Array | np.float32, matrix: Float32Array, stored: Float32Array, evened: Evened
) -> Float32Array:
    """The bias that undoes the lift, and what rounding the weights does to the mean input."""
    lifted = stored @ (np.float32(evened.lift) / evened.factor)
    corrected = bias - lifted + (matrix - stored) @ evened.mean  # [out]
    return corrected.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Halves:
    """A table of 16-bit numbers: (256 * high + low) * step, its error at most 1/65,024 of a row."""

    high: NDArray[np.int8]  # [rows, columns]
    low: NDArray[np.int8]  # [rows, columns]
    step: Float32Array  # [rows, 1]


def halves(table: Float32Array) -> Halves:
    """*table* `[rows, columns]` at half its size.

    The plugin keeps int8 as it is, where it would widen a float16 table to float32 when it compiles
    (1.02 GB instead of 0.51 for BGE-M3).
    """
    high = np.empty(table.shape, np.int8)
    low = np.empty(table.shape, np.int8)
    step = np.empty((len(table), 1), np.float32)
    for begin in range(0, len(table), TABLE_ROWS):
        rows = slice(begin, begin + TABLE_ROWS)
        part = table[rows]
        largest = np.maximum(np.abs(part).max(axis=1, keepdims=True), SCALE_FLOOR)
        step[rows] = largest / INT16_MAX
        whole = np.rint(part / step[rows]).astype(np.int32)
        high[rows] = (whole + 128) >> 8
        low[rows] = whole - (((whole + 128) >> 8) << 8)
    return Halves(high, low, step)


def quantise(weight: Float32Array) -> tuple[NDArray[np.int8], Float32Array]:
    """Int8 `[out, in]` and float32 scales `[out, 1]`, weight ≈ int8 * scale."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(INT8_MAX)
    scale = np.maximum(scale, np.float32(SCALE_FLOOR) / INT8_MAX).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale
