"""DistilBERT: a BERT of fewer layers, without token types and under names of its own.

Sanh et al. 2019, arXiv:1910.01108.
"""

from collections.abc import Mapping

import msgspec

from trivec.core.types import Output
from trivec.models.bert import KEY_TENSOR, BertConfig
from trivec.models.config import Count, Rows, Width
from trivec.models.pooling import HeadPlan, LinearName, Nonlinearity, NormName, Pooling

MODEL_TYPES = ("distilbert",)
PREFIXES = ("", "distilbert.")
LAYER_NORM_EPS = 1e-12  # of every model; no config says it
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
        layer_norm_eps=LAYER_NORM_EPS,
        type_vocab_size=0,
    )


def head_plan(architecture: str, file: Mapping[str, object], _: BertConfig) -> HeadPlan | None:
    """The head of a class of transformers, whose `config.json` is *file*; None for another class."""
    if architecture.endswith("ForSequenceClassification"):
        score = (LinearName.of("pre_classifier", Nonlinearity.RELU), LinearName.of("classifier"))
        return HeadPlan(Output.SCORE, (Pooling.CLS,), score)
    if not architecture.endswith("ForMaskedLM"):
        return None
    is_tied = file.get("tie_word_embeddings") is not False
    norm = NormName("vocab_layer_norm.weight", "vocab_layer_norm.bias", LAYER_NORM_EPS)
    words = KEY_TENSOR if is_tied else "vocab_projector.weight"
    layers = (
        LinearName.of("vocab_transform", Nonlinearity.GELU),
        norm,
        LinearName(words, "vocab_projector.bias"),
    )
    return HeadPlan(Output.SPARSE, (), layers)
