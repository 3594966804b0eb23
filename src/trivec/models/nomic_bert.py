"""NomicBERT: a BERT with rotary positions, LayerNorm after each half-layer.

Version 1 has gated networks (Nussbaum et al. 2024, arXiv:2402.01613); version 2 plain ones, every
second a mixture of experts (Nussbaum, Duderstadt 2025, arXiv:2502.07972). Names are transformers 5's;
files have older ones. GTE and JinaBERT are read elsewhere, and run by `forward` as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from trivec.core.types import Output
from trivec.models.config import ConfigFile, Count, Eps, Rows, Theta
from trivec.models.ops import (
    Activation,
    Alibi,
    AttentionSpec,
    Experts,
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
    ("mlp.fc1.", "mlp.up_proj."),
    ("mlp.experts.mlp.w1", "mlp.experts.up.weight"),
    ("mlp.experts.mlp.w2", "mlp.experts.down.weight"),
    ("mlp.experts.bias", "mlp.experts.down.bias"),
    (".norm1.", ".post_attention_layernorm."),
    (".norm2.", ".post_mlp_layernorm."),
)
TRANSPOSED = ("mlp.experts.down.weight",)
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
    "rope_type": "default",
    "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False,
    "rotary_emb_scale_base": None,
    "rotary_scaling_factor": None,  # its angles depend on the longest text of a batch
    "num_shared_experts": 0,
    "expert_choice_router": False,
    "moe_normalize_expert_weights": False,
    "ffn_div": 1,
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
    has_bias: bool  # in attention and in the network's last layer
    is_gated: bool = True  # then the network's first two layers have no bias
    rope: Rope | None = None
    alibi: Alibi | None = None
    num_experts: int = 0  # of every *moe_every_n_layers*th layer; 0: there are none
    moe_top_k: int = 0
    moe_every_n_layers: int = 0

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is no even multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )


class _NomicBertFile(ConfigFile, frozen=True, kw_only=True):
    """`config.json`; what it leaves out has the default of transformers' own NomicBertConfig."""

    max_position_embeddings: Rows = 2048
    layer_norm_eps: Eps = 1e-12
    type_vocab_size: Count = 2
    rope_theta: Theta = 1_000.0
    hidden_act: str = "silu"
    num_experts: int = 0
    moe_top_k: int = 1
    moe_every_n_layers: int = -1


def read_config(config: Mapping[str, object]) -> GatedBertConfig:
    """The encoder that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    named: dict[str, Any] = {SETTINGS.get(name, name): value for name, value in config.items()}
    named |= named.get("rope_parameters") or {}
    file = msgspec.convert(named, _NomicBertFile)
    if file.hidden_act not in ("silu", "swiglu", "gelu"):
        raise ValueError(f"hidden_act is {file.hidden_act!r}; understood are swiglu, silu and gelu")
    is_gated = file.hidden_act != "gelu"
    biases = dict.fromkeys(("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias"), not is_gated)
    for name, understood in (ORDINARY | biases).items():
        if (found := named.get(name)) is not None and found != understood:
            raise ValueError(f"{name} is {found!r}; understood is {understood!r}")
    num_experts = file.num_experts if file.moe_every_n_layers > 0 else 0
    if num_experts and (is_gated or not 0 < file.moe_top_k <= num_experts):
        raise ValueError(f"{num_experts} experts, {file.moe_top_k} at a time: not understood")
    return GatedBertConfig(
        **file.common(),
        layer_norm_eps=file.layer_norm_eps,
        type_vocab_size=file.type_vocab_size,
        hidden_act=Activation.SILU if is_gated else Activation.GELU,
        has_bias=not is_gated,
        is_gated=is_gated,
        num_experts=num_experts,
        moe_top_k=file.moe_top_k,
        moe_every_n_layers=file.moe_every_n_layers,
        rope=Rope(file.rope_theta, file.max_position_embeddings),
    )


def head_plan(architecture: str, _: Mapping[str, object], __: GatedBertConfig) -> HeadPlan | None:
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
        q, k, v = ops.linear(x, *(Linear(f"{layer}.{one}", hidden, config.has_bias) for one in QKV))
        attended = ops.attention(q, k, v, spec)
        if i == config.num_hidden_layers - 1:
            x, attended = ops.keep(x), ops.keep(attended)
        has_experts = config.num_experts and i % config.moe_every_n_layers == 1
        rest = after_attention_by_experts if has_experts else after_attention
        x = ops.block(rest, layer, config, x, attended)
    return x


def after_attention(ops: Ops[T], config: GatedBertConfig, x: T, attended: T) -> T:
    """The rest of a layer: projection and network, each with its residual and norm."""
    x, inner = _projected(ops, config, x, attended), config.intermediate_size
    down = Linear("mlp.down_proj", config.hidden_size, config.has_bias)
    if config.is_gated:
        gate, up = Linear("mlp.gate_proj", inner, False), Linear("mlp.up_proj", inner, False)
        outer = ops.gated_mlp(x, gate, up, down, config.hidden_act)
    else:
        outer = ops.mlp(x, Linear("mlp.up_proj", inner), down, config.hidden_act)
    return ops.layer_norm(ops.add(outer, x), "post_mlp_layernorm", eps=config.layer_norm_eps)


def after_attention_by_experts(ops: Ops[T], config: GatedBertConfig, x: T, attended: T) -> T:
    """The same with a mixture of experts for the network, with one bias for all of them."""
    x = _projected(ops, config, x, attended)
    experts = Experts("mlp.router.layer", config.num_experts, config.moe_top_k)
    up = Linear("mlp.experts.up", config.num_experts * config.intermediate_size, False)
    down = Linear("mlp.experts.down", config.hidden_size)
    outer = ops.mlp(x, up, down, config.hidden_act, experts)
    return ops.layer_norm(ops.add(outer, x), "post_mlp_layernorm", eps=config.layer_norm_eps)


def _projected(ops: Ops[T], config: GatedBertConfig, x: T, attended: T) -> T:
    o_proj = Linear("self_attn.o_proj", config.hidden_size, config.has_bias)
    added = ops.add(ops.linear(attended, o_proj)[0], x)
    return ops.layer_norm(added, "post_attention_layernorm", eps=config.layer_norm_eps)
