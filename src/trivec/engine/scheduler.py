"""Scheduler: where a device's queues and its free worker slots meet, behind one lock.

It admits requests, shares the device between models, chooses each batch and replies to requests.
The lock is held to choose (tens of µs), never to compute.
"""

import asyncio
import math
import random
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Self

from trivec.core.errors import DeadlineExceeded, Draining, EngineFault, Overloaded, ServiceError
from trivec.core.events import BatchRan, QueueChanged
from trivec.core.ports import Backend, Clock, Observer
from trivec.core.retry import spread_retry_s
from trivec.core.types import BatchBudget, Reply, Vectors
from trivec.engine.request import CANDIDATES_MAX, BatchItem, Request, RequestQueue
from trivec.settings import QueueLimits

RESTART_S = 10.0  # after which a client should find a process that has started again
SPLIT_MAX = 4  # free slots share what waits, in batches of no less than this part of the budget

# The throughput estimate. WINDOW_S: device seconds after which a measurement counts for 1/e. Until
# the first batch: an int8 BGE-M3 on two cores, and a tenth of that for the upper bound, so that a
# cold device is never taken for a hung one.
WINDOW_S = 10.0
START_TOKENS_PER_S = 1_000.0
START_COST_PER_S = 100.0

# Attention grows with the square of a length. Measured, a batch of one 8,192-token text takes 7.5
# times as long a token as batches of texts of up to 512; this says 9.
ATTENTION_TOKENS = 1_024

# Coalescing (decision 0012): another slot for a short batch takes the core that HTTP needs, where
# a request costs the device little more than HTTP (which takes a tenth of COALESCED_REQUEST_S_MAX).
COALESCED_REQUEST_S_MAX = 0.006
COALESCED_BATCH_SHARE = 1 / 3  # of a full batch: so much work is worth a core
COALESCED_BATCH_S_MAX = 0.02  # a slow model's batches are never short


def batch_cost(lengths: Iterable[int]) -> float:
    """Cost of sequences of *lengths*, in tokens of a short text; an upper estimate."""
    return sum(length * (1 + length / ATTENTION_TOKENS) for length in lengths)


@dataclass(frozen=True, slots=True)
class ThroughputEstimator:
    """Throughput of one model, by decayed sums over the batches that ran."""

    slot_count: int
    tokens: float = START_TOKENS_PER_S * 1e-6  # the start counts for a microsecond
    cost: float = START_COST_PER_S * 1e-6
    seconds: float = 1e-6  # of one slot

    def after(self, *, tokens: int, cost: float, duration_s: float, fill: float) -> Self:
        """The estimate with one more batch.

        *fill* in (0, 1] is the batch's share of its budget: a lone short text is slow for its
        tokens, and a night of such must not make the first full batch look expensive.
        """
        kept = math.exp(-fill * duration_s / WINDOW_S)
        return replace(
            self,
            tokens=self.tokens * kept + fill * tokens,
            cost=self.cost * kept + fill * cost,
            seconds=self.seconds * kept + fill * duration_s,
        )

    @property
    def tokens_per_s(self) -> float:
        """Of all slots together."""
        return self.slot_count * self.tokens / self.seconds

    def estimate_s(self, tokens: int) -> float:
        """Seconds one slot takes for *tokens* in batches of the usual kind."""
        return tokens * self.seconds / self.tokens

    def upper_bound_s(self, cost: float) -> float:
        """Seconds one slot takes at most for a batch of *cost*, as far as can be told."""
        return cost * self.seconds / self.cost


def coalescing_delay_s(
    *, request_count: int, queued_s: float, full_batch_s: float, next_free_s: float
) -> float:
    """How long the last free slot leaves the queue to a busy one; 0 when it should serve it now.

    *queued_s* is what one slot would need for the *request_count* requests in the queue, and
    *full_batch_s* what a full batch takes. The first busy slot should be free in *next_free_s*,
    negative when it is late; it is waited for no longer than twice a short batch.
    """
    short_batch_s = min(COALESCED_BATCH_SHARE * full_batch_s, COALESCED_BATCH_S_MAX)
    is_short = queued_s < min(short_batch_s, request_count * COALESCED_REQUEST_S_MAX)
    if not is_short or next_free_s >= short_batch_s:
        return 0.0
    return max(0.0, next_free_s + short_batch_s)


