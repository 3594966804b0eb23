"""Attention as OpenVINO nodes, in fp32 or with products of bf16, and which of the two pays here.

The plugin makes one kernel of both products, the bias and softmax, and only where all of them have
one type. It knows shapes and types; not weights, rows or models.
"""

import time
from dataclasses import dataclass

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset15 as op

from trivec.backends.openvino.plugin import open_core
from trivec.core.types import Float32Array
from trivec.models.ops import AttentionSpec

TRIAL_TOKENS = 512  # where attention is a quarter of the time of BGE-M3
TRIAL_REPEATS = 5
BF16_SHARE_MAX = 0.9  # of fp32's time; what is nearer is not worth fewer digits

BY_HEAD = np.array([0, 2, 1, 3])  # [sequences, length, heads, width] and back


@dataclass(frozen=True, slots=True)
class Attention:
    """The nodes of one layer's attention: softmax(Q Kᵀ + bias) V.

    With *bf16* everything between the gathers is rounded to bf16, scores and weights too; products
    and softmax add up in fp32. A text's bits are then its own only where the padded length is a
    multiple of 16, which all of `rows` are.
    """

    spec: AttentionSpec
    bf16: bool

    def gathered(self, x: Node, places: Node) -> Node:
        """*x* `[tokens, hidden]` at *places* `[sequences, length]`, as `[s, heads, length, width]`."""
        axis = op.constant(np.int64(0))
        gathered = op.gather(self._typed(x), places, axis)
        split = op.constant(np.array([0, 0, -1, self.spec.head_dim]))
        return op.transpose(op.reshape(gathered, split, True), op.constant(BY_HEAD))

    def attended(self, q: Node, k: Node, v: Node, bias: Node) -> Node:
        """Float32 `[sequences * length, hidden]`, of what `gathered` made and *bias* `[s, 1, 1 or l, l]`."""
        if self.spec.kv_heads < self.spec.heads:
            k, v = (self._repeated(one) for one in (k, v))
        scores = op.add(op.matmul(q, k, False, True), self._typed(bias))
        mixed = op.matmul(op.softmax(scores, -1), v, False, False)
        hidden = self.spec.size
        together = op.transpose(mixed, op.constant(BY_HEAD))
        flat = op.reshape(together, op.constant(np.array([-1, hidden])), False)
        return op.convert(flat, "f32") if self.bf16 else flat

    def _repeated(self, x: Node) -> Node:
        """Each head as often as there are heads of queries that read it."""
        owners = np.repeat(np.arange(self.spec.kv_heads), self.spec.heads // self.spec.kv_heads)
        return op.gather(x, op.constant(owners), op.constant(np.int64(1)))

    def _typed(self, x: Node) -> Node:
        return op.convert(x, "bf16") if self.bf16 else x


def has_bf16() -> bool:
    """Whether this machine can multiply in bf16 at all."""
    return "BF16" in open_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def bf16_pays(spec: AttentionSpec, *, tokens: int = TRIAL_TOKENS) -> bool:
    """Whether bf16 is clearly faster for a text of *tokens*: tried on this machine, for 0.2 s.

    Having the instructions says little: on AMD Zen 5 bf16 products are four times as fast as
    fp32's, on an Intel Xeon without AMX they were slower.
    """
    if not has_bf16():
        return False
    requests = [_alone(Attention(spec, bf16), tokens) for bf16 in (False, True)]
    turns = [[_time_s(request) for request in requests] for _ in range(TRIAL_REPEATS)]
    fp32_s, bf16_s = np.array(turns).min(axis=0).tolist()
    return bool(bf16_s <= BF16_SHARE_MAX * fp32_s)


def _alone(attention: Attention, tokens: int) -> ov.InferRequest:
    """One attention over a text of *tokens*, compiled for one thread and run once."""
    hidden = attention.spec.size
    x = op.parameter([-1, hidden], np.float32)
    places = op.parameter([-1, -1], np.int32)
    bias = op.parameter([-1, 1, 1, -1], np.float32)
    q = attention.gathered(x, places)
    k = attention.gathered(op.multiply(x, op.constant(np.float32(2))), places)
    model = ov.Model([op.result(attention.attended(q, k, k, bias))], [x, places, bias])
    properties = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = open_core().compile_model(model, "CPU", properties).create_infer_request()
    states: Float32Array = np.full((tokens, hidden), 0.01, np.float32)
    order = np.arange(tokens, dtype=np.int32)[None]
    request.infer([states, order, np.zeros((1, 1, 1, tokens), np.float32)])
    return request


def _time_s(request: ov.InferRequest) -> float:
    started_s = time.perf_counter()
    request.infer()
    return time.perf_counter() - started_s
