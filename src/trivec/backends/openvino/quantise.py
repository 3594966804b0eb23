"""Quantisation: which arithmetic an encoder runs in, and the int8 tensors made for it.

Weights: symmetric, one scale an output channel. A token's activations share one scale, so channels
that differ are first smoothed: each is divided by a factor that moves half of its size into the
weights (SmoothQuant, Xiao et al. 2022, alpha 0.5). The output of GELU is never far below zero; it is
shifted to start at zero, which doubles its resolution. All of it is undone: the factor in the
weights, the shift in the bias, and there also what rounding the weights does to the mean input.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from itertools import groupby
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trivec.core.types import Float32Array
from trivec.models.ops import Activation, ModelConfig
from trivec.models.registry import plan_of

INT8_MAX = 127
INT16_MAX = 127 * 256  # so that the high half is at most 127
TABLE_ROWS = 16384  # of a table at a time
SCALE_FLOOR = 1e-8
SHIFTS = {Activation.GELU: 0.17}  # no GELU is below -0.16998

Tensors: TypeAlias = Mapping[str, NDArray[np.generic]]


class Form(Enum):
    """How a linear layer multiplies. All int8 weights are symmetric, one scale an output channel."""

    FP32 = "fp32"
    INT8_ROWS = "int8-rows"  # activations int8, one scale a token: the fastest kernel
    INT8_GROUPS = "int8-groups"  # activations int8, one scale a token and group of channels


@dataclass(frozen=True, slots=True)
class QuantConfig:
    """The arithmetic of one compiled encoder.

    Linear layers have a form, the products of attention a type. Everything else (embeddings, norms,
    softmax of the scores it is given, activations) is fp32 in every config.
    """

    form: Form
    group_size: int | None = None  # channels that share a scale, where the form has groups
    exact_layers: frozenset[int] = frozenset()  # layers in fp32 whatever the form
    bf16_attention: bool = False  # products of attention in bf16, but for exact layers

    def __post_init__(self) -> None:
        assert (self.group_size is not None) == (self.form is Form.INT8_GROUPS)

    @property
    def precision(self) -> str:
        """What a model card calls it: fp32 or int8."""
        return "fp32" if self.form is Form.FP32 else "int8"

    @property
    def name(self) -> str:
        """A short exact name, fit for a file: `int8-rows-bf16`, `int8-groups-32-exact-0-11`."""
        parts = [self.form.value]
        if self.group_size is not None:
            parts.append(str(self.group_size))
        if self.bf16_attention:
            parts.append("bf16")
        if self.exact_layers:
            parts += ["exact", *(str(layer) for layer in sorted(self.exact_layers))]
        return "-".join(parts)

    @classmethod
    def of_name(cls, name: str) -> "QuantConfig | None":
        """The int8 config of that exact name, also one with exact layers; None: there is none."""
        base, _, exact = name.partition("-exact-")
        layers = frozenset(int(layer) for layer in exact.split("-") if layer.isdecimal())
        found = (replace(one, exact_layers=layers) for one in INT8_CONFIGS if one.name == base)
        return next((config for config in found if config.name == name), None)

    def form_of(self, layer: int) -> Form:
        """The form that *layer* runs in."""
        return Form.FP32 if layer in self.exact_layers else self.form

    def has_bf16_attention(self, layer: int) -> bool:
        return self.bf16_attention and layer not in self.exact_layers


FP32 = QuantConfig(Form.FP32)
INT8_ROWS = QuantConfig(Form.INT8_ROWS)
INT8_ROWS_BF16 = QuantConfig(Form.INT8_ROWS, bf16_attention=True)
INT8_GROUPS_128 = QuantConfig(Form.INT8_GROUPS, group_size=128)
INT8_GROUPS_32 = QuantConfig(Form.INT8_GROUPS, group_size=32)
# From the fastest to the most careful.
INT8_CONFIGS = (INT8_ROWS_BF16, INT8_ROWS, INT8_GROUPS_128, INT8_GROUPS_32)


@dataclass(frozen=True, slots=True)
class ChannelRanges:
    """Ranges of the channels of one linear layer's input over the calibration texts: each `[in]`."""

    largest: Float32Array  # of |x|
    mean: Float32Array


