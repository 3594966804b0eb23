"""What crosses a seam: frozen values, packed and never padded.

Axes are named at an array's birth: `[sequences + 1]`, `[tokens]`, `[tokens, hidden]`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntFlag
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Int32Array: TypeAlias = NDArray[np.int32]
Float32Array: TypeAlias = NDArray[np.float32]

NOTHING_TRUNCATED: "Mapping[int, Truncated]" = MappingProxyType({})


class Output(IntFlag):
    """The kinds of vector one forward pass can yield; a request asks for any union of them."""

    DENSE = 1
    SPARSE = 2
    MULTI = 4


class LongText(Enum):
    """What to do with a text that has more tokens than the model reads."""

    REFUSE = "refuse"
    CUT_END = "cut_end"
    CUT_START = "cut_start"
    # For counting only: `Embedder.embed` never receives such a sequence. `truncated` names texts
    # over the tokenizer's bound of bytes, which is why they do not fit.
    KEEP = "keep"


@dataclass(frozen=True, slots=True)
class Truncated:
    """That a text was cut, and by how much, special tokens included."""

    original_tokens: int | None  # None: the text was too long even to be counted
    kept_tokens: int


@dataclass(frozen=True, slots=True)
class Sequences:
    """Tokenised texts end to end, in the order the client gave them."""

    token_ids: Int32Array  # [tokens]
    starts: Int32Array  # [sequences + 1]; sequence i is token_ids[starts[i]:starts[i + 1]]
    truncated: Mapping[int, Truncated] = field(  # by sequence index
        default_factory=lambda: NOTHING_TRUNCATED
    )

    def __post_init__(self) -> None:
        assert self.starts[0] == 0
        assert self.starts[-1] == len(self.token_ids)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def token_count(self) -> int:
        return len(self.token_ids)

    def lengths(self) -> Int32Array:
        """Tokens of each sequence, special tokens included: int32 `[sequences]`."""
        return np.diff(self.starts)

    @classmethod
    def pack(
        cls,
        ids: Sequence[Sequence[int] | Int32Array],
        truncated: Mapping[int, Truncated] = NOTHING_TRUNCATED,
    ) -> "Sequences":
        """Lay lists of token ids end to end."""
        if len(ids) == 1:
            alone: Int32Array = np.array(ids[0], np.int32)  # [tokens]
            return cls(alone, np.array((0, len(alone)), np.int32), truncated)
        starts = np.zeros(len(ids) + 1, np.int32)
        np.cumsum([len(one) for one in ids], out=starts[1:])
        token_ids = np.empty(int(starts[-1]), np.int32)
        for i, one in enumerate(ids):
            token_ids[starts[i] : starts[i + 1]] = one
        return cls(token_ids, starts, truncated)


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences packed end to end: the one form every backend accepts.

    A backend that needs a rectangle pads for itself; nobody above it ever sees padding.
    """

    token_ids: Int32Array  # [tokens]
    starts: Int32Array  # [sequences + 1]
    outputs: NDArray[np.uint8]  # [sequences]; Output flags
    token_types: Int32Array | None = None  # [tokens]; None: all zero

    def __post_init__(self) -> None:
        assert self.starts[0] == 0
        assert self.starts[-1] == len(self.token_ids)
        assert len(self.outputs) == len(self.starts) - 1

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def token_count(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SparseVector:
    """Learned lexical weights: one weight > 0 a distinct token id, ids ascending."""

    token_ids: Int32Array  # [terms]
    weights: Float32Array  # [terms]


@dataclass(frozen=True, slots=True)
class Vectors:
    """One row a sequence, in the order given, float32 on the host.

    `dense` is always filled. `sparse[i]` and `multi[i]` are None where they were not asked for.
    """

    dense: Float32Array  # [sequences, dimensions], rows of length 1 where the model normalises
    sparse: tuple[SparseVector | None, ...]  # [sequences]
    multi: tuple[Float32Array | None, ...]  # [sequences] of [tokens - 1, dimensions]

    def __post_init__(self) -> None:
        assert len(self.dense) == len(self.sparse) == len(self.multi)

    def __len__(self) -> int:
        return len(self.dense)


@dataclass(frozen=True, slots=True)
class Reply:
    """What `Embedder.embed` answers: the vectors and where the time went."""

    vectors: Vectors
    queue_s: float  # from joining the line to the start of the first batch
    compute_s: float  # from then to the last row


@dataclass(frozen=True, slots=True)
class BatchBudget:
    """What one batch may hold. A single longer sequence still runs, alone."""

    tokens_max: int
    sequences_max: int

    def __post_init__(self) -> None:
        assert self.tokens_max > 0
        assert self.sequences_max > 0


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a client may know of a served model."""

    id: str
    token_count_max: int  # special tokens included
    vocabulary_size: int
    dimensions: int
    outputs: Output
    precision: str  # "fp32", "int8", "bf16", ...
    created: int  # Unix seconds
    owned_by: str
    dimensions_selectable: bool = False  # trained so that a leading slice of a vector is a vector
    verified: bool = False  # every file matched the catalogue's hash
    aliases: tuple[str, ...] = ()
    recipe: str | None = None  # the exact arithmetic, where the backend has a name for it
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def names(self) -> tuple[str, ...]:
        """All that the model is called: its id, then its aliases."""
        return (self.id, *self.aliases)
