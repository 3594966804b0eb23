"""Ports: the interfaces through which packages use each other. A fifth, `Store`, is in `accounts/ledger.py`.

One contract suite a port, in `tests/contract`, runs against every implementation of it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from trivec.core.events import Event
from trivec.core.types import (
    Batch,
    BatchBudget,
    Int32Array,
    LongText,
    ModelCard,
    Output,
    Reply,
    Sequences,
    TextToken,
    Vectors,
)

Texts: TypeAlias = Sequence[str]
TokenLists: TypeAlias = Sequence[Int32Array]  # each int32 [tokens], every id in [0, vocabulary)

OnProgress: TypeAlias = Callable[[str, float | None], None]
"""Told what takes seconds: the step in words, and the share of it that is done, if it is known."""


def no_progress(_step: str, _share: float | None) -> None:
    """An `OnProgress` for callers that show nothing."""


class TextTokenizer(Protocol):
    """A model's tokenizer. Its coroutines run on the event loop, and compute on other threads."""

    async def tokenize(
        self,
        inputs: Texts | TokenLists,
        *,
        long_text: LongText,
        trusted: bool = False,
        prompt: str = "",
        token_count_max: int | None = None,
    ) -> Sequences:
        """Ids of *inputs*, special tokens included.

        *prompt* is put before each text and never cut; only texts may have one. *token_count_max*
        is of each sequence, where that is less than the model's own.

        Raises `TextTooLong` (with the index of the first one) unless *long_text* says otherwise,
        `TokenIdUnknown` for an id outside the vocabulary, `TokenIdsForeign` for arrays that
        another tokenizer made, unless they are *trusted*, since the client vouches for them.
        """
        ...

    async def tokenize_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        long_text: LongText,
        document_tokens_max: int | None = None,
    ) -> Sequences:
        """Ids of (query, document) *pairs*, as a cross-encoder reads them; for `Output.SCORE`.

        Only the document is cut; *document_tokens_max* is of a document with the special tokens
        that it would have alone. Raises as `tokenize` does, where the index is the pair's, and
        `TextTooLong` without an index for a query that leaves no room for its document.
        """
        ...

    async def tokenize_chunks(
        self, texts: Texts, *, prompt: str = "", chunk_size: int | None = None
    ) -> Sequences:
        """For `Output.CHUNKS`: one sequence, of which each of *texts* is a chunk; or, with
        *chunk_size*, a sequence of each text, in chunks of so many tokens.

        *prompt* goes once before a sequence, and is in no chunk. Raises as `tokenize` does, and
        `FieldInvalid` for a text of no token.
        """
        ...

    def token_strings(self, token_ids: Int32Array) -> list[str]:
        """The vocabulary's own strings for *token_ids*."""
        ...

    async def find_tokens(self, texts: Texts, *, special_tokens: bool) -> list[list[TextToken]]:
        """The tokens of each text and where they stand in it, with or without *special_tokens*.

        Raises `TextTooLong` for a text of too many bytes, `RequestTooLarge`.
        """
        ...

    async def decode(self, lists: TokenLists, *, special_tokens: bool) -> list[str]:
        """The text of each list of ids, with or without its *special_tokens*.

        Raises `TokenIdUnknown`.
        """
        ...


class Embedder(Protocol):
    """One served model, wherever it runs. All methods are called on the event loop."""

    @property
    def card(self) -> ModelCard: ...

    @property
    def tokenizer(self) -> TextTokenizer: ...

    async def embed(
        self,
        sequences: Sequences,
        outputs: Output,
        *,
        timeout_s: float | None = None,
        continues: bool = False,
        background: bool = False,
    ) -> Reply:
        """Join the queue and wait for every vector of *sequences*, in their order.

        *timeout_s* bounds the wait from now to the first batch. A *background* request is computed
        only while no other waits; it has neither deadline nor limit of the queue. Raises
        `Overloaded` at once when the queue is full, unless this *continues* what was admitted
        before, so that nothing which is half computed is refused; `DeadlineExceeded`,
        `EngineFault`. Cancelling the call frees its place.
        """
        ...

    def check_admission(self, token_count: int) -> None:
        """Raise what `embed` would raise at once for *token_count* tokens or more: `Overloaded`.

        For refusing before there is anything to embed: cheap, reserves nothing, may let all pass.
        """
        ...


class Backend(Protocol):
    """One model on one device. Each slot is driven by one thread, the same for its whole life."""

    @property
    def slot_count(self) -> int:
        """How many threads may be inside `run` at once, each with its own slot number."""
        ...

    @property
    def budget(self) -> BatchBudget:
        """The batch this device likes best."""
        ...

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        """Compute *batch*; blocks. Rows come in the order given.

        A `BusyError` is what each request of the batch then fails with; after any other exception
        the batch is halved, to find the sequence at fault.
        """
        ...

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        """`run` at the highest precision at hand: the second try for a row that was not finite."""
        ...

    def close(self) -> None:
        """Free the device. No slot is inside `run`, and none will be again."""
        ...


class Observer(Protocol):
    """Hears what happened. Never blocks, never raises; called from any thread."""

    def observe(self, event: Event) -> None: ...


class Clock(Protocol):
    """Time, so that tests can move it by hand."""

    def now_s(self) -> float:
        """Monotonic seconds: for waits and durations."""
        ...

    def wall_s(self) -> float:
        """Seconds since the epoch: for what is written down."""
        ...
