"""Ops on torch: `models.ops.Ops` computed at once on packed tokens, and the weights that they read.

Every op but attention works row by row, so nothing is padded. Sums and norms are computed in fp32
whatever the matrices' type: residuals of XLM-R leave the range of fp16.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trivec.backends.torch.attention import REFERENCE, Attention, plan_grouped
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.types import Batch, Int32Array
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

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ACTIVATIONS = {
    Activation.GELU: functional.gelu,  # the exact one, by erf
    Activation.GELU_TANH: partial(functional.gelu, approximate="tanh"),
    Activation.SILU: functional.silu,
}

Weights: TypeAlias = Mapping[str, Tensor]
Block: TypeAlias = Callable[..., Tensor]
RunBlock: TypeAlias = Callable[..., Tensor]  # called as `run_block` is


@dataclass(frozen=True, slots=True)
class BatchShape:
    """How many tokens and sequences a packed batch has, filler included."""

    token_count: int
    sequence_count: int


def pack(
    batch: Batch, *, position_offset: int, shape: BatchShape | None = None
) -> tuple[Int32Array, tuple[int, ...]]:
    """The buffer that `PackedBatch.view` reads, on the host, and the lengths `[sequences]`.

    It is filled up to *shape* where one is given: the filler tokens are a sequence of their own
    after the real ones, so that no real token attends to them.
    """
    tokens, sequences = batch.token_count, len(batch)
    shape = BatchShape(tokens, sequences) if shape is None else shape
    filler = shape.token_count - tokens
    assert filler >= 0
    assert shape.sequence_count >= sequences + (filler > 0), "filler is a sequence of its own"

    cu_seqlens = np.full(shape.sequence_count + 1, shape.token_count, np.int32)
    cu_seqlens[: sequences + 1] = batch.cu_seqlens
    lengths = np.diff(cu_seqlens)
    buffer = np.zeros(4 * shape.token_count + len(cu_seqlens), np.int32)
    token_ids, positions, token_types, owners = buffer[: -len(cu_seqlens)].reshape(4, -1)
    token_ids[:tokens] = batch.token_ids
    owners[:] = np.repeat(np.arange(shape.sequence_count), lengths)
    positions[:tokens] = position_offset + np.arange(tokens) - cu_seqlens[owners[:tokens]]
    if batch.token_types is not None:
        token_types[:tokens] = batch.token_types
    buffer[-len(cu_seqlens) :] = cu_seqlens
    return buffer, tuple(lengths.tolist())


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A batch on the device, sequences end to end: views of one buffer, which one copy fills."""

    token_ids: Tensor  # int32 [tokens]
    positions: Tensor  # int32 [tokens]
    token_types: Tensor  # int32 [tokens]
    sequence_ids: Tensor  # int32 [tokens]: the sequence a token is of
    cu_seqlens: Tensor  # int32 [sequences + 1]
    lengths: tuple[int, ...]  # [sequences]
    seen_lengths: tuple[int, ...] = ()  # leading tokens that others attend to; none: all of them

    @classmethod
    def view(
        cls, buffer: Tensor, lengths: tuple[int, ...], seen_lengths: tuple[int, ...] = ()
    ) -> "PackedBatch":
        """*buffer*: int32 `[4 * tokens + sequences + 1]`, the fields end to end."""
        rows = buffer[: -len(lengths) - 1].view(4, -1)
        cu_seqlens = buffer[-len(lengths) - 1 :]
        token_ids, positions, token_types, sequence_ids = rows.unbind()
        lines = (token_ids, positions, token_types, sequence_ids, cu_seqlens)
        return cls(*lines, lengths, seen_lengths)


class BlockOps:
    """The ops that work on each row alone, which is all that a block may use.

    *weights* holds matrices and tables in *dtype*, norms in fp32. Layers that share an input are
    stacked into one product under the name of the first.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype) -> None:
        self._weights = weights
        self._dtype = dtype

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x.float() + y

    def layer_norm(self, x: Tensor, name: str, *, eps: float, bias: bool = True) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        added = self._weights[f"{name}.bias"] if bias else None
        return functional.layer_norm(x.float(), weight.shape, weight, added, eps).to(self._dtype)

    def rms_norm(
        self, x: Tensor, name: str, *, eps: float, width: int | None = None, offset: float = 0.0
    ) -> Tensor:
        weight = self._weights[f"{name}.weight"]
        weight = weight + offset if offset else weight
        rows = x.float() if width is None else x.float().unflatten(-1, (-1, width))
        normed = functional.rms_norm(rows, weight.shape, weight, eps)
        return normed.reshape(x.shape).to(self._dtype)

    def linear(self, x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
        first = layers[0].name
        bias = self._weights.get(f"{first}.bias")
        rows = functional.linear(x, self._weights[f"{first}.weight"], bias)
        return tuple(torch.split(rows, [layer.out for layer in layers], dim=-1))

    def mlp(
        self,
        x: Tensor,
        up: Linear,
        down: Linear,
        activation: Activation,
        experts: Experts | None = None,
    ) -> Tensor:
        """With *experts* all are computed: which ones a token goes through no graph can capture."""
        inner = ACTIVATIONS[activation](self.linear(x, up)[0])
        if experts is not None:
            logits = functional.linear(x.float(), self._weights[f"{experts.router}.weight"].float())
            weights = torch.softmax(logits, -1)
            least = weights.topk(experts.top_k, -1).values[:, -1:]
            weights = torch.where(weights >= least, weights, 0).to(inner.dtype)
            inner = (inner.unflatten(-1, (experts.num_experts, -1)) * weights[..., None]).flatten(
                -2
            )
        return self.linear(inner, down)[0]

    def gated_mlp(
        self, x: Tensor, gate: Linear, up: Linear, down: Linear, activation: Activation
    ) -> Tensor:
        gates, inner = self.linear(x, gate, up)
        return self.linear(ACTIVATIONS[activation](gates) * inner, down)[0]

    def keep(self, x: Tensor) -> Tensor:
        return x


def run_block(function: Block, weights: Weights, dtype: torch.dtype, *values: object) -> Tensor:
    """Run *function* as it is: rows to rows, without attention, so `torch.compile` may fuse it."""
    return function(BlockOps(weights, dtype), *values)


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model's weights on a device, and how its attention and its blocks are run."""

    config: ModelConfig
    dtype: torch.dtype  # of matrices and tables
    weights: Weights  # by whole name
    blocks: Mapping[str, Weights]  # by block, then by the name within it
    rope: Mapping[Rope, list[Tensor]]  # fp32 cosines and sines by position
    biases: Mapping[Alibi | Buckets, Tensor]  # fp32 [heads, 2 * reach + 1], by distance
    attention: Attention = REFERENCE
    run_block: RunBlock = run_block

    def __call__(self, packed: PackedBatch) -> Tensor:
        """Last hidden states: `[tokens, hidden]`, in the encoder's type."""
        return registry.forward(PackedOps(self, packed), self.config)


