"""DistilBERT: a BERT of fewer layers, without token types and under names of its own.

Sanh et al. 2019, arXiv:1910.01108.
"""

from collections.abc import Mapping

import msgspec

from trivec.models.bert import BertConfig
from trivec.models.config import Count, Rows, Width

MODEL_TYPES = ("distilbert",)
PREFIXES = ("", "distilbert.")
UNUSED = ("vocab_*", "pre_classifier.*", "classifier.*", "*.position_ids")
RENAMED = (
    ("transformer.layer.", "encoder.layer."),
    ("attention.q_lin.", "attention.self.query."),
    ("attention.k_lin.", "attention.self.key."),
    ("attention.v_lin.", "attention.self.value."),
    ("attention.out_lin.", "attention.output.dense."),
    ("sa_layer_norm.", "attention.output.LayerNorm."),
    ("ffn.lin1.", "intermediate.dense."),
    ("ffn.lin2.", "output.dense."),
    ("output_layer_norm.", "output.LayerNorm."),
)


class _DistilBertFile(msgspec.Struct, frozen=True):
    """`config.json`; what it leaves out has the default of transformers' own DistilBertConfig."""

    model_type: str
    vocab_size: Rows
    dim: Width = 768
    n_layers: Count = 6
    n_heads: Count = 12
    hidden_dim: Width = 3072
    max_position_embeddings: Rows = 512
    activation: str = "gelu"
    pad_token_id: int | None = 0


def read_config(config: Mapping[str, object]) -> BertConfig:
    """The encoder that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    found = msgspec.convert(config, _DistilBertFile)
    if found.activation != "gelu":
        raise ValueError(f"activation is {found.activation!r}; understood is 'gelu'")
    if found.dim % found.n_heads:
        raise ValueError(f"dim {found.dim} is no multiple of n_heads {found.n_heads}")
    return BertConfig(
        family=found.model_type,
        hidden_size=found.dim,
        num_hidden_layers=found.n_layers,
        num_attention_heads=found.n_heads,
        intermediate_size=found.hidden_dim,
        vocab_size=found.vocab_size,
        max_position_embeddings=found.max_position_embeddings,
        position_offset=0,
        pad_token_id=found.pad_token_id or 0,
        layer_norm_eps=1e-12,
        type_vocab_size=0,
    )