def int8_tensors(
    take: Callable[[str], Float32Array],
    model: ModelConfig,
    config: QuantConfig,
    ranges: Mapping[str, ChannelRanges],
) -> dict[str, NDArray[np.generic]]:
    """Every tensor of the graph in *config*'s forms, from float32 weights that are each taken once.

    *ranges* are by the first name of each `LinearGroup`. Tables of token embeddings become 16-bit
    numbers in two halves, see `split_int16`.
    """
    plan = plan_of(model)
    tensors: dict[str, NDArray[np.generic]] = {}
    for layer, grouped in groupby(plan.linears, key=lambda group: group.layer):
        groups, form = list(grouped), config.form_of(layer)
        names = [name for group in groups for name in group.names]
        weights = {name: take(f"{name}.weight") for name in names}
        biases = {name: take(f"{name}.bias") for name in names if f"{name}.bias" in plan.shapes}
        if form is Form.FP32:
            tensors |= {f"{name}.weight": weight for name, weight in weights.items()}
            tensors |= {f"{name}.bias": bias for name, bias in biases.items()}
            continue
        shifts = [
            SHIFTS[group.activation] if group.activation and form is Form.INT8_ROWS else 0.0
            for group in groups
        ]
        factors = [
            smooth_factors(
                ranges[group.names[0]].largest,
                np.max([np.abs(weights[name]).max(axis=0) for name in group.names], axis=0),
                shift=shift,
            )
            for group, shift in zip(groups, shifts, strict=True)
        ]
        for group, factor in zip(groups, factors, strict=True):
            if group.values is None:
                tensors[f"{group.names[0]}.channel_scale"] = 1 / factor
            else:
                # Attention averages values over tokens; so its output is divided where they are made.
                weights[group.values] = weights[group.values] / factor[:, None]
                if group.values in biases:
                    biases[group.values] = biases[group.values] / factor
        for group, factor, shift in zip(groups, factors, shifts, strict=True):
            mean = (ranges[group.names[0]].mean / factor).astype(np.float32)
            for name in group.names:
                matrix = weights[name] * factor
                whole, scale = quantise(matrix)
                stored = whole * scale
                shifted = stored @ (np.float32(shift) / factor)
                bias = biases.get(name, np.float32(0)) - shifted + (matrix - stored) @ mean  # [out]
                tensors[f"{name}.weight"], tensors[f"{name}.scale"] = whole, scale
                tensors[f"{name}.bias"] = bias.astype(np.float32)
    for table in plan.token_tables:
        tensors |= {f"{table}.{k}": v for k, v in split_int16(take(f"{table}.weight")).items()}
    linear = {name for group in plan.linears for name in group.names}
    for name in plan.shapes:
        owner = name.rpartition(".")[0]
        if owner not in linear and owner not in plan.token_tables:
            tensors[name] = take(name)
    return tensors


def smooth_factors(largest: Float32Array, columns: Float32Array, *, shift: float) -> Float32Array:
    """What to divide the channels of an input by: float32 `[in]`.

    *largest* is max |x| of each channel, *columns* max |weight| of its readers. A channel that is
    always zero, or that nothing reads, keeps factor 1.
    """
    usable = (largest > SCALE_FLOOR) & (columns > SCALE_FLOOR)
    ratio = np.where(usable, largest + shift, 1) / np.where(usable, columns, 1)
    return np.sqrt(ratio).astype(np.float32)


def split_int16(table: Float32Array) -> dict[str, NDArray[np.generic]]:
    """*table* `[rows, columns]` at half its size: (256 * high + low) * step.

    `high` and `low` are int8 `[rows, columns]`, `step` is float32 `[rows, 1]`; the error is at most
    1/65,024 of a row's largest number. The plugin keeps int8 as it is, where it would widen a float16
    table to float32 when it compiles (1.02 GB instead of 0.51 for BGE-M3).
    """
    high, low = np.empty(table.shape, np.int8), np.empty(table.shape, np.int8)
    step = np.empty((len(table), 1), np.float32)
    for begin in range(0, len(table), TABLE_ROWS):
        rows = slice(begin, begin + TABLE_ROWS)
        part = table[rows]
        step[rows] = np.maximum(np.abs(part).max(axis=1, keepdims=True), SCALE_FLOOR) / INT16_MAX
        whole = np.rint(part / step[rows]).astype(np.int32)
        high[rows] = (whole + 128) >> 8
        low[rows] = whole - (((whole + 128) >> 8) << 8)
    return {"high": high, "low": low, "step": step}


def quantise(weight: Float32Array) -> tuple[NDArray[np.int8], Float32Array]:
    """Int8 `[out, in]` and float32 scales `[out, 1]`, weight ≈ int8 * scale."""
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(INT8_MAX)
    scale = np.maximum(scale, np.float32(SCALE_FLOOR) / INT8_MAX).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale
