"""MPNet: a BERT without token types, whose scores of attention gain a learned number by distance.

Song et al. 2020, arXiv:2004.09297.
"""

from collections.abc import Mapping

import msgspec

from trivec.models.bert import BertConfig
from trivec.models.config import ConfigFile, Count, Eps

MODEL_TYPES = ("mpnet",)
PREFIXES = ("", "mpnet.")
UNUSED = ("pooler.*", "lm_head.*", "*.position_ids")
RENAMED = (
    ("attention.attn.q.", "attention.self.query."),
    ("attention.attn.k.", "attention.self.key."),
    ("attention.attn.v.", "attention.self.value."),
    ("attention.attn.o.", "attention.output.dense."),
    ("attention.LayerNorm.", "attention.output.LayerNorm."),
)
PAD_TOKEN_ID = 1  # whatever the config says; positions begin after it


class _MPNetFile(ConfigFile, frozen=True, kw_only=True):
    """`config.json`; what it leaves out has the default of transformers' own MPNetConfig."""

    layer_norm_eps: Eps = 1e-12
    relative_attention_num_buckets: Count = 32
    hidden_act: str = "gelu"


def read_config(config: Mapping[str, object]) -> BertConfig:
    """The encoder that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    found = msgspec.convert(config, _MPNetFile)
    if found.hidden_act != "gelu":
        raise ValueError(f"hidden_act is {found.hidden_act!r}; understood is 'gelu'")
    if found.relative_attention_num_buckets != 32:  # transformers' own code counts no other
        raise ValueError(
            f"relative_attention_num_buckets is {found.relative_attention_num_buckets}; "
            "understood is 32"
        )
    if found.hidden_size % found.num_attention_heads:
        raise ValueError(
            f"hidden_size {found.hidden_size} is no multiple of num_attention_heads "
            f"{found.num_attention_heads}"
        )
    return BertConfig(
        **found.common(position_offset=PAD_TOKEN_ID + 1, pad_token_id=PAD_TOKEN_ID),
        layer_norm_eps=found.layer_norm_eps,
        type_vocab_size=0,
        relative_attention_num_buckets=found.relative_attention_num_buckets,
    )
