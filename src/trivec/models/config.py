"""Config: `config.json` as types, its numbers bounded so that a lying one asks for no absurd memory."""

from typing import Annotated, Any, TypeAlias

import msgspec
from msgspec import Meta

Count: TypeAlias = Annotated[int, Meta(ge=1, le=4096)]
Width: TypeAlias = Annotated[int, Meta(ge=1, le=65_536)]
Rows: TypeAlias = Annotated[int, Meta(ge=1, le=4_000_000)]
Eps: TypeAlias = Annotated[float, Meta(gt=0, lt=1)]
Theta: TypeAlias = Annotated[float, Meta(gt=1, le=1e12)]


class ConfigFile(msgspec.Struct, frozen=True, kw_only=True):
    """What `config.json` says of every family, by transformers' names."""

    model_type: str
    hidden_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Width
    vocab_size: Rows
    max_position_embeddings: Rows
    pad_token_id: Annotated[int, Meta(ge=0)] | None = None

    def common(
        self, *, family: str | None = None, position_offset: int = 0, pad_token_id: int = 0
    ) -> dict[str, Any]:
        """What a `ModelConfig` takes over; *pad_token_id* is that of the family."""
        return {
            "family": family or self.model_type,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_position_embeddings,
            "position_offset": position_offset,
            "pad_token_id": pad_token_id if self.pad_token_id is None else self.pad_token_id,
        }
