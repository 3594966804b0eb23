"""What crosses a port: frozen values, never padded. Axes are named at an array's birth: `[tokens]`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntFlag
from types import MappingProxyType
from typing import NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

Int32Array: TypeAlias = NDArray[np.int32]
Float32Array: TypeAlias = NDArray[np.float32]

NOTHING_TRUNCATED: "Mapping[int, Truncated]" = MappingProxyType({})
NO_PROMPTS: Mapping[str, str] = MappingProxyType({})


class Output(IntFlag):
    """The kinds of vector one forward pass can yield; a request asks for any union of them."""

    DENSE = 1
    SPARSE = 2
    MULTI = 4
    SCORE = 8  # of a pair of texts, by a reranker or classifier
    CHUNKS = 16  # of parts of a sequence, each the mean of its tokens


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


class TextToken(NamedTuple):
    """A token, and which characters of its text it is made of."""

    token_id: int
    text: str  # those characters; of a special token the vocabulary's string
    is_special: bool
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class MarkedTexts:
    """Texts before which a token says what they are: ColBERT's queries, or its documents."""

    marker: str  # their prompt begins with it
    token_id: int  # that stands for it, after the opening special tokens
    token_count_max: int | None = None  # of a sequence
    filler_id: int | None = None  # a token by which shorter sequences are filled up
    filled_to: int = 0


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What becomes of a text's tokens beside what `tokenizer.json` says, as the model's files have it."""

    has_specials: bool = True  # False: none is put around a text
    dropped_token_id: int | None = None  # an unknown word's, where that has no part in a vector
    blank_token_id: int | None = None  # the one token of a text that has none; None: it is refused
    marked: tuple[MarkedTexts, ...] = ()
    token_type_count: int = 2  # rows of the model's table of token types


ORDINARY_RULES = TokenRules()


@dataclass(frozen=True, slots=True)
class Sequences:
    """Tokenised texts end to end, in the order the client gave them."""

    token_ids: Int32Array  # [tokens]
    cu_seqlens: Int32Array  # [sequences + 1]; sequence i is token_ids[starts[i]:starts[i + 1]]
    truncated: Mapping[int, Truncated] = field(  # by sequence index
        default_factory=lambda: NOTHING_TRUNCATED
    )
    token_types: Int32Array | None = None  # [tokens]; None: all zero
    # [sequences]; leading tokens left out of a pooled mean, special ones included. None: none are
    skip: Int32Array | None = None
    # Of each sequence, for `Output.CHUNKS`: int32 [chunks + 1]; where its chunks begin, and the end
    chunks: tuple[Int32Array, ...] | None = None

    def __post_init__(self) -> None:
        assert self.cu_seqlens[0] == 0
        assert self.cu_seqlens[-1] == len(self.token_ids)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def token_count(self) -> int:
        return len(self.token_ids)

    def lengths(self) -> Int32Array:
        """Tokens of each sequence, special tokens included: int32 `[sequences]`."""
        return np.diff(self.cu_seqlens)

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
    cu_seqlens: Int32Array  # [sequences + 1]
    outputs: NDArray[np.uint8]  # [sequences]; Output flags
    token_types: Int32Array | None = None  # [tokens]; None: all zero
    skip: Int32Array | None = None  # [sequences]; as in `Sequences`
    chunks: tuple[Int32Array, ...] | None = None  # [sequences]; as in `Sequences`

    def __post_init__(self) -> None:
        assert self.cu_seqlens[0] == 0
        assert self.cu_seqlens[-1] == len(self.token_ids)
        assert len(self.outputs) == len(self.cu_seqlens) - 1

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def token_count(self) -> int:
        return len(self.token_ids)

    def take(self, indices: NDArray[np.integer]) -> "Batch":
        """The sequences at *indices*, in that order."""
        lengths = np.diff(self.cu_seqlens)[indices]
        starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int32))).astype(np.int32)
        shift = self.cu_seqlens[indices] - starts[:-1]
        tokens = np.arange(starts[-1], dtype=np.int32) + np.repeat(shift, lengths)
        types = None if self.token_types is None else self.token_types[tokens]
        skip = None if self.skip is None else self.skip[indices]
        chunks = None if self.chunks is None else tuple(self.chunks[i] for i in indices)
        return Batch(self.token_ids[tokens], starts, self.outputs[indices], types, skip, chunks)


@dataclass(frozen=True, slots=True)
class SparseVector:
    """Learned lexical weights: one weight > 0 a distinct token id, ids ascending."""

    token_ids: Int32Array  # [terms]
    weights: Float32Array  # [terms]


Row: TypeAlias = Float32Array | SparseVector
# Of one output, a row a sequence: one array where every sequence has a row of the same shape, else
# a tuple with None where a sequence did not ask.
Rows: TypeAlias = Float32Array | tuple[Row | None, ...]


@dataclass(frozen=True, slots=True)
class Vectors:
    """What a forward pass yielded: rows by output, one a sequence, in the order given.

    Everything is float32 on the host. An output that no sequence asked for has no entry, but for
    one that the model yields of every text without more work.
    DENSE: `[sequences, dimensions]`, of length 1 where the model normalises.
    SPARSE: a `SparseVector` or None. MULTI: `[rows, dimensions]` or None.
    SCORE: `[sequences, labels]`, as the model's last layer gives them.
    CHUNKS: `[chunks, dimensions]`, as DENSE, or None.
    """

    rows: Mapping[Output, Rows]

    def __post_init__(self) -> None:
        assert len({len(rows) for rows in self.rows.values()}) == 1

    @classmethod
    def of(
        cls,
        dense: Float32Array | None = None,
        sparse: Sequence[SparseVector | None] = (),
        multi: Sequence[Float32Array | None] = (),
        score: Float32Array | None = None,
        chunks: Sequence[Float32Array | None] = (),
    ) -> "Vectors":
        """From the rows of each output; those of nothing but None are left out."""
        rows: dict[Output, Rows] = {}
        if dense is not None:
            rows[Output.DENSE] = dense
        listed: tuple[tuple[Output, Sequence[Row | None]], ...] = (
            (Output.SPARSE, sparse),
            (Output.MULTI, multi),
            (Output.CHUNKS, chunks),
        )
        for output, given in listed:
            if any(row is not None for row in given):
                rows[output] = tuple(given)
        if score is not None:
            rows[Output.SCORE] = score
        return cls(rows)

    @classmethod
    def join(
        cls, parts: Sequence["Vectors"], places: NDArray[np.integer] | None = None
    ) -> "Vectors":
        """The rows of *parts* end to end; with *places*, row i is then the `places[i]`th of these."""
        joined: dict[Output, Rows] = {}
        for output in sorted({output for part in parts for output in part.rows}):
            own = [part[output] for part in parts]
            if all(isinstance(rows, np.ndarray) for rows in own):
                array: Float32Array = np.concatenate([np.asarray(rows) for rows in own])
                joined[output] = array if places is None else array[places]
            else:
                listed = tuple(row for rows in own for row in rows)
                joined[output] = listed if places is None else tuple(listed[i] for i in places)
        return cls(joined)

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def __getitem__(self, output: Output) -> Rows:
        """The rows of *output*, where any sequence asked for it; None for each otherwise."""
        found = self.rows.get(output)
        return (None,) * len(self) if found is None else found

    @property
    def dense(self) -> Float32Array:
        return cast("Float32Array", self.rows[Output.DENSE])

    @property
    def sparse(self) -> tuple[SparseVector | None, ...]:
        return cast("tuple[SparseVector | None, ...]", self[Output.SPARSE])

    @property
    def multi(self) -> tuple[Float32Array | None, ...]:
        return cast("tuple[Float32Array | None, ...]", self[Output.MULTI])

    @property
    def chunks(self) -> tuple[Float32Array | None, ...]:
        return cast("tuple[Float32Array | None, ...]", self[Output.CHUNKS])

    @property
    def score(self) -> Float32Array:
        return cast("Float32Array", self.rows[Output.SCORE])


@dataclass(frozen=True, slots=True)
class Reply:
    """What `Embedder.embed` answers: the vectors and where the time went."""

    vectors: Vectors
    queue_s: float  # from joining the queue to the start of the first batch
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
    matryoshka_dimensions: tuple[int, ...] = ()  # sizes a vector may be cut to; empty: only its own
    licence: str | None = None  # of the weights, as SPDX has it, where the catalogue knows them
    layer_norm_before_cut: bool = False  # of the whole vector, without weights
    prompts: Mapping[str, str] = field(default_factory=lambda: NO_PROMPTS)  # put before a text
    default_prompt_name: str | None = None  # the prompt of a text whose request names none
    include_prompt: bool = True  # False: a prompt's tokens are left out of the pooled mean
    labels: int = 0  # numbers in a score
    late_chunking: bool = False  # the vector is a mean of tokens, and so a part may have one
    verified: bool = False  # every file matched the catalogue's hash
    aliases: tuple[str, ...] = ()
    recipe: str | None = None  # the exact arithmetic, where the backend has a name for it
    notes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def takes_dimensions(self, count: int) -> bool:
        """Whether a dense vector may have *count* numbers."""
        sizes = {*self.matryoshka_dimensions, self.dimensions}
        return count in sizes or (self.dimensions_selectable and 0 < count < self.dimensions)

    @property
    def names(self) -> tuple[str, ...]:
        """All that the model is called: its id, then its aliases."""
        return (self.id, *self.aliases)

    @property
    def main_output(self) -> Output:
        """The first of its outputs: dense where it has that."""
        return next(iter(self.outputs))


@dataclass(frozen=True, slots=True)
class CertificateSummary:
    """How close the fast arithmetic came to fp32 on the probe texts: cosines of dense vectors."""

    cosine_min: float
    cosine_mean: float
    summary: str
