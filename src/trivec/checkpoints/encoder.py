"""The shape of a BERT-family encoder, and so the name and shape of every tensor it must have."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Pooling(Enum):
    """How the last hidden states of a sequence become its dense vector."""

    CLS = "cls"  # the first token's
    MEAN = "mean"  # the mean over all tokens


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """An encoder with exact (erf) GELU, absolute positions and LayerNorm after each half-layer."""

    family: str  # "bert", "roberta" or "xlm-roberta"
    hidden_size: int
    layer_count: int
    head_count: int
    intermediate_size: int
    layer_norm_eps: float
    vocabulary_size: int
    position_count: int  # rows of the position table
    position_offset: int  # position of a sequence's first token: 0 for bert, pad id + 1 for roberta
    token_type_count: int
    pad_token_id: int

    @property
    def token_count_max(self) -> int:
        """Tokens for which there is a position, special tokens included."""
        return self.position_count - self.position_offset


def tensor_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name to shape of every tensor of the encoder; linear weights are `[out, in]`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocabulary_size, hidden),
        "embeddings.position_embeddings.weight": (config.position_count, hidden),
        "embeddings.token_type_embeddings.weight": (config.token_type_count, hidden),
        "embeddings.LayerNorm.weight": (hidden,),
        "embeddings.LayerNorm.bias": (hidden,),
    }
    for layer in range(config.layer_count):
        for name, rows, columns in _linears(hidden, inner):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (rows, columns)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (hidden,)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (hidden,)
    return shapes


def _linears(hidden: int, inner: int) -> Iterator[tuple[str, int, int]]:
    yield "attention.self.query", hidden, hidden
    yield "attention.self.key", hidden, hidden
    yield "attention.self.value", hidden, hidden
    yield "attention.output.dense", hidden, hidden
    yield "intermediate.dense", inner, hidden
    yield "output.dense", hidden, inner
