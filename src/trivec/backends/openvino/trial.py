"""Trial: what this machine is fast at and what it computes exactly, found out by trying.

Names and flags of CPUs say little: bf16 products are four times as fast as fp32's on AMD Zen 5 and
slower on an Intel Xeon without AMX, and the plugin's int8 matrix product is slower than fp32's where
there is no VNNI, while its convolution is not. What is found is kept with the certificate.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from time import thread_time
from timeit import timeit

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset15 as op

from trivec.backends.openvino.graph import Places, attend, rowwise_ops
from trivec.backends.openvino.quantise import (
    FP32,
    INT8_CONV,
    INT8_GROUPS_128,
    INT8_ROWS,
    SHIFTS,
    WEIGHT_MAX,
    QuantScheme,
)
from trivec.backends.openvino.session import open_core
from trivec.models.ops import Activation, AttentionSpec, Linear

PAYS_SHARE_MAX = 0.9  # of the time of what has more digits, or came first; nearer is not worth it

ATTENTION_TOKENS = 512  # where attention is a quarter of the time of BGE-M3
ATTENTION_REPEATS = 5

PRODUCT_TOKENS = 64
PRODUCT_REPEATS = 5
SATURATED = 1e-3  # of a sum; one that leaves its type misses by a third and more
ROUNDED = 1e-4  # of a row's norm; activations of 8 bits miss by 0.005

# Flags of CPUs that decide the kernels where VNNI is not among them; as Linux has them.
INT8_FLAGS = frozenset({"avx2", "avx512bw", "asimddp", "i8mm", "sve"})
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})
CPU_FILE = Path("/proc/cpuinfo")
# Hide instructions from oneDNN and most of the plugin, and from the rest; see decision 0005.
ISA_CAPS = ("ONEDNN_MAX_CPU_ISA", "OV_CPU_MAX_ISA")


def kernel_flags() -> list[str]:
    """What decides the int8 kernels beside what the plugin tells of the CPU; none where it has VNNI."""
    if capped := [f"{one}={os.environ[one]}" for one in ISA_CAPS if os.environ.get(one)]:
        return capped
    flags = set(CPU_FILE.read_text("utf-8").split()) if CPU_FILE.exists() else set[str]()
    return [] if flags & VNNI_FLAGS else sorted(flags & INT8_FLAGS)


def has_bf16() -> bool:
    """Whether this machine can multiply in bf16 at all."""
    return "BF16" in open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def bf16_pays(spec: AttentionSpec, *, tokens: int = ATTENTION_TOKENS) -> bool:
    """Whether bf16 is clearly faster for a text of *tokens*: tried on this machine, for 0.2 s."""
    if not has_bf16():
        return False
    requests = [_attention_alone(spec, tokens, bf16=bf16) for bf16 in (False, True)]
    fp32_s, bf16_s = _least_s(requests, ATTENTION_REPEATS)
    return bf16_s <= PAYS_SHARE_MAX * fp32_s


@dataclass(frozen=True, slots=True)
class ProductTrial:
    """What linear layers in one form of the int8 product are on this machine."""

    speed: float  # times that of fp32
    exact_bits: int  # of weights whose sums stay within their type: 8, 7, or 0 for none
    weights_only: bool  # activations stay in fp32, and so does the product
    is_exact: bool = True  # with the bits of the scheme in question

    @property
    def is_faster(self) -> bool:
        return self.speed > 1 and not self.weights_only

    def pays_beside(self, other: "ProductTrial") -> bool:
        """Whether it is to be taken instead of *other*, which is if it can be."""
        if not self.exact_bits or not other.exact_bits:
            return self.exact_bits > 0
        return self.speed * PAYS_SHARE_MAX >= other.speed

    def __str__(self) -> str:
        shown = f"linear layers {self.speed:.2f} times as fast"
        if not self.is_exact:
            shown += ", whose sums SATURATE on this CPU"
        if self.weights_only:
            shown += ", weights only: for memory, not for speed"
        return shown


@lru_cache(maxsize=16)
def try_products(hidden: int, inner: int) -> Mapping[QuantScheme, ProductTrial]:
    """The forms of the int8 product, tried on linear layers of a model of these widths.

    Half as many as a layer has, of the same weights in all forms. A form that computes nothing here has
    speed 0; see `session.WrongOutputShape`.
    """
    forms = (INT8_ROWS, INT8_CONV, INT8_GROUPS_128)
    requests = [_layers(form, hidden, inner // 2) for form in (FP32, *forms)]
    fp32_s, *times_s = _least_s(requests, PRODUCT_REPEATS)
    exact, *outputs = (np.array(request.output_tensors[0].data) for request in requests)
    bits = _exact_bits(forms[:2], hidden) | _exact_bits(forms[2:], hidden)
    found = {}
    for form, form_s, output in zip(forms, times_s, outputs, strict=True):
        has_shape = output.shape == exact.shape
        error = float(np.linalg.norm(output - exact)) if has_shape else np.inf
        found[form] = ProductTrial(
            speed=fp32_s / form_s if has_shape else 0.0,
            exact_bits=bits[form],
            weights_only=error <= ROUNDED * float(np.linalg.norm(exact)),
        )
    return found


def _least_s(requests: Sequence[ov.InferRequest], repeats: int) -> list[float]:
    """The least time of each of *requests*, which take turns.

    It is this thread's time, in which they run: a machine busy with other things changes no choice.
    """
    turns = [
        [timeit(request.infer, number=1, timer=thread_time) for request in requests]
        for _ in range(repeats)
    ]
    least: list[float] = np.array(turns).min(axis=0).tolist()
    return least


def _compiled(
    model: ov.Model, *inputs: NDArray[np.generic], group: int | None = None
) -> ov.InferRequest:
    """*model* compiled for one thread and run once on *inputs*."""
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    if group is not None:
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = group
    request = open_core().compile_model(model, "CPU", properties).create_infer_request()
    request.infer(list(inputs))
    return request


def _layers(scheme: QuantScheme, hidden: int, inner: int) -> ov.InferRequest:
    """Two square linear layers and a feed-forward network, run on `PRODUCT_TOKENS`."""
    steps = np.random.default_rng(0).integers(-64, 65, 1 << 14, np.int8)
    step = np.float32(1 / 64 / hidden**0.5)
    shapes = {"in": (hidden, hidden), "out": (hidden, hidden)}
    shapes |= {"up": (inner, hidden), "down": (hidden, inner)}
    tensors: dict[str, NDArray[np.generic]] = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = np.resize(steps if scheme.is_int8 else steps * step, shape)
        if scheme.is_int8:
            tensors[f"{name}.scale"] = np.full((shape[0], 1), step, np.float32)
    node = op.parameter([-1, hidden], np.float32)
    ops = rowwise_ops(node, tensors, scheme)
    rows = ops.linear(ops.linear(node, Linear("in", hidden))[0], Linear("out", hidden))[0]
    rows = ops.mlp(rows, Linear("up", inner), Linear("down", hidden), Activation.GELU)
    x = np.random.default_rng(1).standard_normal((PRODUCT_TOKENS, hidden), np.float32)
    return _compiled(ov.Model([op.result(rows)], [node]), x, group=scheme.group_size)


def _exact_bits(forms: Sequence[QuantScheme], hidden: int) -> dict[QuantScheme, int]:
    """The most bits of weights with which the largest sums there can be come out right; else 0.

    The *forms* share a group size.
    """
    node = op.parameter([-1, hidden], np.float32)
    signs = np.resize(np.array([-1, 1], np.int8), (PRODUCT_TOKENS, 1))
    group = forms[0].group_size
    shifts = (0.0, *SHIFTS.values()) if group is None else (0.0,)
    tried, results = list(product(forms, WEIGHT_MAX.items())), list[ov.Node]()
    for form, (_, most) in tried:
        weight = np.repeat(most * signs, hidden, axis=1)
        scale = np.full(signs.shape, 1 / most, np.float32)
        ops = rowwise_ops(node, {".weight": weight, ".scale": scale}, form)
        results += [op.result(ops.linear(node, Linear("", 0), shift=one)[0]) for one in shifts]
    ones = np.ones((PRODUCT_TOKENS, hidden), np.float32)
    request = _compiled(ov.Model(results, [node]), ones, group=group)
    sums = iter(request.output_tensors)
    bits = dict.fromkeys(forms, 0)
    for form, (count, _) in tried:
        found = np.array([next(sums).data for _ in shifts])  # [shifts, tokens, out]
        expected = hidden * (1 + np.array(shifts))[:, None, None] * signs[:, 0]
        expected = np.repeat(expected, PRODUCT_TOKENS, axis=1)
        if found.shape == expected.shape and np.allclose(found, expected, rtol=SATURATED):
            bits[form] = max(bits[form], count)
    return bits


def _attention_alone(spec: AttentionSpec, tokens: int, *, bf16: bool) -> ov.InferRequest:
    """One attention over a text of *tokens*, compiled for one thread and run once."""
    kv_size = spec.kv_heads * spec.head_dim
    q = op.parameter([-1, spec.size], np.float32)
    kv = op.parameter([-1, kv_size], np.float32)
    gather = op.parameter([-1, -1], np.int32)
    bias = op.parameter([-1, 1, 1, -1], np.float32)
    seen = Places(gather, gather, bias)
    nodes = attend(q, kv, kv, spec=spec, places=seen, mask=None, bf16=bf16)
    model = ov.Model([op.result(nodes)], [q, kv, gather, bias])
    states = (np.full((tokens, size), 0.01, np.float32) for size in (spec.size, kv_size))
    places = np.arange(tokens, dtype=np.int32)[None]
    return _compiled(model, *states, places, np.zeros((1, 1, 1, tokens), np.float32))
