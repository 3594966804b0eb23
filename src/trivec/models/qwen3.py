"""Qwen3: a causal decoder with grouped queries, RMSNorm before each half-layer and rotary positions.

Qwen3 Embedding, arXiv:2506.05176; its body is Qwen3's, arXiv:2505.09388.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from trivec.core.types import Output
from trivec.models.config import ConfigFile, Count, Eps, Theta, Width
from trivec.models.ops import (
    Activation,
    AttentionSpec,
    Index,
    Linear,
    ModelConfig,
    Ops,
    Rope,
    Table,
)
from trivec.models.pooling import HeadPlan, LinearName, Pooling

T = TypeVar("T")

MODEL_TYPES = ("qwen3",)
PREFIXES = ("", "model.")
KEY_TENSOR = "embed_tokens.weight"
UNUSED = ("lm_head.*",)
STANDS_FOR = ("VoyageQwen3",)


@dataclass(frozen=True, slots=True)
class Qwen3Config(ModelConfig):
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    attention_bias: bool
    is_causal: bool


class _Qwen3File(ConfigFile, frozen=True, kw_only=True):
    """`config.json`; what it leaves out has the default of transformers' own Qwen3Config."""

    num_key_value_heads: Count
    head_dim: Width = 128
    rms_norm_eps: Eps = 1e-6
    rope_theta: Theta = 10_000.0
    rope_scaling: Any = None
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    use_bidirectional_attention: bool = False


def read_config(config: Mapping[str, object]) -> Qwen3Config:
    """The decoder that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    found = msgspec.convert(config, _Qwen3File)
    rope = found.rope_parameters or {"rope_theta": found.rope_theta}
    if found.hidden_act != "silu":
        raise ValueError(f"hidden_act is {found.hidden_act!r}; understood is 'silu'")
    if found.rope_scaling is not None or rope.get("rope_type", "default") != "default":
        raise ValueError("its rotary positions are scaled, which is not understood")
    if found.use_sliding_window:
        raise ValueError("use_sliding_window is set, which is not understood")
    if found.num_attention_heads % found.num_key_value_heads or found.head_dim % 2:
        raise ValueError(
            f"{found.num_attention_heads} heads of {found.head_dim} numbers do not divide among "
            f"{found.num_key_value_heads} key and value heads"
        )
    return Qwen3Config(
        **found.common(),
        num_key_value_heads=found.num_key_value_heads,
        head_dim=found.head_dim,
        rms_norm_eps=found.rms_norm_eps,
        rope_theta=msgspec.convert(rope.get("rope_theta", found.rope_theta), Theta),
        attention_bias=found.attention_bias,
        is_causal=not found.use_bidirectional_attention,
    )


def head_plan(
    architecture: str, file: Mapping[str, object], config: Qwen3Config
) -> HeadPlan | None:
    """The head of a class of transformers, or Voyage's projection; None for another class."""
    if not config.is_causal and file.get("num_labels"):
        return HeadPlan(Output.DENSE, (), (LinearName("linear.weight", None),))
    if not architecture.endswith("ForSequenceClassification"):
        return None
    return HeadPlan(Output.SCORE, (Pooling.LAST,), (LinearName("score.weight", None),))


def forward(ops: Ops[T], config: Qwen3Config) -> T:
    """Last hidden states `[tokens, hidden_size]` of the tokens that are kept."""
    head_dim, eps, bias = config.head_dim, config.rms_norm_eps, config.attention_bias
    spec = AttentionSpec(
        config.num_attention_heads,
        head_dim,
        config.num_key_value_heads,
        rope=Rope(config.rope_theta, config.max_position_embeddings),
        causal=config.is_causal,
    )
    x = ops.embed(Table("embed_tokens", config.vocab_size, config.hidden_size), Index.ID)
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        normed = ops.rms_norm(x, f"{layer}.input_layernorm", eps=eps)
        q, k, v = ops.linear(
            normed,
            Linear(f"{layer}.self_attn.q_proj", spec.size, bias),
            Linear(f"{layer}.self_attn.k_proj", spec.kv_heads * head_dim, bias),
            Linear(f"{layer}.self_attn.v_proj", spec.kv_heads * head_dim, bias),
        )
        q = ops.rms_norm(q, f"{layer}.self_attn.q_norm", eps=eps, width=head_dim)
        k = ops.rms_norm(k, f"{layer}.self_attn.k_norm", eps=eps, width=head_dim)
        attended = ops.attention(q, k, v, spec)
        if i == config.num_hidden_layers - 1:
            x, attended = ops.keep(x), ops.keep(attended)
        x = ops.block(after_attention, layer, config, x, attended)
    return ops.rms_norm(x, "norm", eps=eps)


def after_attention(ops: Ops[T], config: Qwen3Config, x: T, attended: T) -> T:
    """The rest of a layer: projection and feed-forward network, each added to the residual."""
    hidden, inner = config.hidden_size, config.intermediate_size
    o_proj = Linear("self_attn.o_proj", hidden, config.attention_bias)
    x = ops.add(x, ops.linear(attended, o_proj)[0])
    normed = ops.rms_norm(x, "post_attention_layernorm", eps=config.rms_norm_eps)
    gate, up = Linear("mlp.gate_proj", inner, False), Linear("mlp.up_proj", inner, False)
    down = Linear("mlp.down_proj", hidden, False)
    return ops.add(x, ops.gated_mlp(normed, gate, up, down, Activation.SILU))