class ModelQueue:
    """One model on a device: its queue, limits, batch budget and throughput.

    Everything is guarded by the scheduler's lock, but for `open`.
    """

    def __init__(
        self,
        model: str,
        backend: Backend,
        *,
        limits: QueueLimits,
        slot_count: int,
        observer: Observer,
    ) -> None:
        self.model = model
        self.backend = backend
        self.limits = limits
        self.observer = observer
        self.budget = backend.budget
        self.throughput = ThroughputEstimator(slot_count)
        self.requests = RequestQueue()
        self.open: set[Request] = set()  # without a reply; touched on the event loop alone
        self.device_s = 0.0  # spent on this model, by which models share the slots
        self._reported_depth = 0

    def check_admission(self, token_count: int) -> None:
        """Raise `Overloaded` unless a request of *token_count* is admitted.

        A short queue admits everything however slow the device is: a client that waits a minute is
        better served than one that is sent away. Beyond that the limits are seconds of work that
        fairness puts before the request's end, and tokens, which bound memory. What is refused to
        a request is refused to every larger one.
        """
        limits, depth, queued = self.limits, len(self.requests), self.requests.token_count
        if not depth or (depth < limits.always_requests and queued < limits.always_tokens):
            return
        tokens_per_s = self.throughput.tokens_per_s
        wait_s = queued / tokens_per_s
        if wait_s > limits.wait_s_max:  # else there is no need to sum over the requests
            wait_s = self.requests.tokens_before(token_count) / tokens_per_s
        room_in_s = (queued + token_count - limits.tokens_max) / tokens_per_s
        if wait_s > limits.wait_s_max:
            reason = (
                f"this request would wait about {wait_s:.0f} s, more than queue.wait_s_max, "
                f"{limits.wait_s_max:g} s"
            )
        elif room_in_s > 0:
            reason = (
                f"with this request's {token_count} they would be more than queue.tokens_max, "
                f"{limits.tokens_max}; there is room in about {room_in_s:.0f} s"
            )
        else:
            return
        raise Overloaded(
            f"The queue for {self.model} is full: {depth} requests with {queued} tokens wait; "
            f"{reason}. Please try again later.",
            retry_after_s=_retry_s(max(wait_s - limits.wait_s_max, room_in_s)),
        )

    def drop(self, request: Request) -> None:
        """Free the place of *request*; rows of it that are being computed are not kept."""
        if request.is_open:  # else it is complete, and its reply is read without the lock
            request.parts.clear()
        request.is_open = False
        self.requests.remove(request)

    def drop_late(self, request: Request) -> DeadlineExceeded:
        """Drop *request*, whose first batch did not start in time; retry when the queue is done."""
        self.drop(request)
        return DeadlineExceeded(
            f"The request waited too long for {self.model}. Please try again later.",
            retry_after_s=_retry_s(self.requests.token_count / self.throughput.tokens_per_s),
        )

    def depth_changed(self) -> QueueChanged | None:
        """The queue's depth, if it differs from what was last reported."""
        if len(self.requests) == self._reported_depth:
            return None
        self._reported_depth = len(self.requests)
        return QueueChanged(self.model, self._reported_depth, self.requests.token_count)


def _retry_s(wait_s: float) -> float:
    return spread_retry_s(wait_s, random.random())  # noqa: S311


@dataclass(eq=False, frozen=True, slots=True)
class ScheduledBatch:
    """A batch that a worker is to run."""

    queue: ModelQueue
    items: list[BatchItem]
    started_s: float
    expected_s: float


