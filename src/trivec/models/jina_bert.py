"""JinaBERT: a BERT whose scores of attention fall with the distance, and with a gated network.

Günther et al. 2023, arXiv:2310.19923 (jina-embeddings-v2). Its files call themselves BERT's.
"""

from collections.abc import Mapping

import msgspec

from trivec.models.config import ConfigFile, Count, Eps
from trivec.models.nomic_bert import GatedBertConfig
from trivec.models.ops import Activation, Alibi

FAMILY_NAME = "jina_bert"
PREFIXES = ("", "bert.")
UNUSED = ("pooler.*", "cls.*", "*.position_ids")
FUSED = {"mlp.gated_layers": ("mlp.gate_proj", "mlp.up_proj")}
RENAMED = (
    ("encoder.layer.", "layers."),
    (".attention.self.query.", ".self_attn.q_proj."),
    (".attention.self.key.", ".self_attn.k_proj."),
    (".attention.self.value.", ".self_attn.v_proj."),
    (".attention.output.dense.", ".self_attn.o_proj."),
    (".attention.output.LayerNorm.", ".post_attention_layernorm."),
    (".mlp.wo.", ".mlp.down_proj."),
    (".mlp.layernorm.", ".post_mlp_layernorm."),
)
STANDS_FOR = ("JinaBert",)


class _JinaBertFile(ConfigFile, frozen=True, kw_only=True):
    """`config.json`; what it leaves out has the default of the model's own code."""

    layer_norm_eps: Eps = 1e-12
    type_vocab_size: Count = 2
    feed_forward_type: str = "original"


def read_config(config: Mapping[str, object]) -> GatedBertConfig:
    """The encoder that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    found = msgspec.convert(config, _JinaBertFile)
    if found.feed_forward_type != "geglu":
        raise ValueError(f"feed_forward_type is {found.feed_forward_type!r}; understood is 'geglu'")
    return GatedBertConfig(
        **found.common(family=FAMILY_NAME),
        layer_norm_eps=found.layer_norm_eps,
        type_vocab_size=found.type_vocab_size,
        hidden_act=Activation.GELU,
        has_bias=True,
        alibi=Alibi(found.num_attention_heads, found.max_position_embeddings - 1),
    )
