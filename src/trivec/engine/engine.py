"""One served model: `core.ports.Embedder` over a tokenizer, a queue and a device's workers.

All of it runs on the event loop and none of it computes.
"""

import asyncio
import math

from trivec.core.errors import ServiceError
from trivec.core.ports import Backend, Clock, Observer, Texts, TokenLists
from trivec.core.types import Int32Array, LongText, ModelCard, Output, Reply, Sequences
from trivec.engine.request import Request
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
        bound: QueueLimits,
        clock: Clock,
        observer: Observer,
    ) -> None:
        """*tokenizer* None: every request brings ids, as API processes do (decision 0013)."""
        assert workers.slot_count <= backend.slot_count, "slots that the backend does not have"
        self._card = card
        self._tokenizer = tokenizer
        self._scheduler = workers.scheduler
        self._clock = clock
        self._queue = ModelQueue(
            card.id, backend, limits=bound, slot_count=workers.slot_count, observer=observer
        )
        self._scheduler.add_queue(self._queue)

    @property
    def card(self) -> ModelCard:
        return self._card

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
        self, inputs: Texts | TokenLists, *, long_text: LongText, trusted: bool = False
    ) -> Sequences:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return await self._tokenizer.tokenize(inputs, long_text=long_text, trusted=trusted)

    def token_strings(self, token_ids: Int32Array) -> list[str]:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return self._tokenizer.token_strings(token_ids)

    def check_admission(self, token_count: int) -> None:
        self._scheduler.check_admission(self._queue, token_count)

    async def embed(
        self, sequences: Sequences, outputs: Output, *, deadline_s: float | None = None
    ) -> Reply:
        """See `core.ports.Embedder`. A *deadline_s* beyond the setting's limit is the limit."""
        assert len(sequences) > 0
        assert outputs in self._card.outputs, "the route refuses what the model lacks"
        loop = asyncio.get_running_loop()
        limit_s = self._queue.limits.first_batch_s_max
        wait_s = min(limit_s, math.inf if deadline_s is None else deadline_s)
        now_s = self._clock.now_s()
        request = Request(
            sequences=sequences,
            outputs=outputs,
            future=loop.create_future(),
            submitted_s=now_s,
            deadline_s=now_s + wait_s,
        )
        self._scheduler.submit(self._queue, request)
        self._queue.open.add(request)
        timer = loop.call_later(wait_s, self._scheduler.expire, self._queue, request)
        try:
            return await request.future
        except (asyncio.CancelledError, ServiceError):
            self._scheduler.cancel(self._queue, request)
            raise
        finally:
            timer.cancel()
            self._queue.open.discard(request)
            del request  # else it and an error's traceback would hold each other until collected
