"""BERT and its kin: encoders with learned positions and LayerNorm after each half-layer.

Devlin et al. 2018, arXiv:1810.04805; RoBERTa: Liu et al. 2019, arXiv:1907.11692; XLM-RoBERTa:
Conneau et al. 2020, arXiv:1911.02116; CamemBERT: Martin et al. 2020, arXiv:1911.03894. They differ in
where positions begin. DistilBERT and MPNet are read elsewhere, and run by `forward` as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from trivec.core.types import Output
from trivec.models.config import ConfigFile, Count
from trivec.models.ops import (
    Activation,
    AttentionSpec,
    Buckets,
    Index,
    Linear,
    ModelConfig,
    Ops,
    Table,
)
from trivec.models.pooling import HeadPlan, LinearName, Nonlinearity, NormName, Pooling

T = TypeVar("T")

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert")
# What stands before the names in a file, by what it was saved from; KEY_TENSOR tells which it is.
PREFIXES = ("", "bert.", "roberta.", "model.", "auto_model.", "0.auto_model.")
KEY_TENSOR = "embeddings.word_embeddings.weight"
# Tensors that files carry and the encoder does not use.
UNUSED = ("pooler.*", "*.position_ids", "lm_head.*", "cls.*")
DISTANCE_MAX = 128  # of MPNet's bias: keys from here on share a bucket


@dataclass(frozen=True, slots=True)
class BertConfig(ModelConfig):
    layer_norm_eps: float
    type_vocab_size: int  # 0: the model has no token types
    relative_attention_num_buckets: int = 0  # 0: scores have no bias by distance


class _BertFile(ConfigFile, frozen=True, kw_only=True):
    """`config.json`; what it leaves out has the default of transformers' own BertConfig."""

    layer_norm_eps: Annotated[float, Meta(gt=0, lt=1)] = 1e-12
    type_vocab_size: Count = 2
    hidden_act: str = "gelu"
    position_embedding_type: str | None = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    pruned_heads: dict[str, Any] | None = None


def read_config(config: Mapping[str, object]) -> BertConfig:
    """The encoder that `config.json` describes. Raises `ValueError`, also msgspec's own."""
    found = msgspec.convert(config, _BertFile)
    if reason := _why_not(found):
        raise ValueError(reason)
    if found.model_type == "bert":
        common = found.common()
    else:
        common = found.common(pad_token_id=1)
        common["position_offset"] = common["pad_token_id"] + 1
    return BertConfig(
        **common, layer_norm_eps=found.layer_norm_eps, type_vocab_size=found.type_vocab_size
    )


def _why_not(found: _BertFile) -> str | None:
    """The first thing in a config that this encoder does not do, or None."""
    if found.hidden_act != "gelu":
        return f"hidden_act is {found.hidden_act!r}; understood is 'gelu'"
    if found.position_embedding_type not in ("absolute", None):
        return (
            f"position_embedding_type is {found.position_embedding_type!r}; understood is "
            "'absolute'"
        )
    if found.is_decoder or found.add_cross_attention:
        return "is_decoder or add_cross_attention is set; served are encoders"
    if found.pruned_heads:
        return "pruned_heads is set; pruned attention is not understood"
    if found.hidden_size % found.num_attention_heads:
        return (
            f"hidden_size {found.hidden_size} is no multiple of num_attention_heads "
            f"{found.num_attention_heads}"
        )
    return None


def head_plan(architecture: str, file: Mapping[str, object], config: BertConfig) -> HeadPlan | None:
    """The head of a class of transformers, whose `config.json` is *file*; None for another class."""
    if architecture == "BertForSequenceClassification":
        names = ("pooler.dense", "classifier")
    elif architecture.endswith("ForSequenceClassification"):
        names = ("classifier.dense", "classifier.out_proj")
    elif architecture.endswith("ForMaskedLM"):
        is_bert = config.family == "bert"
        dense, norm, bias = (
            (
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions.bias",
            )
            if is_bert
            else ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
        )
        words = KEY_TENSOR
        if file.get("tie_word_embeddings") is False:
            words = "cls.predictions.decoder.weight" if is_bert else "lm_head.decoder.weight"
        layers = (
            LinearName.of(dense, Nonlinearity.GELU),
            NormName(f"{norm}.weight", f"{norm}.bias", config.layer_norm_eps),
            LinearName(words, bias),
        )
        return HeadPlan(Output.SPARSE, (), layers)
    else:
        return None
    first, last = names
    score = (LinearName.of(first, Nonlinearity.TANH), LinearName.of(last))
    return HeadPlan(Output.SCORE, (Pooling.CLS,), score)


def forward(ops: Ops[T], config: BertConfig) -> T:
    """Last hidden states `[tokens, hidden_size]` of the tokens that are kept."""
    hidden = config.hidden_size
    words = Table("embeddings.word_embeddings", config.vocab_size, hidden)
    places = Table("embeddings.position_embeddings", config.max_position_embeddings, hidden)
    x = ops.embed(words, Index.ID)
    if config.type_vocab_size:
        types = Table("embeddings.token_type_embeddings", config.type_vocab_size, hidden)
        x = ops.add(x, ops.embed(types, Index.TYPE))
    x = ops.add(x, ops.embed(places, Index.POSITION))
    x = ops.layer_norm(x, "embeddings.LayerNorm", eps=config.layer_norm_eps)

    heads = config.num_attention_heads
    bias = None
    if config.relative_attention_num_buckets:
        table = Table(
            "encoder.relative_attention_bias", config.relative_attention_num_buckets, heads
        )
        bias = Buckets(table, reach=DISTANCE_MAX)
    spec = AttentionSpec(heads, hidden // heads, heads, bias=bias)
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        names = (f"{layer}.attention.self.{name}" for name in ("query", "key", "value"))
        q, k, v = ops.linear(x, *(Linear(name, hidden) for name in names))
        attended = ops.attention(q, k, v, spec)
        if i == config.num_hidden_layers - 1:
            x, attended = ops.keep(x), ops.keep(attended)
        x = ops.block(after_attention, layer, config, x, attended)
    return x


def after_attention(ops: Ops[T], config: BertConfig, x: T, attended: T) -> T:
    """The rest of a layer: projection and feed-forward network, each with its residual and norm."""
    hidden, eps = config.hidden_size, config.layer_norm_eps
    (projected,) = ops.linear(attended, Linear("attention.output.dense", hidden))
    x = ops.layer_norm(ops.add(projected, x), "attention.output.LayerNorm", eps=eps)
    up = Linear("intermediate.dense", config.intermediate_size)
    outer = ops.mlp(x, up, Linear("output.dense", hidden), Activation.GELU)
    return ops.layer_norm(ops.add(outer, x), "output.LayerNorm", eps=eps)
