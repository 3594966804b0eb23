"""The encoder of the BERT family on packed tokens, as the papers draw it.

Embeddings, then layers of self-attention and a feed-forward half, each followed by its LayerNorm
(Devlin et al. 2018, arXiv:1810.04805; Liu et al. 2019, arXiv:1907.11692). Everything but attention
is row by row, so there is no padding. Sums, LayerNorm and embeddings are computed in fp32 whatever
the matrices' type: residuals of XLM-R leave the range of fp16.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from trivec.backends.torch.attention import Attend, Attention, Spans


@dataclass(frozen=True, slots=True)
class Packed:
    """A batch on the device: sequences end to end."""

    token_ids: torch.Tensor  # int32 [tokens]
    positions: torch.Tensor  # int32 [tokens]
    token_types: torch.Tensor  # int32 [tokens]
    owners: torch.Tensor  # int32 [tokens]: the sequence a token is of
    spans: Spans


@dataclass(frozen=True, slots=True)
class Linear:
    weight: torch.Tensor  # [out, in]
    bias: torch.Tensor  # [out]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return functional.linear(rows, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    """LayerNorm of a sum, in fp32, handed back in the type of its first term."""

    weight: torch.Tensor  # fp32 [hidden]
    bias: torch.Tensor  # fp32 [hidden]
    eps: float

    def __call__(self, rows: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        total = rows.float() + more
        size = self.weight.shape
        return functional.layer_norm(total, size, self.weight, self.bias, self.eps).to(rows.dtype)


@dataclass(frozen=True, slots=True)
class Embeddings:
    words: torch.Tensor  # [vocabulary, hidden]
    positions: torch.Tensor  # [positions, hidden]
    token_types: torch.Tensor  # [token types, hidden]
    norm: Norm

    def __call__(self, packed: Packed) -> torch.Tensor:
        words = functional.embedding(packed.token_ids, self.words)
        places = functional.embedding(packed.positions, self.positions).float()
        return self.norm(words, places + functional.embedding(packed.token_types, self.token_types))


@dataclass(frozen=True, slots=True)
class Layer:
    qkv: Linear  # queries, keys and values in one product: [3 * hidden, hidden]
    attention_output: Linear
    attention_norm: Norm
    inner: Linear
    output: Linear
    output_norm: Norm


AfterAttention = Callable[[Layer, torch.Tensor, torch.Tensor], torch.Tensor]


def after_attention(layer: Layer, rows: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """All of a layer that follows attention; what `torch.compile` may fuse. `[tokens, hidden]`."""
    rows = layer.attention_norm(rows, layer.attention_output(attended))
    inner = functional.gelu(layer.inner(rows))  # the exact one, by erf
    return layer.output_norm(rows, layer.output(inner))


@dataclass(frozen=True, slots=True)
class Encoder:
    embeddings: Embeddings
    layers: tuple[Layer, ...]
    head_count: int

    def __call__(
        self, packed: Packed, attention: Attention, after: AfterAttention = after_attention
    ) -> torch.Tensor:
        """Last hidden states: `[tokens, hidden]`, in the type of the weights."""
        attend = attention.over(packed.spans)
        rows = self.embeddings(packed)
        for layer in self.layers:
            rows = after(layer, rows, self._self_attention(layer, rows, attend))
        return rows

    def _self_attention(self, layer: Layer, rows: torch.Tensor, attend: Attend) -> torch.Tensor:
        tokens, hidden = rows.shape
        qkv = layer.qkv(rows).view(tokens, 3, self.head_count, hidden // self.head_count)
        return attend(qkv).reshape(tokens, hidden)
