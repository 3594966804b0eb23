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
from trivec.models.ops import Activation, HeadShape, Index, Linear, ModelConfig, Table, layer_of

# The lines of the input "tokens".
TOKEN_ID, TOKEN_TYPE, POSITION, PLACE = range(4)
LINES = {Index.ID: TOKEN_ID, Index.TYPE: TOKEN_TYPE, Index.POSITION: POSITION}

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

    def layer_norm(self, x: Rows, name: str, *, eps: float) -> Rows:
        unit = op.mvn(self._rows(x), op.constant(np.array([-1])), True, eps, "inside_sqrt")
        weight, bias = (self.tensors[f"{self.at}{name}.{part}"] for part in ("weight", "bias"))
        return op.add(op.multiply(unit, constant(weight)), constant(bias))

    def linear(self, x: Rows, *layers: Linear) -> tuple[Rows, ...]:
        source = self._input(self._rows(x), layers[0], lift=0.0)
        return tuple(linear(source, self.tensors, self.at + layer.name) for layer in layers)

    def attention(self, q: Rows, k: Rows, v: Rows, heads: HeadShape) -> Rows:
        attention = Attention(heads, self.recipe.has_bf16_attention(len(self.blocks)))
        scaled = op.multiply(self._rows(q), number(heads.head_dim**-0.5))
        gathered_q, gathered_k, gathered_v = (
            attention.gathered(rows, self.inputs.gather)
            for rows in (scaled, self._rows(k), self._rows(v))
        )
        return Padded(attention.attended(gathered_q, gathered_k, gathered_v, self.inputs.bias))

    def mlp(self, x: Rows, up: Linear, down: Linear, activation: Activation) -> Rows:
        (inner,) = self.linear(x, up)
        inner = op.gelu(self._rows(inner), "erf")
        source = self._input(inner, down, lift=LIFTS[activation])
        return linear(source, self.tensors, self.at + down.name)

    def keep(self, x: Rows) -> Rows:
        """Gather the kept tokens; of what attention made, from its padded places at once."""
        if isinstance(x, Padded):
            return op.gather(x.node, self._line(self.inputs.kept, 1), self._axis())
        return op.gather(x, self._line(self.inputs.kept, 0), self._axis())

    def block(self, function: Callable[..., Rows], at: str, *values: object) -> Rows:
        rows = function(replace(self, at=f"{self.at}{at}."), *values)
        self.blocks.append(_node(rows))
        return rows

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
