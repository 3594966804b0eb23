"""From a checkpoint's float32 weights to the int8 tensors that the graph reads.

Weights: symmetric, one scale an output channel. Activations keep their range between tokens but not
between channels, so large channels are first evened out, half of it moved into the weights
(SmoothQuant, Xiao et al. 2022, alpha 0.5); for attention's output it all hides in the value layer.
"""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from trivec.backends.openvino.graph import linear_name
from trivec.backends.openvino.recipe import Form, Recipe
from trivec.checkpoints.checkpoint import EncoderConfig
from trivec.core.types import Float32Array

INT8_MAX = 127
FLOAT16_MAX = 65504.0
SCALE_FLOOR = 1e-8

READERS: Mapping[str, tuple[str, ...]] = {
    "attention.self.query": (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    ),
    "attention.output.dense": ("attention.output.dense",),
    "intermediate.dense": ("intermediate.dense",),
    "output.dense": ("output.dense",),
}
"""Each input that is tapped, and the layers that read it."""

Take = Callable[[str], Float32Array]
ChannelMaxima = Mapping[str, Float32Array]  # linear name to max |input| [in]


def int8_tensors(
    take: Take, config: EncoderConfig, recipe: Recipe, maxima: ChannelMaxima
) -> dict[str, NDArray[np.generic]]:
    """Every tensor of the graph, each weight taken once, in *recipe*'s forms.

    The word embeddings become float16 where their values allow it; they are computed on in float32.
    """
    tensors: dict[str, NDArray[np.generic]] = {}
    words = take("embeddings.word_embeddings.weight")
    fits = float(np.abs(words).max()) < FLOAT16_MAX
    tensors["embeddings.word_embeddings.weight"] = words.astype(np.float16) if fits else words
    del words
    for name in ("position_embeddings.weight", "token_type_embeddings.weight"):
        tensors[f"embeddings.{name}"] = take(f"embeddings.{name}")
    for part in ("weight", "bias"):
        tensors[f"embeddings.LayerNorm.{part}"] = take(f"embeddings.LayerNorm.{part}")
    for layer in range(config.layer_count):
        tensors |= _layer(take, layer, recipe.form_of(layer), maxima)
    return tensors


def _layer(
    take: Take, layer: int, form: Form, maxima: ChannelMaxima
) -> dict[str, NDArray[np.generic]]:
    """The tensors of one layer."""
    parts = [part for readers in READERS.values() for part in readers]
    weights = {part: take(f"{linear_name(layer, part)}.weight") for part in parts}
    biases = {part: take(f"{linear_name(layer, part)}.bias") for part in parts}
    scales: dict[str, Float32Array] = {}
    if form is not Form.FP32:
        weights, biases, scales = _smoothed(weights, biases, layer, maxima)
    tensors: dict[str, NDArray[np.generic]] = {}
    for part in parts:
        name = linear_name(layer, part)
        tensors[f"{name}.bias"] = biases[part]
        if form is Form.FP32:
            tensors[f"{name}.weight"] = weights[part]
        else:
            tensors[f"{name}.weight"], tensors[f"{name}.scale"] = quantise(weights[part])
    for part, scale in scales.items():
        tensors[f"{linear_name(layer, part)}.channel_scale"] = scale
    for norm in ("attention.output.LayerNorm", "output.LayerNorm"):
        for kind in ("weight", "bias"):
            name = f"{linear_name(layer, norm)}.{kind}"
            tensors[name] = take(name)
    return tensors


def _smoothed(
    weights: dict[str, Float32Array],
    biases: dict[str, Float32Array],
    layer: int,
    maxima: ChannelMaxima,
) -> tuple[dict[str, Float32Array], dict[str, Float32Array], dict[str, Float32Array]]:
    """Weights, biases and the channel scales (float32 `[in]`) that undo what was moved."""
    weights, biases = dict(weights), dict(biases)
    scales: dict[str, Float32Array] = {}
    for tapped, readers in READERS.items():
        columns = np.max([np.abs(weights[part]).max(axis=0) for part in readers], axis=0)
        factor = smoothing_factor(maxima[linear_name(layer, tapped)], columns)  # [in]
        for part in readers:
            weights[part] = weights[part] * factor
        if tapped == "attention.output.dense":
            weights["attention.self.value"] = weights["attention.self.value"] / factor[:, None]
            biases["attention.self.value"] = biases["attention.self.value"] / factor
        else:
            scales[tapped] = (1 / factor).astype(np.float32)
    return weights, biases, scales


def smoothing_factor(inputs: Float32Array, columns: Float32Array) -> Float32Array:
    """sqrt(max |input| / max |weight|) a channel: float32 `[in]`, 1 where either is zero."""
    usable = (inputs > SCALE_FLOOR) & (columns > SCALE_FLOOR)
    ratio = np.where(usable, inputs, 1) / np.where(usable, columns, 1)
    return np.sqrt(ratio).astype(np.float32)


def quantise(weight: Float32Array) -> tuple[NDArray[np.int8], Float32Array]:
    """Int8 `[out, in]` and float32 scales `[out, 1]`, weight ≈ int8 * scale."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(INT8_MAX)
    scale = np.maximum(scale, np.float32(SCALE_FLOOR) / INT8_MAX).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale
