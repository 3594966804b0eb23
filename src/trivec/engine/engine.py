"""One served model: `core.ports.Embedder` over a tokenizer, a queue and a device's workers.

All of it runs on the event loop and none of it computes.
"""

import asyncio
from functools import partial

from trivec.core.clock import Deadlines
from trivec.core.ports import Backend, TextTokenizer
from trivec.core.types import ModelCard, Output, Reply, Sequences
from trivec.engine.scheduler import ModelQueue
from trivec.engine.worker import Workers
from trivec.settings import QueueLimits

BACKGROUND_S_MAX = 30 * 24 * 3600.0  # its sender, a batch job, has a deadline of its own


class Engine:
    """A model and its queue. Its workers are shared with the other models of the device."""

    def __init__(
        self,
        card: ModelCard,
        *,
        tokenizer: TextTokenizer | None,
        backend: Backend,
        workers: Workers,
        limits: QueueLimits,
    ) -> None:
        """*tokenizer* None: every request brings ids, as API processes do (decision 0013)."""
        assert workers.slot_count <= backend.slot_count, "slots that the backend does not have"
        self.card = card
        if tokenizer is not None:
            self.tokenizer = tokenizer
        self._scheduler = workers.scheduler
        self._queue = ModelQueue(card.id, backend, limits, backend.budget)
        self._scheduler.add_queue(self._queue)
        self._deadlines = Deadlines(partial(self._scheduler.expire, self._queue))
        self.check_admission = partial(self._scheduler.check_admission, self._queue)

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

    async def embed(
        self,
        sequences: Sequences,
        outputs: Output,
        *,
        timeout_s: float | None = None,
        continues: bool = False,
        background: bool = False,
    ) -> Reply:
        """See `core.ports.Embedder`. A *timeout_s* beyond the setting's limit is the limit."""
        assert len(sequences) > 0
        assert outputs in self.card.outputs | Output.CHUNKS, "the route refuses what it lacks"
        assert self.card.late_chunking or Output.CHUNKS not in outputs
        scheduler, queue = self._scheduler, self._queue
        limit_s = queue.limits.first_batch_s_max
        wait_s = limit_s if timeout_s is None else min(timeout_s, limit_s)
        if background:
            wait_s = BACKGROUND_S_MAX
        request = scheduler.submit(
            queue, sequences, outputs, wait_s=wait_s, continues=continues, background=background
        )
        queue.open.add(request)
        self._deadlines.set(request, asyncio.get_running_loop().time() + wait_s)
        try:
            return await request.future
        except asyncio.CancelledError:
            scheduler.cancel(queue, request)
            raise
        finally:
            self._deadlines.set(request, None)
            queue.open.discard(request)
            del request  # else it and an error's traceback would hold each other until collected
