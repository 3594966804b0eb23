"""A model as an OpenVINO graph: packed tokens in, last hidden states out.

Every token of a row lies end to end; only attention gathers them into `[sequences, length]`, pads
there, and scatters back. `keep` goes on with the tokens that somebody asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TypeAlias

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from trivec.backends.openvino.attention import Attention
from trivec.backends.openvino.linear import (
    LinearInput,
    Tensors,
    constant,
    linear,
    linear_input,
    number,
)
from trivec.backends.openvino.recipe import Recipe
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

# The lines of the input "tokens".
TOKEN_ID, TOKEN_TYPE, POSITION, PLACE = range(4)
LINES = {Index.ID: TOKEN_ID, Index.TYPE: TOKEN_TYPE, Index.POSITION: POSITION}

UNSEEN = -1e9  # added to a score, it leaves exactly no weight after softmax

LIFTS = {Activation.GELU: 0.17}  # no GELU is below -0.16998


class Extra(Enum):
    """What a graph may yield beside its hidden states, to find out what int8 would do to it."""

    NOTHING = "nothing"
    RANGES = "ranges"  # a channel's max |x| and mean of each input of a linear layer, in turn: [in]
    LAYERS = "layers"  # the hidden states after each layer: [tokens, hidden]


@dataclass(frozen=True, slots=True)
class Padded:
    """What attention made: rows of sequences * length, padding included."""

    node: Node


Rows: TypeAlias = Node | Padded


@dataclass(frozen=True, slots=True)
class Inputs:
    """The graph's parameters, all made by `packing.py`.

    - tokens int32 [4, tokens]: token id, token type, position, place in sequences * length;
    - gather int32 [sequences, length]: the token at each place of attention;
    - bias float32 [sequences, 1, 1, length]: 0 for a token, -1e9 for padding;
    - kept int32 [2, kept]: tokens whose hidden states are wanted, and their places.
    """

    tokens: Node = field(default_factory=lambda: op.parameter([4, -1], np.int32, name="tokens"))
    gather: Node = field(default_factory=lambda: op.parameter([-1, -1], np.int32, name="gather"))
    bias: Node = field(
        default_factory=lambda: op.parameter([-1, 1, 1, -1], np.float32, name="bias")
    )
    kept: Node = field(default_factory=lambda: op.parameter([2, -1], np.int32, name="kept"))


def build_graph(
    config: ModelConfig, tensors: Tensors, recipe: Recipe, extra: Extra = Extra.NOTHING
) -> ov.Model:
    """The graph of *config*; its first output is float32 `[kept, hidden]`, the others *extra*'s."""
    inputs = Inputs()
    ops = GraphOps(inputs, tensors, recipe)
    hidden = registry.forward(ops, config)
    extras = {Extra.NOTHING: [], Extra.RANGES: ops.ranges, Extra.LAYERS: ops.blocks}
    results = [op.result(node) for node in (_node(hidden), *extras[extra])]
    return ov.Model(results, [inputs.tokens, inputs.gather, inputs.bias, inputs.kept])


