"""Graph: a model's ops as OpenVINO nodes, packed tokens in, last hidden states out.

Every token of a row lies end to end; only attention gathers them into `[sequences, length]`, pads
there, and scatters back. `keep` goes on with the tokens whose hidden states are wanted.

The plugin recognises what is written here: an int8 constant, converted and scaled, becomes an int8
kernel; one FakeQuantize on integers before it makes the activations int8 with our own scale; both
products of attention, its mask and softmax become one kernel where all of them have one type.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import Node, Output
from openvino import opset15 as op

from trivec.backends.openvino.packing import HIDDEN_SCORE, PLACE, POSITION, TOKEN_ID, TOKEN_TYPE
from trivec.backends.openvino.quantise import SHIFTS, Form, QuantConfig, Tensors
from trivec.models import registry
from trivec.models.ops import (
    Activation,
    AttentionSpec,
    Index,
    Linear,
    ModelConfig,
    Rope,
    Table,
    layer_of,
)

INT8_MAX, UINT8_MAX = 127.0, 255.0
ROW_FLOOR = 1e-10  # a row of zeros is divided by this instead of by zero
LINES = {Index.ID: TOKEN_ID, Index.TYPE: TOKEN_TYPE, Index.POSITION: POSITION}
BY_HEAD = np.array([0, 2, 1, 3])  # [sequences, length, heads, width] and back


class Extra(Enum):
    """What a graph may yield beside its hidden states, for calibration."""

    NOTHING = "nothing"
    RANGES = "ranges"  # a channel's max |x| and mean of each input of a linear layer, in turn: [in]
    LAYERS = "layers"  # the hidden states after each layer: [tokens, hidden]


@dataclass(frozen=True, slots=True)
class Padded:
    """The output of attention: rows of sequences * length, padding included."""

    node: Node


Rows: TypeAlias = Node | Padded


class _SharedArray:
    """A read-only array lent to OpenVINO, which shares memory only where numpy calls it writable.

    A constant is never written to, so a mapped file may stand behind it without a copy.
    """

    def __init__(self, array: NDArray[np.generic]) -> None:
        self._array = array  # kept alive as long as the view of it
        interface = array.__array_interface__
        self.__array_interface__ = {**interface, "data": (interface["data"][0], False)}


def constant(array: NDArray[np.generic]) -> Output:
    """*array* as a node that shares its memory: it must stay unchanged."""
    lent = np.asarray(_SharedArray(np.ascontiguousarray(array)))
    return op.constant(lent, shared_memory=True).output(0)


def number(value: float) -> Output:
    return op.constant(np.float32(value)).output(0)


@dataclass(frozen=True, slots=True)
class Inputs:
    """The graph's parameters; `packing.PackedRow` says what they hold."""

    tokens: Node = field(default_factory=lambda: op.parameter([4, -1], np.int32, name="tokens"))
    gather: Node = field(default_factory=lambda: op.parameter([-1, -1], np.int32, name="gather"))
    bias: Node = field(
        default_factory=lambda: op.parameter([-1, 1, 1, -1], np.float32, name="bias")
    )
    kept: Node = field(default_factory=lambda: op.parameter([2, -1], np.int32, name="kept"))


def build_graph(
    model: ModelConfig, tensors: Tensors, config: QuantConfig, extra: Extra = Extra.NOTHING
) -> ov.Model:
    """The graph of *model*; its first output is float32 `[kept, hidden]`, the others *extra*'s."""
    inputs = Inputs()
    ops = GraphOps(inputs, tensors, config)
    hidden = registry.forward(ops, model)
    extras = {Extra.NOTHING: [], Extra.RANGES: ops.ranges, Extra.LAYERS: ops.blocks}
    results = [op.result(node) for node in (_node(hidden), *extras[extra])]
    return ov.Model(results, [inputs.tokens, inputs.gather, inputs.bias, inputs.kept])


