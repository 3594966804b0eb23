"""Static models: a row of a table for each token; a vector is their mean, and nothing mixes them.

Model2Vec (github.com/MinishLab/model2vec), and StaticEmbedding of sentence-transformers. The table
that is served has one row more than the files': of zeros, for the token of a text that has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from trivec.models.config import Rows, Width
from trivec.models.ops import Index, ModelConfig, Ops, Table

T = TypeVar("T")

MODEL_TYPES = ("model2vec",)
TABLE = "embeddings"
KEY_TENSOR = f"{TABLE}.weight"
TOKENS_MAX = 8192  # of a text, where the files set no limit: a mean of more says little


@dataclass(frozen=True, slots=True)
class StaticConfig(ModelConfig):
    @property
    def blank_token_id(self) -> int:
        """The token whose row is zero."""
        return self.vocab_size - 1


class _StaticFile(msgspec.Struct, frozen=True, kw_only=True):
    """What the table's shape and `config.json` say."""

    model_type: str
    hidden_size: Width
    vocab_size: Rows  # the row of zeros included
    max_length: int | None = None


def read_config(config: Mapping[str, object]) -> StaticConfig:
    """The model whose table and settings are *config*. Raises `ValueError`, also msgspec's own."""
    found = msgspec.convert(config, _StaticFile)
    return StaticConfig(
        family=found.model_type,
        hidden_size=found.hidden_size,
        num_hidden_layers=0,
        num_attention_heads=0,
        intermediate_size=0,
        vocab_size=found.vocab_size,
        max_position_embeddings=min(found.max_length or TOKENS_MAX, TOKENS_MAX),
        position_offset=0,
        pad_token_id=0,
    )


def forward(ops: Ops[T], config: StaticConfig) -> T:
    """The rows `[tokens, hidden_size]` of the tokens that are kept."""
    return ops.keep(ops.embed(Table(TABLE, config.vocab_size, config.hidden_size), Index.ID))