@dataclass(slots=True)
class GraphOps:
    """`models.ops.Ops` that emit nodes."""

    inputs: Inputs
    tensors: Tensors
    recipe: Recipe
    at: str = ""
    ranges: list[Node] = field(default_factory=list)
    blocks: list[Node] = field(default_factory=list)  # what each layer so far came to
    angles: dict[Rope, tuple[Node, Node]] = field(default_factory=dict)
    biases: dict[tuple[bool, int | None], Node] = field(default_factory=dict)

    def embed(self, table: Table, index: Index) -> Rows:
        name = self.at + table.name
        if f"{name}.weight" in self.tensors:
            return self._looked_up(f"{name}.weight", index)
        high, low, step = (  # `quantise.Halves`
            op.convert(self._looked_up(f"{name}.{part}", index), "f32")
            for part in ("high", "low", "step")
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
        source = self._input(self._rows(x), layers[0], lift=0.0)
        return tuple(linear(source, self.tensors, self.at + layer.name) for layer in layers)

    def attention(self, q: Rows, k: Rows, v: Rows, spec: AttentionSpec) -> Rows:
        attention = Attention(spec, self.recipe.has_bf16_attention(len(self.blocks)))
        q, k = (self._rotated(self._rows(one), spec) for one in (q, k))
        scaled = op.multiply(q, number(spec.head_dim**-0.5))
        gathered_q, gathered_k, gathered_v = (
            attention.gathered(rows, self.inputs.gather) for rows in (scaled, k, self._rows(v))
        )
        bias = self._bias(spec)
        return Padded(attention.attended(gathered_q, gathered_k, gathered_v, bias))

    def mlp(self, x: Rows, up: Linear, down: Linear, activation: Activation) -> Rows:
        (inner,) = self.linear(x, up)
        inner = op.gelu(self._rows(inner), "erf")
        source = self._input(inner, down, lift=LIFTS[activation])
        return linear(source, self.tensors, self.at + down.name)

    def gated_mlp(
        self, x: Rows, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Rows:
        gates, inner = self.linear(x, gate, up)
        function = {Activation.GELU: lambda x: op.gelu(x, "erf"), Activation.SILU: op.swish}
        gated = op.multiply(function[activation](self._rows(gates)), self._rows(inner))
        return self.linear(gated, down)[0]

    def keep(self, x: Rows) -> Rows:
        """Gather the kept tokens; of what attention made, from its padded places at once."""
        if isinstance(x, Padded):
            return op.gather(x.node, self._line(self.inputs.kept, 1), self._axis())
        return op.gather(x, self._line(self.inputs.kept, 0), self._axis())

    def block(self, function: Callable[..., Rows], at: str, *values: object) -> Rows:
        rows = function(replace(self, at=f"{self.at}{at}."), *values)
        self.blocks.append(_node(rows))
        return rows

    def _rotated(self, x: Node, spec: AttentionSpec) -> Node:
        """*x* `[tokens, heads * head_dim]` turned by its tokens' positions."""
        if spec.rope is None:
            return x
        cosine, sine = self._angles(spec.rope, spec.head_dim)
        half = op.constant(np.array([spec.head_dim // 2, spec.head_dim // 2]))
        last = op.constant(np.int64(-1))
        left, right = op.variadic_split(_in_heads(x, spec.head_dim), last, half).outputs()
        turned = (
            op.subtract(op.multiply(left, cosine), op.multiply(right, sine)),
            op.add(op.multiply(right, cosine), op.multiply(left, sine)),
        )
        return _flat(op.concat(list(turned), -1))

    def _angles(self, rope: Rope, head_dim: int) -> tuple[Node, Node]:
        """Cosines and sines of every token, once for all layers: each `[tokens, 1, head_dim / 2]`."""
        if rope not in self.angles:
            places = self._line(self.inputs.tokens, POSITION)
            cosine, sine = (
                op.unsqueeze(
                    op.gather(constant(table), places, self._axis()), op.constant(np.int64(1))
                )
                for table in rope.tables(head_dim)
            )
            self.angles[rope] = (cosine, sine)
        return self.angles[rope]

    def _bias(self, spec: AttentionSpec) -> Node:
        """The padding's bias, and -1e9 where a token sees no other: `[sequences, 1, 1 or l, l]`."""
        if spec.sees_all:
            return self.inputs.bias
        key = (spec.causal, spec.window)
        if key not in self.biases:
            shape = op.shape_of(self.inputs.gather, "i32")
            length = op.squeeze(op.gather(shape, op.constant(np.array([1])), self._axis()))
            places = op.range(op.constant(np.int32(0)), length, op.constant(np.int32(1)), "i32")
            column = op.unsqueeze(places, op.constant(np.int64(1)))
            distance = op.subtract(op.unsqueeze(places, op.constant(np.int64(0))), column)
            seen: list[Node] = []
            if spec.causal:
                seen.append(op.less_equal(distance, op.constant(np.int32(0))))
            if spec.window is not None:
                seen.append(
                    op.less_equal(op.absolute(distance), op.constant(np.int32(spec.window)))
                )
            both = seen[0] if len(seen) == 1 else op.logical_and(*seen)
            hidden = op.select(both, number(0.0), number(UNSEEN))
            self.biases[key] = op.add(self.inputs.bias, hidden)
        return self.biases[key]

    def _input(self, x: Node, layer: Linear, *, lift: float) -> LinearInput:
        """*x* made ready for the linear layer *layer*, and for those that share its input."""
        tokens = op.constant(np.array([0]))
        self.ranges += [op.reduce_max(op.absolute(x), tokens), op.reduce_mean(x, tokens)]
        name = self.at + layer.name
        scale = self.tensors.get(f"{name}.channel_scale")
        return linear_input(x, self.recipe.form_of(layer_of(name)), channel_scale=scale, lift=lift)

    def _rows(self, x: Rows) -> Node:
        """*x* as packed rows."""
        if isinstance(x, Padded):
            return op.gather(x.node, self._line(self.inputs.tokens, PLACE), self._axis())
        return x

    def _looked_up(self, table: str, index: Index) -> Node:
        stored = constant(self.tensors[table])
        return op.gather(stored, self._line(self.inputs.tokens, LINES[index]), self._axis())

    def _line(self, lines: Node, index: int) -> Output:
        """One line of an integer input: int32 `[columns]`."""
        return op.gather(lines, op.constant(np.int64(index)), self._axis()).output(0)

    def _axis(self) -> Output:
        return op.constant(np.int64(0)).output(0)


def _node(x: Rows) -> Node:
    assert not isinstance(x, Padded), "a block ends with packed rows"
    return x


def _in_heads(x: Node, head_dim: int) -> Node:
    """*x* `[tokens, heads * head_dim]` as `[tokens, heads, head_dim]`."""
    return op.reshape(x, op.constant(np.array([0, -1, head_dim])), True)


def _flat(x: Node) -> Node:
    """*x* `[tokens, heads, head_dim]` as `[tokens, heads * head_dim]`."""
    width = int(
        np.prod([int(size.get_length()) for size in list(x.get_output_partial_shape(0))[1:]])
    )
    return op.reshape(x, op.constant(np.array([-1, width])), False)
