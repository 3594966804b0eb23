"""Graph: a model's ops as OpenVINO nodes, packed tokens in, last hidden states out.

All tokens of a micro-batch lie end to end; only attention gathers them into `[sequences, length]`,
pads there, and scatters back. `keep` goes on with the tokens whose hidden states are wanted.

The plugin recognises what is written here: an int8 constant, converted and scaled, becomes an int8
kernel; one FakeQuantize on integers before it makes the activations int8 with our own scale; both
products of attention, its mask and softmax become one kernel where all of them have one type.

Where the CPU has no fast int8 matrix product, its 1x1 convolution is one (decision 0005). A token is
an image of one pixel, and no number moves; but between the wide layers all tokens are one image
`[1, channels, tokens, 1]`, since there, with its rows many to a kernel, a product is faster by more than
turning them costs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import Node, Output
from openvino import opset15 as op

from trivec.backends.openvino.packing import HIDDEN_SCORE, PLACE, POSITION, TOKEN_ID, TOKEN_TYPE
from trivec.backends.openvino.quantise import SHIFTS, QuantScheme, Tensors, quantise
from trivec.models import registry
from trivec.models.ops import (
    Activation,
    Alibi,
    AttentionSpec,
    Buckets,
    Experts,
    Index,
    Linear,
    ModelConfig,
    Rope,
    Table,
)
from trivec.models.pooling import HeadLayer, HeadNorm, Nonlinearity

INT8_MAX, UINT8_MAX = 127.0, 255.0
LARGEST_FLOOR = 1e-10  # a token of zeros is divided by this instead of by zero
LINES = {Index.ID: TOKEN_ID, Index.TYPE: TOKEN_TYPE, Index.POSITION: POSITION}
EXPERT_ROWS = 16  # an expert computes a multiple of so many: each count takes memory, see packing
NONLINEARITIES: Mapping[Nonlinearity, Callable[[Node], Node]] = {
    Nonlinearity.TANH: op.tanh,
    Nonlinearity.GELU: lambda x: op.gelu(x, "erf"),
    Nonlinearity.RELU: op.relu,
}
BY_HEAD = np.array([0, 2, 1, 3])  # [sequences, length, heads, width] and back
PIXEL = np.array([1, 1])
NO_MARGIN = np.array([0, 0])


@dataclass(frozen=True, slots=True)
class Padded:
    """The output of attention: rows of sequences * length, padding included."""

    node: Node


Rows: TypeAlias = Node | Padded


def constant(array: NDArray[np.generic]) -> Output:
    """*array*, which must be writable, as a node that shares its memory: it must stay unchanged."""
    return op.constant(np.ascontiguousarray(array), shared_memory=True).output(0)


def number(value: float) -> Output:
    return op.constant(np.float32(value)).output(0)


def integer(value: int) -> Output:
    return op.constant(np.int64(value)).output(0)


def gathered(x: Node | Output, indices: Node | Output, axis: int = 0) -> Node:
    """The slices of *x* at *indices* along *axis*."""
    return op.gather(x, indices, integer(axis))


def build_graph(
    model: ModelConfig,
    tensors: Tensors,
    scheme: QuantScheme,
    *,
    with_statistics: bool = False,
    with_inputs: bool = False,
) -> ov.Model:
    """The graph of *model*, whose inputs are the arrays of a `packing.MicroBatch`.

    Its last output is float32 `[kept, hidden]`; before it come *with_statistics* the
    `GraphOps.statistics` and `blocks`, *with_inputs* the `GraphOps.inputs`. In this order the plugin
    computes statistics layer by layer; else it keeps the inputs of all layers until the end.
    """
    tokens = op.parameter([4, -1], np.int32, name="tokens")
    gather = op.parameter([-1, -1], np.int32, name="gather")
    bias = op.parameter([-1, 1, 1, -1], np.float32, name="bias")
    near = op.parameter([-1, -1], np.int32, name="near")
    near_bias = op.parameter([-1, 1, 1, -1], np.float32, name="near_bias")
    blocks = gathered(op.shape_of(near), op.constant(np.array([0])))
    in_blocks = op.reshape(gather, op.concat([blocks, op.constant(np.array([-1]))], 0), False)
    kept = op.parameter([2, -1], np.int32, name="kept")
    ops = GraphOps(
        tokens,
        Places(gather, gather, bias),
        Places(in_blocks, near, near_bias),
        kept,
        tensors,
        scheme,
        is_calibrating=with_statistics,
    )
    hidden = ops.rows(registry.forward(ops, model))
    others = [*ops.statistics, *ops.blocks] if with_statistics else []
    others += ops.inputs if with_inputs else []
    results = [op.result(node) for node in (*others, hidden)]
    return ov.Model(results, [tokens, gather, bias, near, near_bias, kept])


def build_head(layers: Sequence[HeadLayer], scheme: QuantScheme, *, rows: int) -> ov.Model:
    """The graph of a head's *layers*: float32 `[rows, in]` to `[rows, out]`.

    In int8 its last layer is, the one with a row for each word; what is before that is small.
    """
    x = op.parameter([rows, layers[0].weight.shape[-1]], np.float32, name="rows")
    tensors: dict[str, NDArray[np.generic]] = {}
    for i, layer in enumerate(layers):
        tensors[f"{i}.weight"] = layer.weight
        if layer.bias is not None:
            tensors[f"{i}.bias"] = layer.bias
    if scheme.is_int8:
        last = len(layers) - 1
        weight = quantise(layers[last].weight, scheme.weight_bits)
        tensors[f"{last}.weight"], tensors[f"{last}.scale"] = weight
    ops, node = rowwise_ops(x, tensors, scheme), x
    for i, layer in enumerate(layers):
        if isinstance(layer, HeadNorm):
            node = ops.rows(
                ops.layer_norm(node, str(i), eps=layer.eps, bias=layer.bias is not None)
            )
            continue
        (node,) = ops.linear(node, Linear(str(i), len(layer.weight)))
        if (after := NONLINEARITIES.get(layer.nonlinearity)) is not None:
            node = after(node)
    return ov.Model([op.result(node)], [x])


def rowwise_ops(x: Node, tensors: Tensors, scheme: QuantScheme) -> "GraphOps":
    """Ops for what has no attention, *x* being all there is."""
    return GraphOps(x, Places(x, x, x), Places(x, x, x), x, tensors, scheme)


@dataclass(frozen=True, slots=True)
class Places:
    """Which tokens meet in attention: some queries and some keys, which may be others, at a time."""

    queries: Node  # int32 [groups, rows]; the token at each place
    keys: Node  # int32 [groups, columns]; as many more before the first query as after the last
    bias: Node  # float32 [groups, 1, 1, columns]; what scores gain


@dataclass(slots=True)
class GraphOps:
    """`models.ops.Ops` that emit nodes."""

    tokens: Node
    places: Places  # of whole sequences
    near: Places  # of blocks of them, for attention within a window
    kept: Node
    tensors: Tensors
    scheme: QuantScheme
    at: str = ""
    is_calibrating: bool = False
    # Of each input of linear layers in turn a channel's max |x|, and then its mean: [in].
    statistics: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)  # these inputs themselves: [tokens, in]
    blocks: list[Node] = field(default_factory=list)  # the output of each layer: [tokens, hidden]
    angles: dict[tuple[Rope, float], tuple[Node, Node]] = field(default_factory=dict)
    masks: dict[tuple[bool, int | None], Node] = field(default_factory=dict)
    biases: dict[tuple[Alibi | Buckets, bool], Node] = field(default_factory=dict)

    def embed(self, table: Table, index: Index) -> Rows:
        name, ids = self.at + table.name, self._line(LINES[index])
        if f"{name}.weight" in self.tensors:
            rows = gathered(constant(self.tensors[f"{name}.weight"]), ids)
        else:
            high, low, step = (  # `quantise.split_int16`
                op.convert(gathered(constant(self.tensors[f"{name}.{part}"]), ids), "f32")
                for part in ("high", "low", "step")
            )
            rows = op.multiply(op.add(op.multiply(high, number(256)), low), step)
        return rows if table.scale == 1 else op.multiply(rows, number(table.scale))

    def add(self, x: Rows, y: Rows) -> Rows:
        return op.add(self.rows(x), self.rows(y))

    def layer_norm(self, x: Rows, name: str, *, eps: float, bias: bool = True) -> Rows:
        unit = op.mvn(self.rows(x), op.constant(np.array([-1])), True, eps, "inside_sqrt")
        scaled = op.multiply(unit, constant(self.tensors[f"{self.at}{name}.weight"]))
        return op.add(scaled, constant(self.tensors[f"{self.at}{name}.bias"])) if bias else scaled

    def rms_norm(
        self, x: Rows, name: str, *, eps: float, width: int | None = None, offset: float = 0.0
    ) -> Rows:
        weight = constant(self.tensors[f"{self.at}{name}.weight"])
        if offset:
            weight = op.add(weight, number(offset)).output(0)
        rows = self.rows(x) if width is None else _in_heads(self.rows(x), width)
        mean = op.reduce_mean(op.multiply(rows, rows), op.constant(np.array([-1])), True)
        scaled = op.multiply(op.divide(rows, op.sqrt(op.add(mean, number(eps)))), weight)
        return scaled if width is None else _flat(scaled)

    def linear(
        self,
        x: Rows,
        *layers: Linear,
        shift: float = 0.0,
        from_image: bool = False,
        to_image: bool = False,
    ) -> tuple[Node, ...]:
        """X Wᵀ + b for each of *layers*, in the scheme of their layer; *x* is quantised once.

        *shift* says how far below zero *x* may be. Int8 of one scale a token: the largest |x| of the
        token becomes 127; or, shifted to start at zero, its largest value becomes 255. A token's
        bits depend on that token alone. Of convolutions *x* may be an image, or what they make.
        """
        x = self.rows(x)
        in_image = from_image or to_image
        tokens = op.constant(np.array([0, 2, 3] if from_image else [0]))
        self.statistics += [op.reduce_max(op.absolute(x), tokens), op.reduce_mean(x, tokens)]
        self.inputs.append(x)
        names = [self.at + layer.name for layer in layers]
        is_int8 = f"{names[0]}.scale" in self.tensors
        has_token_scale = is_int8 and self.scheme.group_size is None
        channel_scale = self.tensors.get(f"{names[0]}.channel_scale")
        if shift and has_token_scale:
            x = op.add(x, number(shift))
        if channel_scale is not None:
            x = op.multiply(x, _by_channel(channel_scale, from_image))
        # What one step of x is worth: [tokens, 1], of an image [1, 1, tokens, 1].
        token_scale = None
        if has_token_scale:
            if shift:
                # A maximum that changes nothing; but with it the plugin makes x once, within GELU's
                # own pass, instead of once for its largest value and once more for its steps (a
                # quarter less time there).
                x = op.maximum(x, number(0.0))
            low, high = (0.0, UINT8_MAX) if shift else (-INT8_MAX - 1, INT8_MAX)
            size = x if shift else op.absolute(x)
            largest = op.reduce_max(size, op.constant(np.array([1 if from_image else -1])), True)
            largest = op.maximum(largest, number(LARGEST_FLOOR))
            steps = op.multiply(x, op.divide(number(high), largest))  # [tokens, in]
            bounds = (number(low), number(high))
            x = op.fake_quantize(steps, *bounds, *bounds, 256)
            token_scale = op.multiply(largest, number(1 / high))
            if to_image:
                x = _image(x)
                token_scale = op.reshape(token_scale, op.constant(np.array([1, 1, -1, 1])), False)
        products = []
        for name in names:
            if is_int8 and self.scheme.convolution:
                product = self._convolution(x, name, pixels=not in_image)
            else:
                matrix = constant(self.tensors[f"{name}.weight"])
                if is_int8:
                    scale = constant(self.tensors[f"{name}.scale"])  # [out, 1]
                    matrix = op.multiply(op.convert(matrix, "f32"), scale).output(0)
                product = op.matmul(x, matrix, False, True)
            if token_scale is not None:
                product = op.multiply(product, token_scale)
            if (bias := self.tensors.get(f"{name}.bias")) is not None:
                product = op.add(product, _by_channel(bias, in_image))
            products.append(_image_rows(product) if from_image else product)
        return tuple(products)

    def _convolution(self, x: Node, name: str, *, pixels: bool) -> Node:
        """*x* times the weight *name*: an image to an image; or, as *pixels*, rows to rows."""
        kernel = op.convert(constant(self.tensors[f"{name}.weight"][:, :, None, None]), "f32")
        kernel = op.multiply(kernel, constant(self.tensors[f"{name}.scale"][:, :, None, None]))
        if pixels:
            x = op.reshape(x, op.constant(np.array([0, 0, 1, 1])), True)
        product = op.convolution(x, kernel, PIXEL, NO_MARGIN, NO_MARGIN, PIXEL)
        return op.reshape(product, op.constant(np.array([0, 0])), True) if pixels else product

    def _makes_images(self, up: Linear) -> bool:
        """Whether the layers between which *up* widens are convolutions."""
        return self.scheme.convolution and f"{self.at}{up.name}.scale" in self.tensors

    def attention(self, q: Rows, k: Rows, v: Rows, spec: AttentionSpec) -> Rows:
        in_fp32 = len(self.blocks) in self.scheme.exact_layers
        q, scale, places = self.rows(q), spec.head_dim**-0.5, self._places(spec)
        if isinstance(spec.bias, Alibi):  # see `attend`
            by_head = np.float32(scale) / spec.bias.slopes
            q, scale = op.multiply(q, constant(np.repeat(by_head, spec.head_dim))), 1.0
        nodes = attend(
            self._rotated(q, spec, scale),
            self._rotated(self.rows(k), spec),
            self.rows(v),
            spec=spec,
            places=places,
            mask=self._mask(spec),
            by_distance=self._by_distance(spec),
            bf16=self.scheme.bf16_attention and not in_fp32,
        )
        return Padded(nodes)

    def mlp(
        self,
        x: Rows,
        up: Linear,
        down: Linear,
        activation: Activation,
        experts: Experts | None = None,
    ) -> Rows:
        """With *experts* see `_mixed`; while calibrating all of them are computed, each for every
        token, since statistics are of the layers as the plan has them.
        """
        x = self.rows(x)
        if experts is not None and not self.is_calibrating:
            return self._mixed(x, up, down, activation, experts)
        image = experts is None and self._makes_images(up)
        inner = activated(self.linear(x, up, to_image=image)[0], activation)
        if experts is None:
            return self.linear(inner, down, shift=SHIFTS.get(activation, 0.0), from_image=image)[0]
        weights, chosen = self._routed(x, experts)
        weights = op.unsqueeze(op.multiply(weights, op.convert(chosen, "f32")), integer(-1))
        by_expert = _in_heads(inner, up.out // experts.num_experts)
        return self.linear(_flat(op.multiply(by_expert, weights)), down)[0]

    def gated_mlp(
        self, x: Rows, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Rows:
        image = self._makes_images(up)
        gates, inner = self.linear(x, gate, up, to_image=image)
        inner = op.multiply(activated(gates, activation), inner)
        return self.linear(inner, down, from_image=image)[0]

    def _routed(self, x: Node, experts: Experts) -> tuple[Node, Node]:
        """Of each token the experts' shares, float32, and whether it goes through them, int32: each
        `[tokens, num_experts]`. The router is never int8.
        """
        router = constant(self.tensors[f"{self.at}{experts.router}.weight"])
        shares = op.softmax(op.matmul(x, router, False, True), -1)
        best = op.topk(shares, op.constant(np.int32(experts.top_k)), -1, "max", "value").output(1)
        count = op.constant(np.int32(experts.num_experts))
        ones = op.one_hot(best, count, op.constant(np.int32(1)), op.constant(np.int32(0)), -1)
        return shares, op.reduce_max(ones, op.constant(np.array([1])))

    def _mixed(
        self, x: Node, up: Linear, down: Linear, activation: Activation, experts: Experts
    ) -> Node:
        """down(activation(up(x)) * share), summed over the experts that a token goes through.

        Each expert gathers its own tokens, and as many copies of the first as make a multiple of
        `EXPERT_ROWS`. A token then adds up its rows in the experts' order, so its bits are its own.
        """
        shares, chosen = self._routed(x, experts)
        step, axis = op.constant(np.int32(EXPERT_ROWS)), op.constant(np.array(0))
        counts = op.reduce_sum(chosen, axis)  # [experts]
        rounded = op.multiply(
            op.divide(op.add(counts, op.constant(np.int32(EXPERT_ROWS - 1))), step), step
        )
        rounded = op.maximum(rounded, step)
        firsts = op.cum_sum(rounded, axis, True)
        # Where each token's row of an expert is, among the rows of all of them: [tokens, experts].
        places = op.add(op.cum_sum(chosen, axis, True), firsts)
        rows = []
        for expert in range(experts.num_experts):
            own = replace(self, tensors=self._of_expert(expert, up, down, experts.num_experts))
            at = integer(expert)
            tokens = op.squeeze(op.non_zero(gathered(chosen, at, axis=1), "i32"), axis)
            missing = op.subtract(gathered(rounded, at), gathered(counts, at))
            copies = op.broadcast(op.constant(np.int32(0)), op.unsqueeze(missing, axis))
            tokens = op.concat([tokens, copies], 0)
            inner = activated(own.linear(gathered(x, tokens), up)[0], activation)
            share = op.unsqueeze(gathered(gathered(shares, at, axis=1), tokens), integer(-1))
            rows.append(own.linear(op.multiply(inner, share), down)[0])
        made = op.concat(rows, 0)
        ids = op.topk(
            op.convert(chosen, "f32"), op.constant(np.int32(experts.top_k)), -1, "max", "index"
        ).output(1)
        mine = op.gather_elements(places, ids, 1)  # [tokens, top_k]
        total = constant(self.tensors[f"{self.at}{down.name}.bias"])
        for k in range(experts.top_k):
            total = op.add(gathered(made, gathered(mine, integer(k), axis=1)), total)
        return total

    def _of_expert(self, expert: int, up: Linear, down: Linear, count: int) -> Tensors:
        """The tensors of one expert's two layers, without the bias that all of them share."""
        own: dict[str, NDArray[np.generic]] = {}
        for name, axes in (  # by which axis a tensor is divided; what is not named is for all
            (up.name, {"weight": 0, "scale": 0, "bias": 0}),
            (down.name, {"weight": 1, "channel_scale": 0}),
        ):
            for part in ("weight", "scale", "channel_scale", *axes):
                found = self.tensors.get(f"{self.at}{name}.{part}")
                if found is not None and part in axes:
                    found = np.split(found, count, axes[part])[expert]
                if found is not None:
                    own[f"{self.at}{name}.{part}"] = found
        return own

    def keep(self, x: Rows) -> Rows:
        """Gather the kept tokens; of attention's output, from its padded places at once."""
        if isinstance(x, Padded):
            return gathered(x.node, gathered(self.kept, integer(1)))
        return gathered(x, gathered(self.kept, integer(0)))

    def block(self, function: Callable[..., Rows], at: str, *values: object) -> Rows:
        rows = self.rows(function(replace(self, at=f"{self.at}{at}."), *values))
        self.blocks.append(rows)
        return rows

    def rows(self, x: Rows) -> Node:
        """*x* as packed rows."""
        return gathered(x.node, self._line(PLACE)) if isinstance(x, Padded) else x

    def _line(self, index: int) -> Node:
        """One line of `MicroBatch.tokens`: int32 `[tokens]`."""
        return gathered(self.tokens, integer(index))

    def _rotated(self, x: Node, spec: AttentionSpec, scale: float = 1.0) -> Node:
        """*x* `[tokens, heads * head_dim]` turned by its tokens' positions, times *scale*.

        x cos + (-right, left) sin, written exactly as the plugin looks for it to make one node of it.
        """
        if spec.rope is None:
            return x if scale == 1 else op.multiply(x, number(scale))
        cosine, sine = self._angles(spec.rope, spec.head_dim, scale)
        heads = op.reshape(x, op.constant(np.array([0, -1, 1, spec.head_dim])), True)
        halves = op.constant(np.array([spec.head_dim // 2, spec.head_dim // 2]))
        left, right = op.variadic_split(heads, integer(3), halves).outputs()
        crossed = op.concat([op.multiply(right, number(-1.0)), left], -1)
        turned = op.add(op.multiply(heads, cosine), op.multiply(crossed, sine))
        width = x.get_output_partial_shape(0)[1].get_length()
        return op.reshape(turned, op.constant(np.array([-1, width])), False)

    def _angles(self, rope: Rope, head_dim: int, scale: float) -> tuple[Node, Node]:
        """Cosines and sines of every token, times *scale*: each `[tokens, 1, 1, head_dim]`."""
        if (rope, scale) not in self.angles:  # once for all layers
            if scale == 1:
                rows = (gathered(constant(t), self._line(POSITION)) for t in rope.tables(head_dim))
                shape = op.constant(np.array([-1, 1, 1, head_dim]))
                cosine, sine = (op.reshape(op.concat([t, t], 1), shape, False) for t in rows)
            else:
                plain = self._angles(rope, head_dim, 1.0)
                cosine, sine = (op.multiply(one, number(scale)) for one in plain)
            self.angles[rope, scale] = (cosine, sine)
        return self.angles[rope, scale]

    def _places(self, spec: AttentionSpec) -> Places:
        return self.places if spec.window is None else self.near

    def _mask(self, spec: AttentionSpec) -> Node | None:
        """Which key (column) a query (row) sees: bool `[rows, columns]`; None where all.

        One comparison of a distance, which the plugin computes in one pass: only its bytes are ever
        in memory, 64 MiB at 8,192 tokens, where float32 would be four times that at each step.
        """
        if spec.sees_all:
            return None
        key = (spec.causal, spec.window)
        if key not in self.masks:
            distance = _distance(self._places(spec))
            if spec.window is None:
                seen = op.less_equal(distance, number(0))
            elif not spec.causal:
                seen = op.less_equal(op.absolute(distance), number(spec.window))
            else:  # from -window to 0
                half = number(spec.window / 2)
                seen = op.less_equal(op.absolute(op.add(distance, half)), half)
            self.masks[key] = seen
        return self.masks[key]

    def _by_distance(self, spec: AttentionSpec) -> Node | None:
        """What `attend` makes a bias of: of ALiBi the distances `[length, length]`, for all heads;
        of buckets what scores gain `[heads, length, length]`; None without a bias.
        """
        bias = spec.bias
        if bias is None:
            return None
        if (key := (bias, spec.window is None)) in self.biases:
            return self.biases[key]
        if isinstance(bias, Alibi):
            node = op.absolute(_distance(self._places(spec)))
        else:
            weight = self.tensors[f"{self.at}{bias.table.name}.weight"]
            gains = constant(bias.by_distance(weight.astype(np.float32)))
            distance = op.clamp(_distance(self._places(spec)), -bias.reach, bias.reach)
            node = gathered(gains, op.convert(op.add(distance, number(bias.reach)), "i32"), axis=1)
        self.biases[key] = node
        return node


def _distance(places: Places) -> Node:
    """How many places a key (column) stands after a query (row): float32 `[rows, columns]`."""
    rows, columns = (
        gathered(op.shape_of(one, "i32"), integer(1)) for one in (places.queries, places.keys)
    )
    one, zero = op.constant(np.int32(1)), op.constant(np.int32(0))
    first = op.divide(op.subtract(rows, columns), op.constant(np.int32(2)))
    query = op.range(zero, rows, one, "f32")
    key = op.range(first, op.add(first, columns), one, "f32")
    return op.subtract(op.unsqueeze(key, integer(0)), op.unsqueeze(query, integer(1)))


def attend(
    q: Node,
    k: Node,
    v: Node,
    *,
    spec: AttentionSpec,
    places: Places,
    mask: Node | None,
    by_distance: Node | None = None,
    bf16: bool,
) -> Node:
    """softmax(Q Kᵀ + bias) V among the tokens of each group: float32 `[groups * rows, heads * head_dim]`.

    *q* is scaled already. *by_distance* is what `GraphOps._by_distance` gives: ALiBi's distances are
    taken from scores that are divided by their head's slope, and the difference is multiplied by it.
    So one matrix serves all heads, 256 MiB at 8,192 tokens where one for each of 12 would be 3 GiB.

    With *bf16* everything between the gathers is rounded to bf16, scores and weights too; products
    and softmax add up in fp32. A text's bits are then its own only where the padded length is a
    multiple of 16, which all of `packing.LENGTH_SIZES` are.
    """

    def typed(x: Node | Output) -> Node:
        return op.convert(x, "bf16") if bf16 else x

    def split(x: Node, at: Node) -> Node:
        """*x* `[tokens, heads * head_dim]` as `[groups, heads, rows or columns, head_dim]`."""
        shape = op.constant(np.array([0, 0, -1, spec.head_dim]))
        heads = op.reshape(gathered(typed(x), at), shape, True)
        return op.transpose(heads, op.constant(BY_HEAD))

    q, k, v = split(q, places.queries), split(k, places.keys), split(v, places.keys)
    if spec.kv_heads < spec.heads:  # each as often as there are heads of queries that read it
        owners = op.constant(np.repeat(np.arange(spec.kv_heads), spec.heads // spec.kv_heads))
        k, v = (gathered(one, owners, axis=1) for one in (k, v))
    scores = op.matmul(q, k, False, True)
    if by_distance is not None and isinstance(spec.bias, Alibi):
        slopes = constant(spec.bias.slopes.reshape(-1, 1, 1))
        scores = op.multiply(op.subtract(scores, typed(by_distance)), typed(slopes))
    elif by_distance is not None:
        scores = op.add(scores, typed(by_distance))
    scores = op.add(scores, typed(places.bias))
    if mask is not None:
        scores = op.select(mask, scores, typed(number(HIDDEN_SCORE)))
    mixed = op.matmul(op.softmax(scores, -1), v, False, False)
    together = op.transpose(mixed, op.constant(BY_HEAD))
    flat = op.reshape(together, op.constant(np.array([-1, spec.size])), False)
    return op.convert(flat, "f32") if bf16 else flat


def activated(x: Node, activation: Activation) -> Node:
    if activation is Activation.SILU:
        return op.swish(x)
    return op.gelu(x, "erf" if activation is Activation.GELU else "tanh")


def _by_channel(values: NDArray[np.generic], in_image: bool) -> Output:
    """*values* `[channels]`, to be taken with each token's."""
    return constant(values.reshape(-1, 1, 1) if in_image else values)


def _image(x: Node) -> Node:
    """Rows `[tokens, channels]` as `[1, channels, tokens, 1]`."""
    width = x.get_output_partial_shape(0)[1].get_length()
    apart = op.reshape(x, op.constant(np.array([1, -1, 1, width])), False)
    return op.transpose(apart, op.constant(np.array([0, 3, 1, 2])))


def _image_rows(x: Node) -> Node:
    """`[1, channels, tokens, 1]` as rows `[tokens, channels]`."""
    width = x.get_output_partial_shape(0)[1].get_length()
    apart = op.transpose(x, op.constant(np.array([0, 2, 3, 1])))
    return op.reshape(apart, op.constant(np.array([-1, width])), False)


def _in_heads(x: Node, head_dim: int) -> Node:
    """*x* `[tokens, heads * head_dim]` as `[tokens, heads, head_dim]`."""
    return op.reshape(x, op.constant(np.array([0, -1, head_dim])), True)


def _flat(x: Node) -> Node:
    """*x* `[tokens, heads, head_dim]` as `[tokens, heads * head_dim]`."""
    heads, width = (size.get_length() for size in list(x.get_output_partial_shape(0))[1:])
    return op.reshape(x, op.constant(np.array([-1, heads * width])), False)