@dataclass(slots=True)
class GraphOps:
    """`models.ops.Ops` that emit nodes."""

    inputs: Inputs
    tensors: Tensors
    config: QuantConfig
    at: str = ""
    ranges: list[Node] = field(default_factory=list)
    blocks: list[Node] = field(default_factory=list)  # the output of each layer so far
    angles: dict[Rope, tuple[Node, Node]] = field(default_factory=dict)
    masks: dict[tuple[bool, int | None], Node] = field(default_factory=dict)

    def embed(self, table: Table, index: Index) -> Rows:
        def looked_up(stored: str) -> Node:
            ids = _line(self.inputs.tokens, LINES[index])
            return op.gather(constant(self.tensors[stored]), ids, _axis(0))

        name = self.at + table.name
        if f"{name}.weight" in self.tensors:
            return looked_up(f"{name}.weight")
        high, low, step = (  # `quantise.split_int16`
            op.convert(looked_up(f"{name}.{part}"), "f32") for part in ("high", "low", "step")
        )
        return op.multiply(op.add(op.multiply(high, number(256)), low), step)

    def add(self, x: Rows, y: Rows) -> Rows:
        return op.add(self._rows(x), self._rows(y))

    def layer_norm(self, x: Rows, name: str, *, eps: float, bias: bool = True) -> Rows:
        unit = op.mvn(self._rows(x), op.constant(np.array([-1])), True, eps, "inside_sqrt")
        scaled = op.multiply(unit, constant(self.tensors[f"{self.at}{name}.weight"]))
        return op.add(scaled, constant(self.tensors[f"{self.at}{name}.bias"])) if bias else scaled

    def rms_norm(self, x: Rows, name: str, *, eps: float, width: int | None = None) -> Rows:
        weight = constant(self.tensors[f"{self.at}{name}.weight"])
        rows = self._rows(x) if width is None else _in_heads(self._rows(x), width)
        last = op.constant(np.array([-1]))
        mean = op.reduce_mean(op.multiply(rows, rows), last, True)
        scaled = op.multiply(op.divide(rows, op.sqrt(op.add(mean, number(eps)))), weight)
        return scaled if width is None else _flat(scaled)

    def linear(self, x: Rows, *layers: Linear) -> tuple[Rows, ...]:
        return self._linear(self._rows(x), *layers, shift=0.0)

    def attention(self, q: Rows, k: Rows, v: Rows, spec: AttentionSpec) -> Rows:
        rotated_q, rotated_k = (self._rotated(self._rows(one), spec) for one in (q, k))
        nodes = attend(
            op.multiply(rotated_q, number(spec.head_dim**-0.5)),
            rotated_k,
            self._rows(v),
            spec=spec,
            gather=self.inputs.gather,
            bias=self.inputs.bias,
            mask=self._mask(spec),
            bf16=self.config.has_bf16_attention(len(self.blocks)),
        )
        return Padded(nodes)

    def mlp(self, x: Rows, up: Linear, down: Linear, activation: Activation) -> Rows:
        (inner,) = self.linear(x, up)
        inner = op.gelu(self._rows(inner), "erf")
        return self._linear(inner, down, shift=SHIFTS[activation])[0]

    def gated_mlp(
        self, x: Rows, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Rows:
        gates, inner = self.linear(x, gate, up)
        function = {Activation.GELU: lambda x: op.gelu(x, "erf"), Activation.SILU: op.swish}
        gated = op.multiply(function[activation](self._rows(gates)), self._rows(inner))
        return self.linear(gated, down)[0]

    def keep(self, x: Rows) -> Rows:
        """Gather the kept tokens; of attention's output, from its padded places at once."""
        if isinstance(x, Padded):
            return op.gather(x.node, _line(self.inputs.kept, 1), _axis(0))
        return op.gather(x, _line(self.inputs.kept, 0), _axis(0))

    def block(self, function: Callable[..., Rows], at: str, *values: object) -> Rows:
        rows = function(replace(self, at=f"{self.at}{at}."), *values)
        self.blocks.append(_node(rows))
        return rows

    def _linear(self, x: Node, *layers: Linear, shift: float) -> tuple[Node, ...]:
        """X Wᵀ + b for each of *layers*, in the form of their layer; *x* is quantised once.

        *shift* says how far below zero *x* may be. INT8_ROWS has one scale a token: the largest |x|
        of the row becomes 127; or, shifted to start at zero, its largest value becomes 255. A row's
        bits depend on that row alone.
        """
        tokens = op.constant(np.array([0]))
        self.ranges += [op.reduce_max(op.absolute(x), tokens), op.reduce_mean(x, tokens)]
        names = [self.at + layer.name for layer in layers]
        form = self.config.form_of(layer_of(names[0]))
        channel_scale = self.tensors.get(f"{names[0]}.channel_scale")
        row_scale = None  # [rows, 1]; what one step of x is worth
        if shift and form is Form.INT8_ROWS:
            x = op.add(x, number(shift))
        if channel_scale is not None:
            x = op.multiply(x, constant(channel_scale))
        if form is Form.INT8_ROWS:
            if shift:
                # A maximum that changes nothing; but with it the plugin makes x once, within GELU's
                # own pass, instead of once for its largest value and once more for its steps (a
                # quarter less time there).
                x = op.maximum(x, number(0.0))
            low, high = (0.0, UINT8_MAX) if shift else (-INT8_MAX - 1, INT8_MAX)
            size = x if shift else op.absolute(x)
            largest = op.reduce_max(size, op.constant(np.array([-1])), True)
            largest = op.maximum(largest, number(ROW_FLOOR))
            steps = op.multiply(x, op.divide(number(high), largest))  # [rows, in]
            bounds = (number(low), number(high))
            x = op.fake_quantize(steps, *bounds, *bounds, 256)
            row_scale = op.multiply(largest, number(1 / high))
        products = []
        for name in names:
            matrix = constant(self.tensors[f"{name}.weight"])
            if form is not Form.FP32:
                scale = constant(self.tensors[f"{name}.scale"])  # [out, 1]
                matrix = op.multiply(op.convert(matrix, "f32"), scale).output(0)
            product = op.matmul(x, matrix, False, True)
            if row_scale is not None:
                product = op.multiply(product, row_scale)
            bias = self.tensors.get(f"{name}.bias")
            products.append(product if bias is None else op.add(product, constant(bias)))
        return tuple(products)

    def _rotated(self, x: Node, spec: AttentionSpec) -> Node:
        """*x* `[tokens, heads * head_dim]` turned by its tokens' positions."""
        if spec.rope is None:
            return x
        if spec.rope not in self.angles:  # of every token, once for all layers
            cosines, sines = (
                op.unsqueeze(
                    op.gather(constant(table), _line(self.inputs.tokens, POSITION), _axis(0)),
                    op.constant(np.int64(1)),
                )
                for table in spec.rope.tables(spec.head_dim)
            )
            self.angles[spec.rope] = (cosines, sines)  # each [tokens, 1, head_dim / 2]
        cosine, sine = self.angles[spec.rope]
        half = op.constant(np.array([spec.head_dim // 2, spec.head_dim // 2]))
        heads = _in_heads(x, spec.head_dim)
        left, right = op.variadic_split(heads, _axis(-1), half).outputs()
        turned = (
            op.subtract(op.multiply(left, cosine), op.multiply(right, sine)),
            op.add(op.multiply(right, cosine), op.multiply(left, sine)),
        )
        return _flat(op.concat(list(turned), -1))

    def _mask(self, spec: AttentionSpec) -> Node | None:
        """Which key (column) a query (row) sees: bool `[length, length]`; None where all.

        One comparison of a distance, which the plugin computes in one pass: only its bytes are ever
        in memory, 64 MiB at 8,192 tokens, where float32 would be four times that at each step.
        """
        if spec.sees_all:
            return None
        key = (spec.causal, spec.window)
        if key not in self.masks:
            length = op.squeeze(
                op.gather(op.shape_of(self.inputs.gather, "i32"), op.constant([1]), _axis(0))
            )
            places = op.range(op.constant(np.int32(0)), length, op.constant(np.int32(1)), "f32")
            distance = op.subtract(op.unsqueeze(places, _axis(0)), op.unsqueeze(places, _axis(1)))
            if spec.window is None:
                seen = op.less_equal(distance, number(0))
            elif not spec.causal:
                seen = op.less_equal(op.absolute(distance), number(spec.window))
            else:  # from -window to 0
                half = number(spec.window / 2)
                seen = op.less_equal(op.absolute(op.add(distance, half)), half)
            self.masks[key] = seen
        return self.masks[key]

    def _rows(self, x: Rows) -> Node:
        """*x* as packed rows."""
        if isinstance(x, Padded):
            return op.gather(x.node, _line(self.inputs.tokens, PLACE), _axis(0))
        return x


def attend(
    q: Node,
    k: Node,
    v: Node,
    *,
    spec: AttentionSpec,
    gather: Node,
    bias: Node,
    mask: Node | None,
    bf16: bool,
) -> Node:
    """softmax(Q Kᵀ + bias) V within each sequence: float32 `[sequences * length, heads * head_dim]`.

    *q* is scaled already. With *bf16* everything between the gathers is rounded to bf16, scores and
    weights too; products and softmax add up in fp32. A text's bits are then its own only where the
    padded length is a multiple of 16, which all of `packing.LENGTH_SIZES` are.
    """

    def typed(x: Node | Output) -> Node:
        return op.convert(x, "bf16") if bf16 else x

    def gathered(x: Node) -> Node:
        """*x* `[tokens, heads * head_dim]` as `[sequences, heads, length, head_dim]`."""
        split = op.constant(np.array([0, 0, -1, spec.head_dim]))
        heads = op.reshape(op.gather(typed(x), gather, _axis(0)), split, True)
        return op.transpose(heads, op.constant(BY_HEAD))

    q, k, v = (gathered(one) for one in (q, k, v))
    if spec.kv_heads < spec.heads:  # each as often as there are heads of queries that read it
        owners = op.constant(np.repeat(np.arange(spec.kv_heads), spec.heads // spec.kv_heads))
        k, v = (op.gather(one, owners, _axis(1)) for one in (k, v))
    scores = op.add(op.matmul(q, k, False, True), typed(bias))
    if mask is not None:
        scores = op.select(mask, scores, typed(number(HIDDEN_SCORE)))
    mixed = op.matmul(op.softmax(scores, -1), v, False, False)
    together = op.transpose(mixed, op.constant(BY_HEAD))
    flat = op.reshape(together, op.constant(np.array([-1, spec.size])), False)
    return op.convert(flat, "f32") if bf16 else flat


def _node(x: Rows) -> Node:
    assert not isinstance(x, Padded), "a block ends with packed rows"
    return x


def _axis(index: int) -> Output:
    return op.constant(np.int64(index)).output(0)


def _line(lines: Node, index: int) -> Output:
    """One line of an integer input: int32 `[columns]`."""
    return op.gather(lines, op.constant(np.int64(index)), _axis(0)).output(0)


def _in_heads(x: Node, head_dim: int) -> Node:
    """*x* `[tokens, heads * head_dim]` as `[tokens, heads, head_dim]`."""
    return op.reshape(x, op.constant(np.array([0, -1, head_dim])), True)


def _flat(x: Node) -> Node:
    """*x* `[tokens, heads, head_dim]` as `[tokens, heads * head_dim]`."""
    heads, width = (size.get_length() for size in list(x.get_output_partial_shape(0))[1:])
    return op.reshape(x, op.constant(np.array([-1, heads * width])), False)