class Scheduler:
    """The queues of a device's models, and the batches that its slots run.

    The event loop calls `submit` and `cancel`. A slot's thread calls `next_batch`, then `complete`
    and `fail` for the requests in it, then `finish`.
    """

    def __init__(self, *, coalesces: bool, clock: Clock) -> None:
        """*coalesces*: the last free slot may leave its core to the event loop."""
        self._coalesces = coalesces
        self._clock = clock
        self._changed = threading.Condition()  # its lock guards all below
        self.queues: tuple[ModelQueue, ...] = ()
        self._running: list[ScheduledBatch] = []
        self._idle_count = 0
        self._is_coalescing = False  # a slot is free, and leaves the queue to the busy ones
        self._device_s = 0.0  # `device_s` of the queue served last
        self._closing_message: str | None = None  # why no request is admitted any more
        self._is_closed = False

    def add_queue(self, queue: ModelQueue) -> None:
        with self._changed:
            self.queues = (*self.queues, queue)

    def remove_queues(self) -> tuple[ModelQueue, ...]:
        """All queues, to the one caller that closes their backends."""
        with self._changed:
            queues, self.queues = self.queues, ()
        return queues

    def check_admission(self, queue: ModelQueue, token_count: int) -> None:
        """Raise what `submit` would for a request of *token_count*, or of more."""
        with self._changed:
            if self._closing_message is not None:
                raise Draining(self._closing_message, retry_after_s=RESTART_S)
            queue.check_admission(token_count)

    def submit(self, queue: ModelQueue, request: Request) -> None:
        """Put *request* in *queue*. Raises `Overloaded`, or `Draining` when stopping."""
        event = None
        with self._changed:
            self.check_admission(queue, request.tokens_left)
            if not queue.requests:  # no credit for the time it had nothing to do
                queue.device_s = max(queue.device_s, self._device_s)
            queue.requests.add(request)
            if self._idle_count or (self._is_coalescing and not self._coalescing_delay_s()):
                self._changed.notify()
            else:
                event = queue.depth_changed()
        if event is not None:
            queue.observer.observe(event)

    def cancel(self, queue: ModelQueue, request: Request) -> None:
        """Free what *request* holds, at once; its rows that are being computed are dropped."""
        with self._changed:
            queue.drop(request)

    def expire(self, queue: ModelQueue, request: Request) -> None:
        """On the event loop: fail *request*, whose deadline has come, unless it has started."""
        with self._changed:
            if request.started_s is None and request.is_open:
                _resolve([(request, queue.drop_late(request))])

    def next_batch(self) -> ScheduledBatch | None:
        """Wait for work and take the next batch; None once closed."""
        with self._changed:
            while not self._is_closed:
                queue = self._next_queue()
                if queue is None:
                    self._idle_count += 1
                    self._changed.wait()
                    self._idle_count -= 1
                    continue
                is_last_free = not self._idle_count and not self._is_coalescing
                if is_last_free and (delay_s := self._coalescing_delay_s()):
                    self._is_coalescing = True
                    self._changed.wait(delay_s)
                    self._is_coalescing = False
                    continue
                batch = self._take_batch(queue)
                if (self._idle_count or self._is_coalescing) and self._next_queue() is not None:
                    self._changed.notify()
                if batch is not None:
                    return batch
            return None

    def complete(
        self,
        queue: ModelQueue,
        rows: Sequence[tuple[BatchItem, Vectors]],
        ran: BatchRan,
        cost: float,
    ) -> None:
        """Give *rows* to their requests, reply to the complete ones, and measure the throughput."""
        fill = min(1.0, ran.tokens / ran.tokens_max)
        with self._changed:
            queue.throughput = queue.throughput.after(
                tokens=ran.tokens, cost=cost, duration_s=ran.duration_s, fill=fill
            )
            complete = []
            for (request, indices), vectors in rows:
                if request.is_open and request.add_rows(indices, vectors):
                    request.is_open = False
                    complete.append(request)
        now_s = self._clock.now_s()
        _resolve_soon([(request, request.reply(now_s)) for request in complete])

    def fail(self, queue: ModelQueue, request: Request, error: EngineFault) -> None:
        """Reply to *request* with *error*, and drop what it still has in the queue."""
        self.cancel(queue, request)
        _resolve_soon([(request, error)])

    def shrink_budget(self, queue: ModelQueue, tokens: int) -> None:
        """Memory did not suffice for *tokens*: smaller batches from now on, of a useful size."""
        with self._changed:
            floor = -(-queue.backend.budget.tokens_max // 8)
            tokens_max = max(floor, min(queue.budget.tokens_max, tokens // 2))
            queue.budget = BatchBudget(tokens_max, queue.budget.sequences_max)

    def finish(self, batch: ScheduledBatch) -> None:
        """Take note that the slot of *batch* is free."""
        queue = batch.queue
        with self._changed:
            self._running.remove(batch)
            queue.device_s += self._clock.now_s() - batch.started_s - batch.expected_s
            event = queue.depth_changed()
        if event is not None:
            queue.observer.observe(event)

    def stop_admitting(self, message: str) -> None:
        """Refuse every request from now on, with *message*."""
        with self._changed:
            self._closing_message = message

    def fail_all(self, error: Callable[[], ServiceError]) -> None:
        """On the event loop: fail every request that has no reply yet."""
        for queue in self.queues:
            for request in list(queue.open):
                self.cancel(queue, request)
                _resolve([(request, error())])

    def close(self) -> None:
        """No more batches for any slot."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _next_queue(self) -> ModelQueue | None:
        """Of the models with work, the one the device has spent least time on."""
        waiting = [queue for queue in self.queues if queue.requests]
        return min(waiting, key=lambda queue: queue.device_s, default=None)

    def _coalescing_delay_s(self) -> float:
        """How long the last free slot may leave all that waits; 0 when it should not."""
        if not self._coalesces or not self._running:
            return 0.0
        next_free_s = min(batch.started_s + batch.expected_s for batch in self._running)
        return min(
            coalescing_delay_s(
                request_count=len(queue.requests),
                queued_s=queue.throughput.estimate_s(queue.requests.token_count),
                full_batch_s=queue.throughput.estimate_s(queue.budget.tokens_max),
                next_free_s=next_free_s - self._clock.now_s(),
            )
            for queue in self.queues
            if queue.requests
        )

    def _take_batch(self, queue: ModelQueue) -> ScheduledBatch | None:
        """The next batch of *queue*; None when all that waited has passed its deadline."""
        now_s = self._clock.now_s()
        candidates = islice(queue.requests.new, CANDIDATES_MAX)
        late = [request for request in candidates if now_s >= request.deadline_s]
        _resolve_soon([(request, queue.drop_late(request)) for request in late])

        budget, tokens_before = queue.budget, queue.requests.token_count
        share = -(-tokens_before // (self._idle_count + 1))  # of each free slot
        if share < budget.tokens_max:
            split = max(share, -(-budget.tokens_max // SPLIT_MAX))
            budget = BatchBudget(split, budget.sequences_max)
        items = queue.requests.take_batch(budget)
        if not items:
            return None
        for request, _ in items:
            if request.started_s is None:
                request.started_s = now_s
        expected_s = queue.throughput.estimate_s(tokens_before - queue.requests.token_count)
        self._device_s = queue.device_s
        queue.device_s += expected_s
        batch = ScheduledBatch(queue, items, now_s, expected_s)
        self._running.append(batch)
        return batch


def _resolve(replies: Sequence[tuple[Request, Reply | ServiceError]]) -> None:
    """On the event loop: set the futures that are still awaited."""
    for request, reply in replies:
        if request.future.done():
            continue
        if isinstance(reply, Reply):
            request.future.set_result(reply)
        else:
            request.future.set_exception(reply)


def _resolve_soon(replies: Sequence[tuple[Request, Reply | ServiceError]]) -> None:
    """From a slot's thread: wake the event loop, once for all of *replies*."""
    if replies:
        loop: asyncio.AbstractEventLoop = replies[0][0].future.get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(_resolve, replies)
