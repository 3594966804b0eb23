"""GTE: a BERT with rotary positions and a gated network, as NomicBERT but for biases and names.

mGTE: Zhang et al. 2024, arXiv:2407.19669. Also Snowflake Arctic Embed M v2.0 and Stella 400M v5.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from trivec.models.config import ConfigFile, Eps, Theta
from trivec.models.nomic_bert import QKV, GatedBertConfig
from trivec.models.ops import Activation, Rope

MODEL_TYPES = ("new", "gte")
PREFIXES = ("", "new.", "gte.")
UNUSED = ("pooler.*", "classifier.*", "lm_head.*", "*.inv_freq", "*.position_ids")
FUSED = {"attention.qkv_proj": QKV, "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj")}
RENAMED = (
    ("encoder.layer.", "layers."),
    (".attention.o_proj.", ".self_attn.o_proj."),
    (".attn_ln.", ".post_attention_layernorm."),
    (".mlp_ln.", ".post_mlp_layernorm."),
)
STANDS_FOR = ("New", "Gte")


class _GteFile(ConfigFile, frozen=True, kw_only=True):
    """`config.json`; what it leaves out has the default of the model's own code."""

    layer_norm_eps: Eps = 1e-12
    type_vocab_size: int = 0
    rope_theta: Theta = 10_000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None  # transformers 5
    hidden_act: str = "gelu"
    layer_norm_type: str = "layer_norm"
    position_embedding_type: str = "rope"
    logn_attention_scale: bool = False


def read_config(config: Mapping[str, object]) -> GatedBertConfig:
    """The encoder that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    found = msgspec.convert(config, _GteFile)
    for name, understood in (
        ("hidden_act", "gelu"),
        ("layer_norm_type", "layer_norm"),
        ("position_embedding_type", "rope"),
        ("logn_attention_scale", False),
    ):
        if (value := getattr(found, name)) != understood:
            raise ValueError(f"{name} is {value!r}; understood is {understood!r}")
    return GatedBertConfig(
        **found.common(),
        layer_norm_eps=found.layer_norm_eps,
        type_vocab_size=found.type_vocab_size,
        hidden_act=Activation.GELU,
        has_bias=True,
        rope=_rope(found),
    )


def _rope(found: _GteFile) -> Rope:
    """Angles as they are, or NTK-scaled by a fixed factor (https://kexue.fm/archives/9706, eq. 6):
    the base grows by the factor, and every frequency is divided by factor^(2 / head_dim).
    """
    scaling = found.rope_parameters or found.rope_scaling or {}
    theta = msgspec.convert(scaling.get("rope_theta", found.rope_theta), Theta)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    positions = found.max_position_embeddings
    if kind == "default":
        return Rope(theta, positions)
    if kind != "ntk" or scaling.get("mixed_b") is not None:
        raise ValueError(f"its rotary positions are scaled by {scaling}, which is not understood")
    factor = msgspec.convert(scaling.get("factor"), float)
    head_dim = found.hidden_size // found.num_attention_heads
    return Rope(theta * factor, positions, divisor=factor ** (2 / head_dim))
