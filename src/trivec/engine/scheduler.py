"""Scheduler: where a device's queues and its free worker slots meet, behind one lock.

It admits requests, shares the device between models, chooses each batch and replies to requests.
The lock is held to choose (tens of µs), never to compute.
"""

import asyncio
import math
import random
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

from trivec.core.clock import resolve
from trivec.core.errors import DeadlineExceeded, Draining, Overloaded, ServiceError
from trivec.core.events import BatchRan
from trivec.core.health import QueueLoad
from trivec.core.ports import Backend, Clock
from trivec.core.types import BatchBudget, Output, Sequences, Vectors
from trivec.engine.request import CANDIDATES_MAX, BatchItem, Request, RequestQueue
from trivec.settings import QueueLimits

RESTART_S = 10.0  # after which a client should find a process that has started again
# When a refused client should come back, spread so that not all come at once.
RETRY_S_MIN = 5.0  # official clients retry twice: told 1 s, they give up after three
RETRY_S_MAX = 60.0  # and told more than a minute they do not wait at all
SPREAD = 0.5  # the last of those refused at one moment comes back this much later than the first
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
    """Throughput of one model in one slot, by decayed sums over the batches that ran."""

    tokens: float = START_TOKENS_PER_S * 1e-6  # the start counts for a microsecond
    cost: float = START_COST_PER_S * 1e-6
    seconds: float = 1e-6

    def after(self, ran: BatchRan, cost: float) -> "ThroughputEstimator":
        """The estimate with one more batch, which counts by its share of its budget.

        A lone short text is slow for its tokens, and a night of such must not make the first full
        batch look expensive.
        """
        fill = min(1.0, ran.tokens / ran.tokens_max)
        kept = math.exp(-fill * ran.duration_s / WINDOW_S)
        return ThroughputEstimator(
            tokens=self.tokens * kept + fill * ran.tokens,
            cost=self.cost * kept + fill * cost,
            seconds=self.seconds * kept + fill * ran.duration_s,
        )

    @property
    def s_per_token(self) -> float:
        """In batches of the usual kind."""
        return self.seconds / self.tokens

    @property
    def s_per_cost(self) -> float:
        """Times the cost of a batch: the most that it should take."""
        return self.seconds / self.cost


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


@dataclass(eq=False, slots=True)
class ModelQueue:
    """One model on a device. The scheduler's lock guards all of it, but for `open`."""

    model: str
    backend: Backend
    limits: QueueLimits
    budget: BatchBudget  # the backend's, until memory runs short
    throughput: ThroughputEstimator = ThroughputEstimator()
    requests: RequestQueue = field(default_factory=RequestQueue)
    background: RequestQueue = field(default_factory=RequestQueue)  # of batch jobs; no limits
    open: set[Request] = field(default_factory=set)  # without a reply; of the event loop alone
    device_s: float = 0.0  # spent on this model, by which models share the slots

    @property
    def served_next(self) -> RequestQueue:
        """The queue that the next batch comes from: background requests where none other waits."""
        return self.requests or self.background


@dataclass(eq=False, frozen=True, slots=True)
class ScheduledBatch:
    """A batch that a worker is to run."""

    queue: ModelQueue
    items: list[BatchItem]
    started_s: float
    expected_s: float


