"""One served model: `core.ports.Embedder` over a tokenizer, a line and a device's workers.

All of it runs on the event loop and none of it computes.
"""

import asyncio
import math

from trivec.core.errors import ServiceError
from trivec.core.ports import Backend, Clock, Observer, Texts, TokenLists
from trivec.core.types import Int32Array, LongText, ModelCard, Output, Reply, Sequences
from trivec.engine.lane import Lane
from trivec.engine.pace import Pace
from trivec.engine.runner import Runner
from trivec.engine.waiter import Waiter
from trivec.engine.worker import Workers
from trivec.settings import QueueLimits
from trivec.tokenizer import Tokenizer


class Engine:
    """A model and its line. Its workers are shared with the other models of the device."""

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
        """*tokenizer* None: whoever asks brings ids, as API processes do (decision 0073)."""
        assert workers.slot_count <= backend.slot_count, "slots that the backend does not have"
        self._card = card
        self._tokenizer = tokenizer
        self._desk = workers.desk
        self._clock = clock
        self._lane = Lane(
            model=card.id,
            backend=backend,
            bound=bound,
            runner=Runner(card.id, backend, calls=workers.calls, clock=clock, observer=observer),
            pace=Pace(workers.slot_count),
            budget=backend.budget,
        )
        self._desk.adopt(self._lane)

    @property
    def card(self) -> ModelCard:
        return self._card

    async def tokenize(
        self, inputs: Texts | TokenLists, *, long_text: LongText, are_own: bool = False
    ) -> Sequences:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return await self._tokenizer.tokenize(inputs, long_text=long_text, are_own=are_own)

    def check_admission(self, token_count: int, *, tokens_ahead: int = 0) -> None:
        self._desk.check_admission(self._lane, token_count, tokens_ahead)

    def token_strings(self, token_ids: Int32Array) -> list[str]:
        assert self._tokenizer is not None, "asked with text, and made for ids"
        return self._tokenizer.token_strings(token_ids)

    async def embed(
        self, sequences: Sequences, outputs: Output, *, deadline_s: float | None = None
    ) -> Reply:
        """See `core.ports.Embedder`. A *deadline_s* beyond the setting's bound is the bound."""
        assert len(sequences) > 0
        assert outputs in self._card.outputs, "the route refuses what the model lacks"
        loop = asyncio.get_running_loop()
        wait_s = min(
            self._lane.bound.first_batch_s_max, math.inf if deadline_s is None else deadline_s
        )
        now_s = self._clock.now_s()
        waiter = Waiter(
            sequences=sequences,
            outputs=outputs,
            deadline_s=now_s + wait_s,
            future=loop.create_future(),
            joined_s=now_s,
        )
        self._lane.loop = loop
        self._desk.join(self._lane, waiter)
        self._lane.open.add(waiter)
        timer = loop.call_later(wait_s, self._desk.leave_late, self._lane, waiter)
        try:
            return await waiter.future
        except (asyncio.CancelledError, ServiceError):
            self._desk.leave(self._lane, [waiter])
            raise
        finally:
            timer.cancel()
            self._lane.open.discard(waiter)
            # With it, what it raises would hold itself, and all that its callers hold.
            del waiter
