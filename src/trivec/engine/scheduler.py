"""Scheduler: admission, fairness between requests and models, and the choice of each batch.

From the top: pure policy (`ThroughputEstimator`, `coalescing_delay_s`, and the deficit round robin
of `RequestQueue`), `ModelQueue` with a model's admission, and `Scheduler`, where requests and free
worker slots meet behind one lock. The lock is held to choose (tens of µs), never to compute.
"""

import asyncio
import math
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np

from trivec.core.errors import DeadlineExceeded, Draining, EngineFault, Overloaded, ServiceError
from trivec.core.events import QueueChanged
from trivec.core.ports import Backend, Clock, Observer
from trivec.core.retry import spread_retry_s
from trivec.core.types import BatchBudget, Reply, Vectors
from trivec.engine.request import BatchItem, Request
from trivec.settings import QueueLimits

RESTART_S = 10.0  # after which a client should find a process that has started again

# The throughput estimate. WINDOW_S: device seconds after which a measurement counts for 1/e. Until
# the first batch: an int8 BGE-M3 on two cores, and a tenth of that for the upper bound, so that a
# cold device is never taken for a hung one.
WINDOW_S = 10.0
START_TOKENS_PER_S = 1_000.0
START_COST_PER_S = 100.0

# Attention grows with the square of a length. Measured, a batch of one 8,192-token text takes 7.5
# times as long a token as batches of texts of up to 512; this says 9.
ATTENTION_TOKENS = 1_024

# Coalescing (decision 0044): another slot for a short batch takes the core that HTTP needs, where
# a request costs the device little more than HTTP (which takes a tenth of COALESCED_REQUEST_S_MAX).
COALESCED_REQUEST_S_MAX = 0.006
COALESCED_BATCH_SHARE = 1 / 3  # of a full batch: so much work is worth a core
COALESCED_BATCH_S_MAX = 0.02  # a slow model's batches are never short

# A batch pads its attention to its longest sequence. Within a factor of two that is cheap; up to 64
# tokens attention is 1 % of BGE-M3's arithmetic, so short texts may always share a batch.
LENGTH_RATIO_MAX = 2
SHORT_TOKENS_MAX = 64

