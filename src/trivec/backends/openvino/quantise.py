"""Quantisation: the schemes an encoder can run in, and the int8 tensors made for them.

Weights: symmetric, one scale an output channel. A token's activations share one scale, so channels
that differ are first smoothed: each is divided by a factor that moves half of its size into the
weights (SmoothQuant, Xiao et al. 2022, alpha 0.5). The output of GELU is never far below zero; it is
shifted to start at zero, which doubles its resolution. All of it is undone: the factor in the
weights, the shift in the bias, and there also what rounding the weights does to the mean input.

Without VNNI or its like a CPU adds up pairs of products in int16. Weights of at most 64 keep the pairs
within it (2 * 255 * 64 = 32,640), and are rounded with feedback: each channel makes up for the errors
of those before it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Float32Array
from trivec.models.ops import Activation, LinearGroup
from trivec.models.registry import plan_of

WEIGHT_MAX = {8: 127, 7: 64}  # by bits
FEEDBACK_CHANNELS = 256  # that make up for one another; all of them gain 0.0001 of mean cosine
FEEDBACK_BLOCK = 32  # channels whose errors reach the others of the 256 in one product
FEEDBACK_DAMPING = 0.01  # of the mean square of the channels
INT16_MAX = 127 * 256  # so that the high half is at most 127
TABLE_ROWS = 16384  # of a table at a time
SCALE_FLOOR = 1e-8
SHIFTS: Mapping[Activation | None, float] = {Activation.GELU: 0.17}  # no GELU is below -0.16998

Float16Array: TypeAlias = NDArray[np.float16]
Tensors: TypeAlias = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """The types that a compiled encoder multiplies in.

    Everything but linear layers and the products of attention is fp32 in every scheme.
    """

    is_int8: bool = True  # linear layers: weights and activations
    group_size: int | None = None  # channels of a token that share a scale; None: all, the fastest
    convolution: bool = False  # products are 1x1 convolutions; else matrix products
    weight_bits: int = 8  # or 7, see `WEIGHT_MAX`
    exact_layers: frozenset[int] = frozenset()  # these are fp32 throughout
    bf16_attention: bool = False

    @property
    def precision(self) -> str:
        """`fp32` or `int8`, as on the model's card."""
        return "int8" if self.is_int8 else "fp32"

    @property
    def name(self) -> str:
        """A short exact name, fit for a file: `int8-conv-w7`, `int8-groups-32-exact-0-11`."""
        if not self.is_int8:
            return "fp32"
        name = "int8-conv" if self.convolution else "int8-rows"
        name = name if self.group_size is None else f"int8-groups-{self.group_size}"
        name += "" if self.weight_bits == 8 else f"-w{self.weight_bits}"
        name += "-bf16" if self.bf16_attention else ""
        layers = "".join(f"-{layer}" for layer in sorted(self.exact_layers))
        return f"{name}-exact{layers}" if layers else name

    @classmethod
    def of_name(cls, name: str) -> "QuantScheme | None":
        """The int8 scheme of that exact name, also one with exact layers; None: there is none."""
        base, _, exact = name.partition("-exact-")
        layers = frozenset(int(layer) for layer in exact.split("-") if layer.isdecimal())
        found = (replace(one, exact_layers=layers) for one in INT8_SCHEMES if one.name == base)
        return next((scheme for scheme in found if scheme.name == name), None)


FP32 = QuantScheme(is_int8=False)
INT8_ROWS = QuantScheme()
INT8_ROWS_BF16 = QuantScheme(bf16_attention=True)
INT8_CONV = QuantScheme(convolution=True)
INT8_ROWS_W7 = QuantScheme(weight_bits=7)
INT8_CONV_W7 = QuantScheme(convolution=True, weight_bits=7)
INT8_GROUPS_128 = QuantScheme(group_size=128)
INT8_GROUPS_32 = QuantScheme(group_size=32)
INT8_SCHEMES = (
    INT8_ROWS_BF16,
    INT8_ROWS,
    INT8_CONV,
    INT8_ROWS_W7,
    INT8_CONV_W7,
    INT8_GROUPS_128,
    INT8_GROUPS_32,
)