class Scheduler:
    """The queues of a device's models, and the batches that its slots run.

    The event loop calls `submit`, `cancel` and `expire`. A slot's thread calls `next_batch`, then
    `complete` and `fail` for the requests in the batch.
    """

    def __init__(self, slot_count: int, *, coalesces: bool, clock: Clock) -> None:
        """*coalesces*: the last free slot may leave its core to the event loop."""
        self._slot_count = slot_count
        self._coalesces = coalesces
        self._clock = clock
        self._changed = threading.Condition()  # its lock guards all below, and may be taken again
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

    def loads(self) -> list[QueueLoad]:
        """What waits now, a model each. Called from any thread."""
        with self._changed:
            return [
                QueueLoad(
                    queue.model,
                    len(queue.requests),
                    tokens := queue.requests.token_count,
                    tokens * queue.throughput.s_per_token / self._slot_count,
                )
                for queue in self.queues
            ]

    def check_admission(
        self, queue: ModelQueue, token_count: int, *, background: bool = False
    ) -> None:
        """Raise `Overloaded` unless a request of *token_count* is admitted; `Draining` at the end.

        A short queue admits everything however slow the device is: a client that waits a minute is
        better served than one that is sent away. Beyond that the limits are seconds of work that
        fairness puts before the request's end, and tokens, which bound memory. What is refused to
        a request is refused to every larger one. A *background* request takes the place of none, and
        its sender bounds how many there are.
        """
        with self._changed:
            if self._closing_message is not None:
                raise Draining(self._closing_message, retry_after_s=RESTART_S)
            if background:
                return
            limits, depth, queued = queue.limits, len(queue.requests), queue.requests.token_count
            if not depth or (depth < limits.always_requests and queued < limits.always_tokens):
                return
            tokens_per_s = self._slot_count / queue.throughput.s_per_token
            wait_s = queued / tokens_per_s
            if wait_s > limits.wait_s_max:  # else there is no need to sum over the requests
                wait_s = queue.requests.tokens_before(token_count) / tokens_per_s
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
            f"The queue for {queue.model} is full: {depth} requests with {queued} tokens wait; "
            f"{reason}. Please try again later.",
            retry_after_s=spread_retry_s(max(wait_s - limits.wait_s_max, room_in_s)),
        )

    def submit(
        self,
        queue: ModelQueue,
        sequences: Sequences,
        outputs: Output,
        *,
        wait_s: float,
        continues: bool = False,
        background: bool = False,
    ) -> Request:
        """A request in *queue*, to start within *wait_s*. Raises what `check_admission` does, but
        one that *continues* an admitted one may exceed the limits: its caller bounds how many do.
        """
        future, now_s = asyncio.get_running_loop().create_future(), self._clock.now_s()
        request = Request(sequences, outputs, future, now_s, now_s + wait_s, background)
        with self._changed:
            if not continues or self._closing_message is not None:
                self.check_admission(queue, request.tokens_left, background=background)
            # No credit for the time it had nothing to do, or only what waits for all others.
            if not queue.requests and not (background and queue.background):
                queue.device_s = max(queue.device_s, self._device_s)
            (queue.background if background else queue.requests).add(request)
            if self._idle_count or (self._is_coalescing and not self._coalescing_delay_s()):
                self._changed.notify()
        return request

    def cancel(self, queue: ModelQueue, request: Request) -> None:
        """Free what *request* holds, at once; its rows that are being computed are dropped."""
        with self._changed:
            if request.is_open:  # else it is complete, and its reply is read without the lock
                request.parts.clear()
            request.is_open = False
            (queue.background if request.background else queue.requests).remove(request)

    def fail(self, queue: ModelQueue, request: Request, error: ServiceError) -> None:
        """Reply to *request* with *error*, and free what it holds."""
        self.cancel(queue, request)
        resolve([(request.future, error)])

    def expire(self, queue: ModelQueue, request: Request) -> None:
        """Fail *request*, whose deadline has come, unless it has started: retry after the queue."""
        with self._changed:
            if request.started_s is None and request.is_open:
                others = queue.requests.token_count - request.tokens_left
                others_s = others * queue.throughput.s_per_token / self._slot_count
                error = DeadlineExceeded(
                    f"The request waited too long for {queue.model}. Please try again later.",
                    retry_after_s=spread_retry_s(others_s),
                )
                self.fail(queue, request, error)

    def next_batch(self, *, finished: ScheduledBatch | None) -> ScheduledBatch | None:
        """Wait for work and take the next batch, once one is *finished*; None when closed."""
        with self._changed:
            if finished is not None:
                self._running.remove(finished)
                took_s = self._clock.now_s() - finished.started_s
                finished.queue.device_s += took_s - finished.expected_s
            while not self._is_closed:
                waiting = [queue for queue in self.queues if queue.requests]
                waiting = waiting or [queue for queue in self.queues if queue.background]
                is_last_free = not self._idle_count and not self._is_coalescing
                if not waiting:
                    self._idle_count += 1
                    self._changed.wait()
                    self._idle_count -= 1
                elif is_last_free and (delay_s := self._coalescing_delay_s()):
                    self._is_coalescing = True
                    self._changed.wait(delay_s)
                    self._is_coalescing = False
                elif batch := self._schedule(min(waiting, key=lambda queue: queue.device_s)):
                    is_any_free = self._idle_count or self._is_coalescing
                    if is_any_free and any(queue.served_next for queue in self.queues):
                        self._changed.notify()
                    return batch
            return None

    def complete(
        self, queue: ModelQueue, rows: list[tuple[BatchItem, Vectors]], ran: BatchRan, cost: float
    ) -> None:
        """Give *rows* to their requests, reply to the complete ones, and measure the throughput."""
        complete = []
        with self._changed:
            queue.throughput = queue.throughput.after(ran, cost)
            for (request, indices), vectors in rows:
                if request.is_open:
                    request.parts.append((indices, vectors))
                    request.rows_left -= len(indices)
                    if not request.rows_left:
                        request.is_open = False
                        complete.append(request)
        now_s = self._clock.now_s()
        resolve([(request.future, request.reply(now_s)) for request in complete])

    def shrink_budget(self, queue: ModelQueue, tokens: int) -> None:
        """Memory did not suffice for *tokens*: smaller batches from now on, of a useful size."""
        with self._changed:
            floor = -(-queue.backend.budget.tokens_max // 8)
            tokens_max = max(floor, min(queue.budget.tokens_max, tokens // 2))
            queue.budget = BatchBudget(tokens_max, queue.budget.sequences_max)

    def stop_admitting(self, message: str) -> None:
        """Refuse every request from now on, with the first *message* that was given."""
        with self._changed:
            self._closing_message = self._closing_message or message

    def close(self, error: Callable[[], ServiceError]) -> None:
        """On the event loop: fail what has no reply yet, each with its *error*; no more batches."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        for queue in self.queues:
            for request in queue.open:
                self.fail(queue, request, error())

    def _coalescing_delay_s(self) -> float:
        """How long the last free slot may leave all that waits; 0 when it should not."""
        if not self._coalesces or not self._running:
            return 0.0
        next_free_s = min(batch.started_s + batch.expected_s for batch in self._running)
        delays_s = (
            coalescing_delay_s(
                request_count=len(queue.requests),
                queued_s=queue.requests.token_count * queue.throughput.s_per_token,
                full_batch_s=queue.budget.tokens_max * queue.throughput.s_per_token,
                next_free_s=next_free_s - self._clock.now_s(),
            )
            for queue in self.queues
            if queue.requests
        )
        return min(delays_s, default=0.0)

    def _schedule(self, queue: ModelQueue) -> ScheduledBatch | None:
        """The next batch of *queue*; None when all that waited has passed its deadline."""
        now_s = self._clock.now_s()
        for request in list(islice(queue.requests.new, CANDIDATES_MAX)):
            if now_s >= request.deadline_s:
                self.expire(queue, request)

        requests = queue.served_next
        budget, tokens_before = queue.budget, requests.token_count
        share = -(-tokens_before // (self._idle_count + 1))  # of each free slot
        if share < budget.tokens_max:
            split = max(share, -(-budget.tokens_max // SPLIT_MAX))
            budget = BatchBudget(split, budget.sequences_max)
        items = requests.take_batch(budget)
        if not items:
            return None
        for request, _ in items:
            if request.started_s is None:
                request.started_s = now_s
        tokens = tokens_before - requests.token_count
        batch = ScheduledBatch(queue, items, now_s, tokens * queue.throughput.s_per_token)
        self._device_s = queue.device_s
        queue.device_s += batch.expected_s
        self._running.append(batch)
        return batch


def spread_retry_s(wait_s: float, share: float | None = None) -> float:
    """*wait_s*, at least 5, and up to half as much more by *share* in [0, 1), at random; at most 60."""
    share = random.random() if share is None else share  # noqa: S311
    return min(max(wait_s, RETRY_S_MIN), RETRY_S_MAX / (1 + SPREAD)) * (1 + SPREAD * share)