class PackedOps(BlockOps):
    """All ops, over one batch."""

    def __init__(self, encoder: Encoder, packed: PackedBatch) -> None:
        super().__init__(encoder.weights, encoder.dtype)
        self._encoder = encoder
        if packed.seen_lengths:
            self._attend = plan_grouped(packed.cu_seqlens, packed.lengths, packed.seen_lengths)
        else:
            self._attend = encoder.attention.plan(packed.cu_seqlens, packed.lengths)
        self._indices = {
            Index.ID: packed.token_ids,
            Index.TYPE: packed.token_types,
            Index.POSITION: packed.positions,
        }
        positions = packed.positions.long()
        self._rope = {  # each [tokens, 1, head_dim / 2]
            rope: [table[positions, None] for table in tables]
            for rope, tables in encoder.rope.items()
        }

    def embed(self, table: Table, index: Index) -> Tensor:
        rows = functional.embedding(self._indices[index], self._weights[f"{table.name}.weight"])
        return rows if table.scale == 1 else rows.float() * table.scale

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        q, k, v = (one.unflatten(-1, (-1, spec.head_dim)) for one in (q, k, v))
        if spec.rope is not None:
            cosine, sine = self._rope[spec.rope]
            q, k = (_rotate(one, cosine, sine) for one in (q, k))
        bias = None if spec.bias is None else self._encoder.biases[spec.bias]
        return self._attend(q, k, v, spec, bias).flatten(1)

    def block(self, function: Block, at: str, *values: object) -> Tensor:
        encoder = self._encoder
        return encoder.run_block(function, encoder.blocks[at], encoder.dtype, *values)


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """*x* `[tokens, heads, head_dim]` turned, in fp32, by *cosine* and *sine* `[tokens, 1, half]`."""
    left, right = x.float().chunk(2, dim=-1)
    turned = torch.cat([left * cosine - right * sine, right * cosine + left * sine], dim=-1)
    return turned.to(x.dtype)


def load_encoder(checkpoint: Checkpoint, *, device: torch.device, dtype: torch.dtype) -> Encoder:
    """The encoder of *checkpoint* with plain attention and blocks.

    Matrices and tables get *dtype*; norms stay in fp32. Raises `CheckpointRefused` unless every
    tensor of the checkpoint has its use.
    """
    plan = registry.plan_of(checkpoint.config)
    loaded: dict[str, Tensor] = {}
    # `torch.tensor` copies: the files' own memory is only lent, and may be read-only.
    with checkpoint.weights() as weights:
        for names in (group.names for group in plan.linears):
            for part in ("weight", "bias"):
                if f"{names[0]}.{part}" in plan.shapes:
                    stacked = np.concatenate([weights.take(f"{name}.{part}") for name in names])
                    loaded[f"{names[0]}.{part}"] = torch.tensor(stacked, dtype=dtype, device=device)
        linear = {name for group in plan.linears for name in group.names}
        for name, shape in plan.shapes.items():
            if name.rpartition(".")[0] not in linear:
                own_dtype = dtype if len(shape) == 2 else torch.float32
                loaded[name] = torch.tensor(weights.take(name), dtype=own_dtype, device=device)
        weights.finish()
    blocks = {
        at: {
            name.removeprefix(f"{at}."): tensor
            for name, tensor in loaded.items()
            if name.startswith(f"{at}.")
        }
        for at in plan.blocks
    }
    rope = {
        spec.rope: [torch.tensor(table, device=device) for table in spec.rope.tables(spec.head_dim)]
        for spec in dict.fromkeys(plan.attention)
        if spec.rope is not None
    }
    biases: dict[Alibi | Buckets, Tensor] = {}
    for bias in {spec.bias for spec in plan.attention if spec.bias is not None}:
        if isinstance(bias, Buckets):
            table = loaded[f"{bias.table.name}.weight"].float().cpu().numpy()
            biases[bias] = torch.tensor(bias.by_distance(table), device=device)
        else:
            biases[bias] = torch.tensor(bias.by_distance(), device=device)
    return Encoder(checkpoint.config, dtype, loaded, blocks, rope, biases)