CANDIDATES_MAX = 64  # requests looked at to fill a batch
OVERTAKING_BATCHES_MAX = 4  # while new requests keep coming, older ones still have one in five
SPLIT_MAX = 4  # free slots share what waits, in batches of no less than this part of the budget


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

    def after(
        self, *, tokens: int, cost: float, duration_s: float, fill: float
    ) -> "ThroughputEstimator":
        """The estimate with one more batch.

        *fill* in (0, 1] is the batch's share of its budget: a lone short text is slow for its
        tokens, and a night of such must not make the first full batch look expensive.
        """
        kept = math.exp(-fill * duration_s / WINDOW_S)
        return ThroughputEstimator(
            self.slot_count,
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


class RequestQueue:
    """Requests with sequences in no batch yet, served by deficit round robin.

    `new` requests have had no batch, `active` ones take turns; each is in order of service. Changes
    are O(1), and a choice costs the same whatever waits: one leader and `CANDIDATES_MAX` others.
    """

    def __init__(self) -> None:
        self.new: OrderedDict[Request, None] = OrderedDict()
        self.active: OrderedDict[Request, None] = OrderedDict()
        self.token_count = 0
        self._overtaking_tokens = 0  # taken by new requests since an active one had a turn
        self._tokens_left = np.zeros(64, np.int64)  # by `Request.queue_index`; 0 where free
        self._free_indices = list(range(64))

    def __len__(self) -> int:
        return len(self.new) + len(self.active)

    def __iter__(self) -> Iterator[Request]:
        return chain(self.new, self.active)

    def tokens_before(self, token_count: int) -> int:
        """Tokens that are served before a new request of *token_count* is finished.

        Σ min(tokens left of r, token_count) over the requests r in the queue.
        """
        return int(np.minimum(self._tokens_left, token_count).sum())

    def add(self, request: Request) -> None:
        assert request.queue_index is None
        if not self._free_indices:
            count = len(self._tokens_left)
            self._tokens_left = np.concatenate((self._tokens_left, np.zeros(count, np.int64)))
            self._free_indices = list(range(count, 2 * count))
        request.queue_index = self._free_indices.pop()
        self._tokens_left[request.queue_index] = request.tokens_left
        self.token_count += request.tokens_left
        self.new[request] = None

    def remove(self, request: Request) -> None:
        """Free the tokens of *request* at once; nothing if it is not in the queue."""
        if request.queue_index is None:
            return
        self._tokens_left[request.queue_index] = 0
        self._free_indices.append(request.queue_index)
        request.queue_index = None
        self.token_count -= request.tokens_left
        del (self.new if request in self.new else self.active)[request]

    def take_batch(self, budget: BatchBudget) -> list[BatchItem]:
        """Remove and return the next batch; empty only when the queue is.

        A batch belongs to one leader. Others join it only once the leader is exhausted, and only
        with all they have left: so a bulk request never lengthens a query's batch, and a query
        shares one with other queries, or with the tail of something large. A sequence longer than
        the budget runs alone.
        """
        leader = self._next_leader(budget.tokens_max)
        if leader is None:
            return []
        batch = _OpenBatch(budget)
        was_new = leader in self.new
        items = [self._take(leader, batch)]
        if leader.is_exhausted:
            for other in list(islice(self, CANDIDATES_MAX)):  # a copy: taking changes the queue
                if batch.is_full:
                    break
                rest = len(other.order) - other.taken
                if batch.fits(rest, other.tokens_left, other.lengths[-1], other.next_length):
                    items.append(self._take(other, batch))
        else:
            # Batches are not cut to the deficit, since tiny ones are dear: the rest is carried
            # over. A turn goes on while at least half a batch of it is left.
            leader.deficit -= batch.tokens
            leader.has_turn = leader.deficit >= max(leader.next_length, budget.tokens_max // 2)
            if was_new:
                self._activate(leader)
            self.active.move_to_end(leader, last=not leader.has_turn)
        self._overtaking_tokens = self._overtaking_tokens + batch.tokens if was_new else 0
        return items

    def _next_leader(self, quantum: int) -> Request | None:
        """The request to serve next, with a deficit of at least its next sequence.

        First one whose turn is not over; then new ones in order of arrival, unless they overtook
        the active ones for long enough; then the active ones, each granted *quantum* at its turn.
        """
        front = next(iter(self.active), None)
        if front is not None and front.has_turn:
            return front
        is_active_due = self._overtaking_tokens >= OVERTAKING_BATCHES_MAX * quantum
        while self.new and not (self.active and is_active_due):
            request = next(iter(self.new))
            if request.next_length <= quantum:
                request.deficit = quantum
                return request
            self._activate(request)  # a text longer than a turn must not hold up the others
        for _ in range(len(self.active)):  # almost always the first
            request = next(iter(self.active))
            request.deficit += quantum
            if request.deficit >= request.next_length:
                break
            self.active.move_to_end(request)
        else:
            if not self.active:
                return None
            # All save up for texts longer than a turn: grant the rounds nobody can use at once.
            rounds = min(-(-(one.next_length - one.deficit) // quantum) for one in self.active)
            for one in self.active:
                one.deficit += rounds * quantum
            request = next(one for one in self.active if one.deficit >= one.next_length)
            self.active.move_to_end(request, last=False)
        request.has_turn = True
        return request

    def _activate(self, request: Request) -> None:
        """Move *request* from the new ones to the end of the active ones."""
        del self.new[request]
        self.active[request] = None

    def _take(self, request: Request, batch: "_OpenBatch") -> BatchItem:
        """Fill *batch* with the next sequences of *request*, as many as fit."""
        assert request.queue_index is not None
        lengths, begin, end = request.lengths, request.taken, request.taken
        tokens_before = batch.tokens
        while end < len(lengths) and batch.fits(1, lengths[end], lengths[end], lengths[end]):
            batch.add(lengths[end])
            end += 1
        tokens = batch.tokens - tokens_before
        request.taken = end
        request.tokens_left -= tokens
        self.token_count -= tokens
        self._tokens_left[request.queue_index] = request.tokens_left
        if request.is_exhausted:
            self.remove(request)
        return BatchItem(request, request.order[begin:end])


class _OpenBatch:
    """The batch that is being filled."""

    __slots__ = ("budget", "longest", "sequences", "shortest", "tokens")

    def __init__(self, budget: BatchBudget) -> None:
        self.budget = budget
        self.tokens = self.sequences = self.longest = 0
        self.shortest = budget.tokens_max

    @property
    def is_full(self) -> bool:
        return self.tokens >= self.budget.tokens_max or self.sequences >= self.budget.sequences_max

    def fits(self, sequences: int, tokens: int, shortest: int, longest: int) -> bool:
        """Whether so many *sequences* of *tokens* together fit, in number and in length."""
        if not self.sequences:
            return True
        longest, shortest = max(longest, self.longest), min(shortest, self.shortest)
        return (
            self.tokens + tokens <= self.budget.tokens_max
            and self.sequences + sequences <= self.budget.sequences_max
            and longest <= max(LENGTH_RATIO_MAX * shortest, SHORT_TOKENS_MAX)
        )

    def add(self, length: int) -> None:
        self.tokens += length
        self.sequences += 1
        self.longest = max(self.longest, length)
        self.shortest = min(self.shortest, length)


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
        """Raise `Overloaded` unless a request of *token_count* is admitted, and any smaller one.

        A short queue admits everything however slow the device is: a client that waits a minute is
        better served than one that is sent away. Beyond that the limits are seconds of work that
        fairness puts before the request's end, and tokens, which bound memory.
        """
        limits, depth, queued = self.limits, len(self.requests), self.requests.token_count
        if not depth or (depth < limits.always_requests and queued < limits.always_tokens):
            return
        tokens_per_s = self.throughput.tokens_per_s
        wait_s = queued / tokens_per_s
        if wait_s > limits.wait_s_max:  # a shorter queue need not be summed
            wait_s = self.requests.tokens_before(token_count) / tokens_per_s
        room_in_s = (queued + token_count - limits.tokens_max) / tokens_per_s
        retry_s = max(wait_s - limits.wait_s_max, room_in_s)
        if retry_s <= 0:
            return
        if wait_s > limits.wait_s_max:
            reason = (
                f"this request would wait about {wait_s:.0f} s, more than queue.wait_s_max, "
                f"{limits.wait_s_max:g} s"
            )
        else:
            reason = (
                f"with this request's {token_count} they would be more than queue.tokens_max, "
                f"{limits.tokens_max}; there is room in about {room_in_s:.0f} s"
            )
        raise Overloaded(
            f"The queue for {self.model} is full: {depth} requests with {queued} tokens wait; "
            f"{reason}. Please try again later.",
            retry_after_s=spread_retry_s(retry_s, random.random()),  # noqa: S311
        )

    def deadline_exceeded(self) -> DeadlineExceeded:
        """For a request whose first batch did not start in time; retry when the queue is done."""
        wait_s = self.requests.token_count / self.throughput.tokens_per_s
        return DeadlineExceeded(
            f"The request waited too long for {self.model}. Please try again later.",
            retry_after_s=spread_retry_s(wait_s, random.random()),  # noqa: S311
        )

    def drop(self, request: Request) -> None:
        """Free the place of *request*; rows of it that are being computed are not kept."""
        request.is_open = False
        self.requests.remove(request)
        request.parts.clear()

    def depth_changed(self) -> QueueChanged | None:
        """The queue's depth, if it differs from what was last reported."""
        if len(self.requests) == self._reported_depth:
            return None
        self._reported_depth = len(self.requests)
        return QueueChanged(self.model, self._reported_depth, self.requests.token_count)


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
        self._queues: tuple[ModelQueue, ...] = ()
        self._running: list[ScheduledBatch] = []
        self._idle_count = 0
        self._is_coalescing = False  # a slot is free, and leaves the queue to the busy ones
        self._device_s = 0.0  # `device_s` of the queue served last
        self._closing_message: str | None = None  # why no request is admitted any more
        self._is_closed = False

    @property
    def queues(self) -> tuple[ModelQueue, ...]:
        return self._queues

    def add_queue(self, queue: ModelQueue) -> None:
        with self._changed:
            self._queues = (*self._queues, queue)

    def remove_queues(self) -> tuple[ModelQueue, ...]:
        """All queues, to the one caller that closes their backends."""
        with self._changed:
            queues, self._queues = self._queues, ()
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
            if request.started_s is not None or not request.is_open:
                return
            queue.drop(request)
            error = queue.deadline_exceeded()
        _resolve([(request, error)])

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

    def measure(self, queue: ModelQueue, tokens: int, cost: float, duration_s: float) -> None:
        """Take a call that did not fail into the estimate of *queue*'s throughput."""
        with self._changed:
            queue.throughput = queue.throughput.after(
                tokens=tokens,
                cost=cost,
                duration_s=duration_s,
                fill=min(1.0, tokens / queue.budget.tokens_max),
            )

    def shrink_budget(self, queue: ModelQueue, tokens: int) -> None:
        """Memory did not suffice for *tokens*: smaller batches from now on, of a useful size."""
        with self._changed:
            floor = -(-queue.backend.budget.tokens_max // 8)
            tokens_max = max(floor, min(queue.budget.tokens_max, tokens // 2))
            queue.budget = BatchBudget(tokens_max, queue.budget.sequences_max)

    def complete(self, rows: Sequence[tuple[BatchItem, Vectors]]) -> None:
        """Give *rows* to their requests, and reply to those that have all of theirs."""
        with self._changed:
            complete = []
            for (request, indices), vectors in rows:
                if request.is_open and request.add_rows(indices, vectors):
                    request.is_open = False
                    complete.append(request)
        now_s = self._clock.now_s()
        _resolve_soon([(request, request.reply(now_s)) for request in complete])

    def fail(self, queue: ModelQueue, request: Request, error: EngineFault) -> None:
        """Reply to *request* with *error*, and drop what it still has in the queue."""
        with self._changed:
            queue.drop(request)
        _resolve_soon([(request, error)])

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
        for queue in self._queues:
            requests = list(queue.open)
            for request in requests:
                self.cancel(queue, request)
            _resolve([(request, error()) for request in requests])

    def close(self) -> None:
        """No more batches for any slot."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _next_queue(self) -> ModelQueue | None:
        """Of the models with work, the one the device has spent least time on."""
        waiting = [queue for queue in self._queues if queue.requests]
        return min(waiting, key=lambda queue: queue.device_s, default=None)

    def _coalescing_delay_s(self) -> float:
        """How long the last free slot may leave all that waits; 0 when it should not."""
        if not self._coalesces or not self._running:
            return 0.0
        now_s = self._clock.now_s()
        next_free_s = min(batch.started_s + batch.expected_s for batch in self._running) - now_s
        return min(
            coalescing_delay_s(
                request_count=len(queue.requests),
                queued_s=queue.throughput.estimate_s(queue.requests.token_count),
                full_batch_s=queue.throughput.estimate_s(queue.budget.tokens_max),
                next_free_s=next_free_s,
            )
            for queue in self._queues
            if queue.requests
        )

    def _take_batch(self, queue: ModelQueue) -> ScheduledBatch | None:
        """The next batch of *queue*; None when all that waited has passed its deadline."""
        now_s = self._clock.now_s()
        candidates = islice(queue.requests.new, CANDIDATES_MAX)
        late = [request for request in candidates if now_s >= request.deadline_s]
        for request in late:
            queue.drop(request)
        _resolve_soon([(request, queue.deadline_exceeded()) for request in late])

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