@dataclass(frozen=True, slots=True)
class ActivationStatistics:
    """How large the channels of a linear layer's input grow on the calibration texts: each `[in]`."""

    largest: Float32Array  # of |x|
    mean: Float32Array
    sample: Float16Array | None = None  # x itself for some tokens, [tokens, in]; for 7 bits


def make_tensors(
    checkpoint: Checkpoint,
    scheme: QuantScheme,
    statistics: Mapping[str, ActivationStatistics] = MappingProxyType({}),
) -> dict[str, NDArray[np.generic]]:
    """Every tensor of the graph in *scheme*; fp32 ones are mostly views of the checkpoint's files.

    Int8 needs *statistics*, by the first name of each `LinearGroup`, and 7 bits their samples; its
    tables of token embeddings are 16-bit numbers in two halves, see `split_int16`.
    """
    plan = plan_of(checkpoint.config)
    tensors: dict[str, NDArray[np.generic]] = {}
    converted: set[str] = set()  # modules whose tensors are not those of the checkpoint
    with checkpoint.weights() as weights:
        if scheme.is_int8:
            for table in plan.token_tables:
                converted.add(table)
                parts = split_int16(weights.take(f"{table}.weight"), weights.release_pages)
                tensors |= {f"{table}.{part}": values for part, values in parts.items()}
                weights.release_pages()
            for layer, grouped in groupby(plan.linears, key=lambda group: group.layer):
                if layer in scheme.exact_layers:
                    continue
                groups = list(grouped)
                names = [name for group in groups for name in group.names]
                converted.update(names)
                stored = [f"{name}.{part}" for name in names for part in ("weight", "bias")]
                own = {name: weights.take(name) for name in stored if name in plan.shapes}
                shifts = SHIFTS if scheme.group_size is None else {}
                tensors |= int8_layer(groups, own, statistics, shifts, scheme.weight_bits)
                weights.release_pages()
        for name in plan.shapes:
            if name.rpartition(".")[0] not in converted:
                tensors[name] = weights.take(name)
                weights.release_pages()  # which were read to check their values
        weights.finish()
    return tensors


def int8_layer(
    groups: Sequence[LinearGroup],
    own: dict[str, Float32Array],
    statistics: Mapping[str, ActivationStatistics],
    shifts: Mapping[Activation | None, float],
    weight_bits: int = 8,
) -> dict[str, NDArray[np.generic]]:
    """The tensors of one layer's linear modules, from those *own* to it in fp32, which change."""
    tensors: dict[str, NDArray[np.generic]] = {}
    factors: dict[LinearGroup, Float32Array] = {}
    for group in groups:
        columns = np.max(
            [np.abs(own[f"{name}.weight"]).max(axis=0) for name in group.names], axis=0
        )
        largest, shift = statistics[group.names[0]].largest, shifts.get(group.activation, 0.0)
        # A channel that is always zero, or that nothing reads, keeps factor 1.
        usable = (largest > SCALE_FLOOR) & (columns > SCALE_FLOOR)
        ratio = np.where(usable, largest + shift, 1) / np.where(usable, columns, 1)
        factor = factors[group] = np.sqrt(ratio).astype(np.float32)  # [in]
        if group.values is None:
            tensors[f"{group.names[0]}.channel_scale"] = 1 / factor
            continue
        # Attention averages values over tokens; so its output is divided where they are made.
        own[f"{group.values}.weight"] = own[f"{group.values}.weight"] / factor[:, None]
        if f"{group.values}.bias" in own:
            own[f"{group.values}.bias"] = own[f"{group.values}.bias"] / factor
    for group, factor in factors.items():
        offset = np.float32(shifts.get(group.activation, 0.0)) / factor  # [in]
        mean = (statistics[group.names[0]].mean / factor).astype(np.float32)  # [in]
        matrices = [own[f"{name}.weight"] * factor for name in group.names]
        quantised = [quantise(matrix, weight_bits) for matrix in matrices]
        sample = statistics[group.names[0]].sample
        if weight_bits < 8 and sample is not None:
            pairs = zip(matrices, quantised, strict=True)
            steps = np.concatenate([matrix / scale for matrix, (_, scale) in pairs])
            ends = np.cumsum([len(matrix) for matrix in matrices])[:-1]
            parts = np.split(rounded_with_feedback(steps, sample / factor, weight_bits), ends)
            quantised = [(part, scale) for part, (_, scale) in zip(parts, quantised, strict=True)]
        for name, matrix, (whole, scale) in zip(group.names, matrices, quantised, strict=True):
            rounded = whole * scale
            shifted = own.get(f"{name}.bias", np.float32(0)) - rounded @ offset  # [out]
            bias = shifted + (matrix - rounded) @ mean  # [out]
            tensors[f"{name}.weight"], tensors[f"{name}.scale"] = whole, scale
            tensors[f"{name}.bias"] = bias.astype(np.float32)
    return tensors


