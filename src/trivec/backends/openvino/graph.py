"""The encoder as an OpenVINO graph: packed tokens in, last hidden states out.

Every token of a row lies end to end; only attention gathers them into `[sequences, length]`, pads
there, and scatters back. The last layer goes on with the tokens that somebody asked for. It knows
arithmetic and names of weights; not files, shapes in use, or who calls.
"""

from enum import Enum

import numpy as np
import openvino as ov
from openvino import Node, Output
from openvino import opset15 as op

from trivec.backends.openvino.attention import Attention, HeadShape
from trivec.backends.openvino.linear import (
    LinearInput,
    Tensors,
    constant,
    linear,
    linear_input,
    number,
)
from trivec.backends.openvino.recipe import Recipe
from trivec.checkpoints.checkpoint import EncoderConfig

# The lines of the input "tokens".
TOKEN_ID, TOKEN_TYPE, POSITION, PLACE = range(4)

# Where the largest channels of a linear layer's input are worth knowing (see `smoothing.py`).
TAPPED = ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")

AFTER_GELU = "output.dense"
GELU_LIFT = 0.17  # no GELU is below -0.16998


def linear_name(layer: int, part: str) -> str:
    return f"encoder.layer.{layer}.{part}"


def head_shape(config: EncoderConfig) -> HeadShape:
    return HeadShape(config.head_count, config.hidden_size // config.head_count)


class Extra(Enum):
    """What a graph may yield beside its hidden states, to find out what int8 would do to it."""

    NOTHING = "nothing"
    RANGES = "ranges"  # a channel's max |x| and mean of each input of `TAPPED`, in turn: [in]
    LAYERS = "layers"  # the hidden states after each layer: [tokens, hidden]


class Encoder:
    """Builds one graph. Inputs, all made by `packing.py`:

    - tokens int32 [4, tokens]: token id, token type, position, place in sequences * length;
    - gather int32 [sequences, length]: the token at each place of attention;
    - bias float32 [sequences, 1, 1, length]: 0 for a token, -1e9 for padding;
    - kept int32 [2, kept]: tokens whose hidden states are wanted, and their places.

    Output: float32 [kept, hidden].
    """

    def __init__(self, config: EncoderConfig, tensors: Tensors, recipe: Recipe) -> None:
        self._config = config
        self._tensors = tensors
        self._recipe = recipe
        self._axis = op.constant(np.int64(0)).output(0)
        self._tokens = op.parameter([4, -1], np.int32, name="tokens")
        self._gather = op.parameter([-1, -1], np.int32, name="gather")
        self._bias = op.parameter([-1, 1, 1, -1], np.float32, name="bias")
        self._kept = op.parameter([2, -1], np.int32, name="kept")
        self._ranges: list[Node] = []
        self._layers: list[Node] = []

    def build(self, extra: Extra = Extra.NOTHING) -> ov.Model:
        """The whole graph, once; outputs after the first are those of *extra*."""
        place = self._line(self._tokens, PLACE)
        x = self._embeddings()
        for layer in range(self._config.layer_count):
            attended = self._attention(x, layer)  # [sequences * length, hidden]
            if layer == self._config.layer_count - 1:
                x = op.gather(x, self._line(self._kept, 0), self._axis)
                place = self._line(self._kept, 1)
            x = self._after_attention(x, op.gather(attended, place, self._axis), layer)
            self._layers.append(x)
        extras = {Extra.NOTHING: [], Extra.RANGES: self._ranges, Extra.LAYERS: self._layers}
        results = [op.result(node) for node in [x, *extras[extra]]]
        return ov.Model(results, [self._tokens, self._gather, self._bias, self._kept])

    def _line(self, lines: Node, index: int) -> Output:
        """One line of an integer input: int32 `[columns]`."""
        return op.gather(lines, op.constant(np.int64(index)), self._axis).output(0)

    def _embeddings(self) -> Node:
        types = self._looked_up("token_type_embeddings.weight", TOKEN_TYPE)
        positions = self._looked_up("position_embeddings.weight", POSITION)
        x = op.add(op.add(self._words(), types), positions)
        return self._layer_norm(x, "embeddings.LayerNorm")

    def _words(self) -> Node:
        """The tokens' word embeddings, from one float32 table or from `quantise.Halves`."""
        if "embeddings.word_embeddings.weight" in self._tensors:
            return self._looked_up("word_embeddings.weight", TOKEN_ID)
        high, low, step = (
            op.convert(self._looked_up(f"word_embeddings.{part}", TOKEN_ID), "f32")
            for part in ("high", "low", "step")
        )
        return op.multiply(op.add(op.multiply(high, number(256)), low), step)

    def _looked_up(self, table: str, line: int) -> Node:
        """Rows of a table of the embeddings."""
        stored = constant(self._tensors[f"embeddings.{table}"])
        return op.gather(stored, self._line(self._tokens, line), self._axis)

    def _attention(self, x: Node, layer: int) -> Node:
        """softmax(Q Kᵀ / sqrt(d) + bias) V: float32 `[sequences * length, hidden]`."""
        heads = head_shape(self._config)
        attention = Attention(heads, self._recipe.has_bf16_attention(layer))
        source = self._input(x, layer, "attention.self.query")
        query = self._linear(source, layer, "attention.self.query")
        q = attention.gathered(op.multiply(query, number(heads.width**-0.5)), self._gather)
        k, v = (
            attention.gathered(self._linear(source, layer, f"attention.self.{part}"), self._gather)
            for part in ("key", "value")
        )
        return attention.attended(q, k, v, self._bias)

    def _after_attention(self, x: Node, attended: Node, layer: int) -> Node:
        """The rest of a layer: projection, feed-forward with exact GELU, both LayerNorms."""
        source = self._input(attended, layer, "attention.output.dense")
        projected = self._linear(source, layer, "attention.output.dense")
        x = self._layer_norm(op.add(projected, x), linear_name(layer, "attention.output.LayerNorm"))
        source = self._input(x, layer, "intermediate.dense")
        inner = op.gelu(self._linear(source, layer, "intermediate.dense"), "erf")
        source = self._input(inner, layer, "output.dense")
        outer = self._linear(source, layer, "output.dense")
        return self._layer_norm(op.add(outer, x), linear_name(layer, "output.LayerNorm"))

    def _input(self, x: Node, layer: int, part: str) -> LinearInput:
        """*x* made ready for the linear layer *part*, and for those that share its input."""
        tokens = op.constant(np.array([0]))
        self._ranges += [op.reduce_max(op.absolute(x), tokens), op.reduce_mean(x, tokens)]
        scale = self._tensors.get(f"{linear_name(layer, part)}.channel_scale")
        lift = GELU_LIFT if part == AFTER_GELU else 0.0
        return linear_input(x, self._recipe.form_of(layer), channel_scale=scale, lift=lift)

    def _linear(self, x: LinearInput, layer: int, part: str) -> Node:
        return linear(x, self._tensors, linear_name(layer, part))

    def _layer_norm(self, x: Node, name: str) -> Node:
        eps = self._config.layer_norm_eps
        unit = op.mvn(x, op.constant(np.array([-1])), True, eps, "inside_sqrt")
        weight = constant(self._tensors[f"{name}.weight"])
        return op.add(op.multiply(unit, weight), constant(self._tensors[f"{name}.bias"]))
