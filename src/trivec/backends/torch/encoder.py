"""A model on torch: `models.ops.Ops` that compute at once, on packed tokens.

Everything but attention is row by row, so there is no padding. Sums and norms are computed in fp32
whatever the matrices' type: residuals of XLM-R leave the range of fp16.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from trivec.backends.torch.attention import Attend, Attention, Spans
from trivec.models import registry
from trivec.models.ops import Activation, AttentionSpec, Index, Linear, ModelConfig, Rope, Table

Weights = Mapping[str, torch.Tensor]
Block = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch on the device: sequences end to end."""

    token_ids: torch.Tensor  # int32 [tokens]
    positions: torch.Tensor  # int32 [tokens]
    token_types: torch.Tensor  # int32 [tokens]
    owners: torch.Tensor  # int32 [tokens]: the sequence a token is of
    spans: Spans


RunBlock = Callable[..., torch.Tensor]
"""Runs a block: (function, its weights by relative name, its values) to rows."""


def run_block(function: Block, weights: Weights, *values: object) -> torch.Tensor:
    """What `torch.compile` may fuse: rows to rows, without attention."""
    return function(BlockOps(weights), *values)


class BlockOps:
    """The ops that work on each row alone; all that a block may use.

    *weights* holds matrices and tables in the encoder's type, norms in fp32. Layers that share an
    input are stacked into one product under the name of the first.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.float() + y

    def layer_norm(
        self, x: torch.Tensor, name: str, *, eps: float, bias: bool = True
    ) -> torch.Tensor:
        """In fp32, handed back in the type of the matrices."""
        weight = self._weights[f"{name}.weight"]
        added = self._weights[f"{name}.bias"] if bias else None
        normed = functional.layer_norm(x.float(), weight.shape, weight, added, eps)
        return normed.to(self._weights[TYPE].dtype)

    def rms_norm(
        self, x: torch.Tensor, name: str, *, eps: float, width: int | None = None
    ) -> torch.Tensor:
        """In fp32, handed back in the type of the matrices."""
        weight = self._weights[f"{name}.weight"]
        rows = x.float() if width is None else x.float().unflatten(-1, (-1, width))
        normed = functional.rms_norm(rows, weight.shape, weight, eps)
        return normed.reshape(x.shape).to(self._weights[TYPE].dtype)

    def linear(self, x: torch.Tensor, *layers: Linear) -> tuple[torch.Tensor, ...]:
        first = layers[0].name
        bias = self._weights.get(f"{first}.bias")
        rows = functional.linear(x, self._weights[f"{first}.weight"], bias)
        return tuple(torch.split(rows, [layer.out for layer in layers], dim=-1))

    def mlp(
        self, x: torch.Tensor, up: Linear, down: Linear, activation: Activation
    ) -> torch.Tensor:
        (inner,) = self.linear(x, up)
        return self.linear(ACTIVATIONS[activation](inner), down)[0]

    def gated_mlp(
        self, x: torch.Tensor, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> torch.Tensor:
        gates, inner = self.linear(x, gate, up)
        return self.linear(ACTIVATIONS[activation](gates) * inner, down)[0]

    def keep(self, x: torch.Tensor) -> torch.Tensor:
        return x


ACTIVATIONS = {
    Activation.GELU: functional.gelu,  # the exact one, by erf
    Activation.SILU: functional.silu,
}

TYPE = "dtype"
"""Among a block's weights: an empty tensor of the encoder's type."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model's weights on a device."""

    config: ModelConfig
    weights: Weights  # by whole name
    blocks: Mapping[str, Weights]  # by block, then by the name within it

    rope: Mapping[Rope, tuple[torch.Tensor, torch.Tensor]]  # cosines and sines by position

    @property
    def attention(self) -> tuple[AttentionSpec, ...]:
        """Each kind of attention among its layers, once."""
        return tuple(dict.fromkeys(registry.plan_of(self.config).attention))

    @property
    def like(self) -> torch.Tensor:
        """An empty tensor of the encoder's type on its device."""
        return self.weights[TYPE]

    def __call__(
        self, packed: Packed, attention: Attention, run: RunBlock = run_block
    ) -> torch.Tensor:
        """Last hidden states: `[tokens, hidden]`, in the type of the weights."""
        return registry.forward(
            PackedOps(self, packed, attention.over(packed.spans), run), self.config
        )


class PackedOps(BlockOps):
    """All ops over one batch."""

    def __init__(self, encoder: Encoder, packed: Packed, attend: Attend, run: RunBlock) -> None:
        super().__init__(encoder.weights)
        self._blocks = encoder.blocks
        self._rope = encoder.rope
        self._attend = attend
        self._run = run
        self._lines = {
            Index.ID: packed.token_ids,
            Index.TYPE: packed.token_types,
            Index.POSITION: packed.positions,
        }

    def embed(self, table: Table, index: Index) -> torch.Tensor:
        return functional.embedding(self._lines[index], self._weights[f"{table.name}.weight"])

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec
    ) -> torch.Tensor:
        q, k, v = (one.unflatten(-1, (-1, spec.head_dim)) for one in (q, k, v))
        if spec.rope is not None:
            places = self._lines[Index.POSITION].long()
            cosine, sine = (table[places, None] for table in self._rope[spec.rope])
            q, k = (rotated(one, cosine, sine) for one in (q, k))
        return self._attend(q, k, v, spec).flatten(1)

    def block(self, function: Block, at: str, *values: object) -> torch.Tensor:
        return self._run(function, self._blocks[at], *values)


def rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """*x* `[tokens, heads, head_dim]` turned, in fp32, by *cosine* and *sine* `[tokens, 1, half]`."""
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)
    return turned.to(x.dtype)
