"""`core.ports.Embedder` for a model that runs in the engine process: tokenised here, asked for there."""

import asyncio
import random
from dataclasses import dataclass

from trivec.core.errors import Overloaded, ServiceError
from trivec.core.ports import Clock, Texts, TokenLists
from trivec.core.retry import spread_retry_s
from trivec.core.types import Int32Array, LongText, ModelCard, Output, Reply, Sequences
from trivec.ipc.api_end import EngineLink
from trivec.ipc.messages import Ask, ModelHello
from trivec.tokenizer import Tokenizer

FULL_S_MAX = 0.1  # how long a refusal speaks for requests that were not asked


@dataclass(frozen=True, slots=True)
class Refused:
    """That the line had no room for so many tokens at a time."""

    message: str
    token_count: int
    retry_after_s: float
    at_s: float


class RemoteEmbedder:
    """`Embedder` for one model of the engine process."""

    def __init__(
        self, index: int, model: ModelHello, *, tokenizer: Tokenizer, link: EngineLink, clock: Clock
    ) -> None:
        self._index = index
        self._card = model.card
        self._tokenizer = tokenizer
        self._link = link
        self._clock = clock
        self._refused: Refused | None = None

    @property
    def card(self) -> ModelCard:
        return self._card

    async def tokenize(
        self, inputs: Texts | TokenLists, *, long_text: LongText, are_own: bool = False
    ) -> Sequences:
        return await self._tokenizer.tokenize(inputs, long_text=long_text, are_own=are_own)

    def token_strings(self, token_ids: Int32Array) -> list[str]:
        return self._tokenizer.token_strings(token_ids)

    async def embed(
        self, sequences: Sequences, outputs: Output, *, deadline_s: float | None = None
    ) -> Reply:
        """See `core.ports.Embedder`. The deadline counts from when the engine process hears it."""
        assert len(sequences) > 0
        try:
            reply = await self._link.ask(Ask(self._index, sequences, outputs, deadline_s))
        except Overloaded as full:
            now_s = self._clock.now_s()
            self._refused = Refused(str(full), sequences.token_count, full.retry_after_s, now_s)
            raise
        except (asyncio.CancelledError, ServiceError):
            self._refused = None
            raise
        self._refused = None
        return reply

    def check_admission(self, token_count: int) -> None:
        """Refuse whatever is at least as large as what the engine refused a moment ago.

        What is refused to a request is refused to every larger one; and until one of ours has left
        the line, or `FULL_S_MAX` has passed, nothing tells that there is room again. So of a flood
        one request in that time pays the whole price of a refusal, and the others next to nothing.
        """
        self._link.check_open()
        refused = self._refused
        if refused is None or token_count < refused.token_count:
            return
        waited_s = self._clock.now_s() - refused.at_s
        if waited_s >= min(refused.retry_after_s, FULL_S_MAX):
            self._refused = None
            return
        raise Overloaded(
            refused.message,
            retry_after_s=spread_retry_s(refused.retry_after_s, random.random()),  # noqa: S311
        )
