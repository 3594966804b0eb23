"""NomicBERT: a BERT with rotary positions and a gated network, LayerNorm after each half-layer.

Nussbaum et al. 2024, arXiv:2402.01613. Names are those of transformers 5; files have older ones. GTE and
JinaBERT are read elsewhere, and run by `forward` as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from trivec.core.types import Output
from trivec.models.config import Count, Eps, Rows, Theta, Width
from trivec.models.ops import (
    Activation,
    Alibi,
    AttentionSpec,
    Index,
    Linear,
    ModelConfig,
    Ops,
    Rope,
    Table,
)
from trivec.models.pooling import HeadPlan, LinearName, Nonlinearity, Pooling

T = TypeVar("T")

MODEL_TYPES = ("nomic_bert",)
PREFIXES = ("", "nomic_bert.", "bert.")
KEY_TENSOR = "embeddings.word_embeddings.weight"
UNUSED = ("pooler.*", "cls.*", "classifier.*", "*.inv_freq", "*.position_ids")
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FUSED = {"attn.Wqkv": QKV}
RENAMED = (
    ("encoder.layers.", "layers."),
    ("emb_ln.", "embeddings.LayerNorm."),
    (".attn.out_proj.", ".self_attn.o_proj."),
    ("mlp.fc11.", "mlp.up_proj."),
    ("mlp.fc12.", "mlp.gate_proj."),
    ("mlp.fc2.", "mlp.down_proj."),
    (".norm1.", ".post_attention_layernorm."),
    (".norm2.", ".post_mlp_layernorm."),
)
STANDS_FOR = ("NomicBert",)
# What the model's own code calls the settings of transformers.
SETTINGS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "activation_function": "hidden_act",
    "rotary_emb_base": "rope_theta",
}
# Settings of its code that change vectors, with the one value that is understood.
ORDINARY = {
    "hidden_act": "silu",
    "rope_type": "default",
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,  # its angles depend on the longest text of a batch
    "qkv_proj_bias": False,
    "mlp_fc1_bias": False,
    "mlp_fc2_bias": False,
    "num_experts": 0,
    "prenorm": False,
    "parallel_block": False,
    "use_rms_norm": False,
    "causal": False,
}


@dataclass(frozen=True, slots=True)
class GatedBertConfig(ModelConfig):
    layer_norm_eps: float
    type_vocab_size: int  # 0: the model has no token types
    hidden_act: Activation
    has_bias: bool  # in attention and in the last layer of the network; its first two have none
    rope: Rope | None = None
    alibi: Alibi | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no even multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


class _NomicBertFile(msgspec.Struct, frozen=True):
    """`config.json`; what it leaves out has the default of transformers' own NomicBertConfig."""

    model_type: str
    hidden_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Width
    vocab_size: Rows
    max_position_embeddings: Rows = 2048
    layer_norm_eps: Eps = 1e-12
    type_vocab_size: Count = 2
    pad_token_id: int | None = 0
    rope_theta: Theta = 1_000.0


def read_config(config: Mapping[str, object]) -> GatedBertConfig:
    """The encoder that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    named: dict[str, Any] = {SETTINGS.get(name, name): value for name, value in config.items()}
    named |= named.get("rope_parameters") or {}
    if named.get("hidden_act") == "swiglu":
        named["hidden_act"] = "silu"
    for name, understood in ORDINARY.items():
        if (found := named.get(name)) is not None and found != understood:
            raise ValueError(f"{name} is {found!r}; understood is {understood!r}")
    file = msgspec.convert(named, _NomicBertFile)
    return GatedBertConfig(
        family=file.model_type,
        hidden_size=file.hidden_size,
        num_hidden_layers=file.num_hidden_layers,
        num_attention_heads=file.num_attention_heads,
        intermediate_size=file.intermediate_size,
        vocab_size=file.vocab_size,
        max_position_embeddings=file.max_position_embeddings,
        position_offset=0,
        pad_token_id=file.pad_token_id or 0,
        layer_norm_eps=file.layer_norm_eps,
        type_vocab_size=file.type_vocab_size,
        hidden_act=Activation.SILU,
        has_bias=False,
        rope=Rope(file.rope_theta, file.max_position_embeddings),
    )


def head_plan(
    architecture: str, _file: Mapping[str, object], _config: GatedBertConfig
) -> HeadPlan | None:
    """The head of a class of transformers or of the model's own code; None for another class."""
    if not architecture.endswith("ForSequenceClassification"):
        return None
    score = (LinearName.of("pooler.dense", Nonlinearity.TANH), LinearName.of("classifier"))
    return HeadPlan(Output.SCORE, (Pooling.CLS,), score)


def forward(ops: Ops[T], config: GatedBertConfig) -> T:
    """Last hidden states `[tokens, hidden_size]` of the tokens that are kept."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    spec = AttentionSpec(heads, hidden // heads, heads, rope=config.rope, bias=config.alibi)
    x = ops.embed(Table("embeddings.word_embeddings", config.vocab_size, hidden), Index.ID)
    if config.type_vocab_size:
        types = Table("embeddings.token_type_embeddings", config.type_vocab_size, hidden)
        x = ops.add(x, ops.embed(types, Index.TYPE))
    x = ops.layer_norm(x, "embeddings.LayerNorm", eps=config.layer_norm_eps)
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        parts = (Linear(f"{layer}.{name}", hidden, config.has_bias) for name in QKV)
        q, k, v = ops.linear(x, *parts)
        attended = ops.attention(q, k, v, spec)
        if i == config.num_hidden_layers - 1:
            x, attended = ops.keep(x), ops.keep(attended)
        x = ops.block(after_attention, layer, config, x, attended)
    return x


def after_attention(ops: Ops[T], config: GatedBertConfig, x: T, attended: T) -> T:
    """The rest of a layer: projection and gated network, each with its residual and norm."""
    hidden, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
    (projected,) = ops.linear(attended, Linear("self_attn.o_proj", hidden, config.has_bias))
    x = ops.layer_norm(ops.add(projected, x), "post_attention_layernorm", eps=eps)
    gate, up = Linear("mlp.gate_proj", inner, False), Linear("mlp.up_proj", inner, False)
    down = Linear("mlp.down_proj", hidden, config.has_bias)
    outer = ops.gated_mlp(x, gate, up, down, config.hidden_act)
    return ops.layer_norm(ops.add(outer, x), "post_mlp_layernorm", eps=eps)