def split_int16(
    table: Float32Array, after_rows: Callable[[], None] = lambda: None
) -> dict[str, NDArray[np.generic]]:
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
        after_rows()
    return {"high": high, "low": low, "step": step}


def quantise(weight: Float32Array, bits: int = 8) -> tuple[NDArray[np.int8], Float32Array]:
    """Int8 `[out, in]` of *bits* and float32 scales `[out, 1]`, weight ≈ int8 * scale."""
    most = np.float32(WEIGHT_MAX[bits])
    scale = np.abs(weight).max(axis=1, keepdims=True) / most
    scale = np.maximum(scale, np.float32(SCALE_FLOOR) / most).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def rounded_with_feedback(steps: Float32Array, inputs: Float32Array, bits: int) -> NDArray[np.int8]:
    """*steps* `[out, in]` as whole numbers of *bits* that keep the products with *inputs* `[tokens, in]`.

    Channel by channel, the largest first; what its rounding changes in the products is taken back, as
    far as least squares can, by the channels still to come (GPTQ: Frantar et al. 2022,
    arXiv:2210.17323; there all channels, here `FEEDBACK_CHANNELS` at a time, which is less work).
    """
    most = WEIGHT_MAX[bits]
    order = np.argsort(-(inputs**2).sum(axis=0), kind="stable")
    left = np.ascontiguousarray(steps.T[order])  # [in, out]; contiguous channels
    whole = np.empty_like(left)
    for begin in range(0, len(order), FEEDBACK_CHANNELS):
        among = slice(begin, begin + FEEDBACK_CHANNELS)
        x = inputs[:, order[among]]
        squares = (x.T @ x).astype(np.float64)
        damping = FEEDBACK_DAMPING * np.diag(squares).mean() + SCALE_FLOOR
        inverse = np.linalg.inv(squares + damping * np.eye(len(squares)))
        factor = np.linalg.cholesky(inverse).T.astype(np.float32)
        share = factor / np.diag(factor)[:, None]  # row i: of the error of i, what each other takes
        rows, found = left[among], whole[among]
        for first in range(0, len(rows), FEEDBACK_BLOCK):
            last = min(first + FEEDBACK_BLOCK, len(rows))
            errors = np.empty_like(rows[first:last])
            for i in range(first, last):
                found[i] = np.clip(np.rint(rows[i]), -most, most)
                errors[i - first] = rows[i] - found[i]
                rows[i + 1 : last] -= share[i, i + 1 : last, None] * errors[i - first]
            rows[last:] -= share[first:last, last:].T @ errors
    rounded = np.empty(steps.shape, np.int8)
    rounded[:, order] = whole.T
    return rounded
