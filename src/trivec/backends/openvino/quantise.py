"""From a checkpoint's float32 weights to the int8 tensors that the graph reads.

Weights: symmetric, one scale an output channel. A token's activations share one scale, so channels
that differ are first evened out: each is divided by a factor that moves half of its size into the
weights (SmoothQuant, Xiao et al. 2022, alpha 0.5). What follows GELU is never far below zero; it is
lifted to start there, which doubles its resolution. All of it is undone: the factor in the weights,
the lift in the bias, and there also what rounding the weights does to the mean input.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivec.backends.openvino.graph import AFTER_GELU, GELU_LIFT, linear_name
from trivec.backends.openvino.recipe import Form, Recipe
from trivec.checkpoints.checkpoint import EncoderConfig
from trivec.core.types import Float32Array

INT8_MAX = 127
INT16_MAX = 127 * 256  # so that the high half is at most 127
TABLE_ROWS = 16384  # of a table at a time
SCALE_FLOOR = 1e-8

VALUE, PROJECTION = "attention.self.value", "attention.output.dense"

READERS: Mapping[str, tuple[str, ...]] = {
    "attention.self.query": ("attention.self.query", "attention.self.key", VALUE),
    PROJECTION: (PROJECTION,),
    "intermediate.dense": ("intermediate.dense",),
    AFTER_GELU: (AFTER_GELU,),
}
"""Each input whose ranges were taken, and the layers that read it."""

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


Ranges = Mapping[str, ChannelRanges]  # by the linear layer's name


def int8_tensors(take: Take, config: EncoderConfig, recipe: Recipe, ranges: Ranges) -> Tensors:
    """Every tensor of the graph, each weight taken once, in *recipe*'s forms.

    The word embeddings become 16-bit numbers in two halves; see `halves`.
    """
    tensors: Tensors = {}
    words = "embeddings.word_embeddings"
    parts = halves(take(f"{words}.weight"))
    tensors |= {f"{words}.high": parts.high, f"{words}.low": parts.low, f"{words}.step": parts.step}
    for name in ("position_embeddings.weight", "token_type_embeddings.weight"):
        tensors[f"embeddings.{name}"] = take(f"embeddings.{name}")
    for part in ("weight", "bias"):
        tensors[f"embeddings.LayerNorm.{part}"] = take(f"embeddings.LayerNorm.{part}")
    for layer in range(config.layer_count):
        weights = {part: take(f"{linear_name(layer, part)}.weight") for part in _parts()}
        biases = {part: take(f"{linear_name(layer, part)}.bias") for part in _parts()}
        if recipe.form_of(layer) is not Form.FP32:
            own = {part: ranges[linear_name(layer, part)] for part in READERS}
            linears = _int8_layer(weights, biases, own, recipe.form_of(layer))
        else:
            linears = {f"{part}.weight": weights[part] for part in _parts()}
            linears |= {f"{part}.bias": biases[part] for part in _parts()}
        tensors |= {linear_name(layer, name): tensor for name, tensor in linears.items()}
        for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
            for kind in ("weight", "bias"):
                name = f"{linear_name(layer, norm)}.{kind}"
                tensors[name] = take(name)
    return tensors


def _parts() -> list[str]:
    return [part for readers in READERS.values() for part in readers]


def _int8_layer(
    weights: dict[str, Float32Array],
    biases: dict[str, Float32Array],
    ranges: Mapping[str, ChannelRanges],
    form: Form,
) -> Tensors:
    """The linear layers of one layer, by their names within it."""
    weights, biases, tensors = dict(weights), dict(biases), Tensors()
    evened = {
        tapped: even_out(
            ranges[tapped],
            np.max([np.abs(weights[part]).max(axis=0) for part in READERS[tapped]], axis=0),
            lift=GELU_LIFT if tapped == AFTER_GELU and form is Form.INT8_ROWS else 0.0,
        )
        for tapped in READERS
    }
    # Attention averages values over tokens; so its output is divided where the values are made.
    weights[VALUE] = weights[VALUE] / evened[PROJECTION].factor[:, None]
    biases[VALUE] = biases[VALUE] / evened[PROJECTION].factor
    for tapped, readers in READERS.items():
        if tapped != PROJECTION:
            tensors[f"{tapped}.channel_scale"] = 1 / evened[tapped].factor
        for part in readers:
            matrix = weights[part] * evened[tapped].factor
            whole, scale = quantise(matrix)
            tensors[f"{part}.weight"], tensors[f"{part}.scale"] = whole, scale
            tensors[f"{part}.bias"] = _corrected(
                biases[part], matrix, whole * scale, evened[tapped]
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
    bias: Float32Array, matrix: Float32Array, stored: Float32Array, evened: Evened
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
