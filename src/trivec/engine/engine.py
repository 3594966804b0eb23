"""One served model: `core.ports.Embedder` over a tokenizer, a queue and a device's workers.

All of it runs on the event loop and none of it computes.
"""

import asyncio
from collections.abc import Sequence

from trivec.core.ports import Backend, Texts, TokenLists
from trivec.core.types import (
    Int32Array,
    LongText,
    ModelCard,
    Output,
    Reply,
    Sequences,
    TextToken,
)
from trivec.engine.scheduler import ModelQueue
from trivec.engine.worker import Workers
from trivec.settings import QueueLimits
from trivec.tokenizer import Tokenizer


class Engine:
    """A model and its queue. Its workers are shared with the other models of the device."""

    def __init__(
        self,
        card: ModelCard,
        *,
        tokenizer: Tokenizer | None,
        backend: Backend,
        workers: Workers,
        limits: QueueLimits,
    ) -> None:
        """*tokenizer* None: every request brings ids, as API processes do (decision 0013)."""
        assert workers.slot_count <= backend.slot_count, "slots that the backend does not have"
        self.card = card
        self._tokenizer = tokenizer
        self._scheduler = workers.scheduler
        self._queue = ModelQueue(card.id, backend, limits, backend.budget)
        self._scheduler.add_queue(self._queue)

    @property
    def queued_requests(self) -> int:
        """Requests with sequences that are in no batch yet."""
        return len(self._queue.requests)

    @property
    def queued_tokens(self) -> int:
        """Tokens that are in no batch yet."""
        return self._queue.requests.token_count

    @property
    def open_requests(self) -> int:
        """Requests without a reply: those in the queue, and those in batches."""
        return len(self._queue.open)

    async def tokenize(
        self,
        inputs: Texts | TokenLists,
        *,
        long_text: LongText,
        trusted: bool = False,
        prompt: str = "",
        token_count_max: int | None = None,
    ) -> Sequences:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return await self._tokenizer.tokenize(
            inputs,
            long_text=long_text,
            trusted=trusted,
            prompt=prompt,
            token_count_max=token_count_max,
        )

    async def tokenize_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        long_text: LongText,
        document_tokens_max: int | None = None,
    ) -> Sequences:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return await self._tokenizer.encode_pairs(
            pairs, long_text=long_text, document_tokens_max=document_tokens_max
        )

    async def tokenize_chunks(
        self, texts: Texts, *, prompt: str = "", chunk_size: int | None = None
    ) -> Sequences:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return await self._tokenizer.tokenize_chunks(texts, prompt=prompt, chunk_size=chunk_size)

    def token_strings(self, token_ids: Int32Array) -> list[str]:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return self._tokenizer.token_strings(token_ids)

    async def find_tokens(self, texts: Texts, *, special_tokens: bool) -> list[list[TextToken]]:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return await self._tokenizer.find_tokens(texts, special_tokens=special_tokens)

    async def decode(self, lists: TokenLists, *, special_tokens: bool) -> list[str]:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return await self._tokenizer.decode(lists, special_tokens=special_tokens)

    def check_admission(self, token_count: int) -> None:
        self._scheduler.check_admission(self._queue, token_count)

    async def embed(
        self, sequences: Sequences, outputs: Output, *, deadline_s: float | None = None
    ) -> Reply:
        """See `core.ports.Embedder`. A *deadline_s* beyond the setting's limit is the limit."""
        assert len(sequences) > 0
        assert outputs in self.card.outputs | Output.CHUNKS, "the route refuses what it lacks"
        assert self.card.late_chunking or Output.CHUNKS not in outputs
        scheduler, queue = self._scheduler, self._queue
        limit_s = queue.limits.first_batch_s_max
        wait_s = limit_s if deadline_s is None else min(deadline_s, limit_s)
        request = scheduler.submit(queue, sequences, outputs, wait_s=wait_s)
        queue.open.add(request)
        timer = request.future.get_loop().call_later(wait_s, scheduler.expire, queue, request)
        try:
            return await request.future
        except asyncio.CancelledError:
            scheduler.cancel(queue, request)
            raise
        finally:
            timer.cancel()
            queue.open.discard(request)
            del request  # else it and an error's traceback would hold each other until collected
