"""Gemma 3, its text model: RMSNorm before and after each half-layer, most layers seeing a window.

Gemma Team 2025, arXiv:2503.19786. EmbeddingGemma (arXiv:2509.20354) sees both ways. Activations and
residuals leave the range of fp16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from trivec.models.config import ConfigFile, Count, Eps, Rows, Theta, Width
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

T = TypeVar("T")

MODEL_TYPES = ("gemma3_text",)
PREFIXES = ("", "model.")
KEY_TENSOR = "embed_tokens.weight"
UNUSED = ("lm_head.*",)

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, slots=True)
class Gemma3Config(ModelConfig):
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    layer_types: tuple[str, ...]  # of each layer: FULL or SLIDING
    window: int  # tokens that a sliding layer sees on either side
    rope_thetas: tuple[float, float]  # of full layers, of sliding ones
    is_causal: bool


class _Gemma3File(ConfigFile, frozen=True, kw_only=True):
    """`config.json`; what it leaves out has the default of transformers' own Gemma3TextConfig."""

    num_key_value_heads: Count
    head_dim: Width = 256
    rms_norm_eps: Eps = 1e-6
    layer_types: list[str] | None = None
    sliding_window_pattern: Count = 6
    sliding_window: Rows = 4096
    rope_theta: Theta = 1_000_000.0
    rope_local_base_freq: Theta = 10_000.0
    rope_scaling: Any = None
    rope_parameters: dict[str, dict[str, Any]] | None = None
    hidden_activation: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: float = 256
    attention_bias: bool = False
    attn_logit_softcapping: float | None = None
    use_bidirectional_attention: bool = False


def read_config(config: Mapping[str, object]) -> Gemma3Config:
    """The model that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    found = msgspec.convert(config, _Gemma3File)
    for name, understood in (
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("query_pre_attn_scalar", found.head_dim),
        ("attention_bias", False),
        ("attn_logit_softcapping", None),
        ("rope_scaling", None),
    ):
        if (value := getattr(found, name)) != understood:
            raise ValueError(f"{name} is {value!r}; understood is {understood!r}")
    if found.num_attention_heads % found.num_key_value_heads or found.head_dim % 2:
        raise ValueError(
            f"{found.num_attention_heads} heads of {found.head_dim} numbers do not divide among "
            f"{found.num_key_value_heads} key and value heads"
        )
    types = found.layer_types or [
        SLIDING if (i + 1) % found.sliding_window_pattern else FULL
        for i in range(found.num_hidden_layers)
    ]
    if len(types) != found.num_hidden_layers or not {*types} <= {FULL, SLIDING}:
        raise ValueError(f"layer_types is {types!r}; understood are {FULL} and {SLIDING}")
    is_causal = not found.use_bidirectional_attention
    return Gemma3Config(
        **found.common(),
        num_key_value_heads=found.num_key_value_heads,
        head_dim=found.head_dim,
        rms_norm_eps=found.rms_norm_eps,
        layer_types=tuple(types),
        # The file counts the token itself; seeing both ways, it counts both sides.
        window=found.sliding_window - 1 if is_causal else found.sliding_window // 2,
        rope_thetas=_thetas(found),
        is_causal=is_causal,
    )


def _thetas(found: _Gemma3File) -> tuple[float, float]:
    """Of full layers and of sliding ones, as transformers 4 and 5 write them."""
    given = found.rope_parameters or {}
    if any(one.get("rope_type", "default") != "default" for one in given.values()):
        raise ValueError("its rotary positions are scaled, which is not understood")
    full = given.get(FULL, {}).get("rope_theta", found.rope_theta)
    sliding = given.get(SLIDING, {}).get("rope_theta", found.rope_local_base_freq)
    return msgspec.convert(full, Theta), msgspec.convert(sliding, Theta)


def forward(ops: Ops[T], config: Gemma3Config) -> T:
    """Last hidden states `[tokens, hidden_size]` of the tokens that are kept."""
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    specs = {
        kind: AttentionSpec(
            heads,
            head_dim,
            config.num_key_value_heads,
            rope=Rope(theta, config.max_position_embeddings),
            causal=config.is_causal,
            window=window,
        )
        for kind, theta, window in zip(
            (FULL, SLIDING), config.rope_thetas, (None, config.window), strict=True
        )
    }
    eps = config.rms_norm_eps
    words = Table("embed_tokens", config.vocab_size, hidden, scale=hidden**0.5)
    x = ops.embed(words, Index.ID)
    for i, kind in enumerate(config.layer_types):
        layer, spec = f"layers.{i}", specs[kind]
        normed = ops.rms_norm(x, f"{layer}.input_layernorm", eps=eps, offset=1)
        q, k, v = ops.linear(
            normed,
            Linear(f"{layer}.self_attn.q_proj", spec.size, False),
            Linear(f"{layer}.self_attn.k_proj", spec.kv_heads * head_dim, False),
            Linear(f"{layer}.self_attn.v_proj", spec.kv_heads * head_dim, False),
        )
        q = ops.rms_norm(q, f"{layer}.self_attn.q_norm", eps=eps, width=head_dim, offset=1)
        k = ops.rms_norm(k, f"{layer}.self_attn.k_norm", eps=eps, width=head_dim, offset=1)
        attended = ops.attention(q, k, v, spec)
        if i == config.num_hidden_layers - 1:
            x, attended = ops.keep(x), ops.keep(attended)
        x = ops.block(after_attention, layer, config, x, attended)
    return ops.rms_norm(x, "norm", eps=eps, offset=1)


def after_attention(ops: Ops[T], config: Gemma3Config, x: T, attended: T) -> T:
    """The rest of a layer: both halves are normed once more before they are added."""
    hidden, inner, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
    (projected,) = ops.linear(attended, Linear("self_attn.o_proj", hidden, False))
    x = ops.add(x, ops.rms_norm(projected, "post_attention_layernorm", eps=eps, offset=1))
    normed = ops.rms_norm(x, "pre_feedforward_layernorm", eps=eps, offset=1)
    gate, up = Linear("mlp.gate_proj", inner, False), Linear("mlp.up_proj", inner, False)
    down = Linear("mlp.down_proj", hidden, False)
    outer = ops.gated_mlp(normed, gate, up, down, Activation.GELU_TANH)
    return ops.add(x, ops.rms_norm(outer, "post_feedforward_layernorm", eps=eps, offset=1))
