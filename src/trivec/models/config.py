"""Config: the types of numbers in `config.json`, bounded so that a lying one asks for no absurd memory."""

from typing import Annotated, TypeAlias

from msgspec import Meta

Count: TypeAlias = Annotated[int, Meta(ge=1, le=4096)]
Width: TypeAlias = Annotated[int, Meta(ge=1, le=65_536)]
Rows: TypeAlias = Annotated[int, Meta(ge=1, le=4_000_000)]
Eps: TypeAlias = Annotated[float, Meta(gt=0, lt=1)]
Theta: TypeAlias = Annotated[float, Meta(gt=1, le=1e12)]
