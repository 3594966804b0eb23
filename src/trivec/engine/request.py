"""Requests, and the queue that serves them by deficit round robin. Plain state: no clock, no lock.

All of it is touched under the scheduler's lock, but for a request's future, which belongs to its
event loop.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from trivec.core.types import (
    BatchBudget,
    Float32Array,
    Output,
    Reply,
    Row,
    Rows,
    Sequences,
    Vectors,
)

# A batch pads its attention to its longest sequence. Within a factor of two that is cheap; up to 64
# tokens attention is 1 % of BGE-M3's arithmetic, so short texts may always share a batch.
LENGTH_RATIO_MAX = 2
SHORT_TOKENS_MAX = 64

CANDIDATES_MAX = 64  # requests looked at to fill a batch
OVERTAKING_BATCHES_MAX = 4  # while new requests keep coming, older ones still have one in five


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """One client's list of sequences, and the future of its reply.

    Sequences leave longest first: neighbours in that order are of similar length, so a batch of
    them pads little, and the short ones that come last fill the ends of batches.
    """

    sequences: Sequences
    outputs: Output
    future: "asyncio.Future[Reply]"
    submitted_s: float  # on the engine's clock, as is the deadline
    deadline_s: float  # by which its first batch must have started
    order: list[int] = field(init=False)  # sequence indices, longest first
    lengths: list[int] = field(init=False)  # tokens of each of `order`
    tokens_left: int = field(init=False)  # in no batch yet
    taken: int = 0  # how many of `order` are in batches
    deficit: int = 0  # tokens it may take in its turn, as in deficit round robin
    has_turn: bool = False
    queue_index: int | None = None  # in the queue's array of tokens left; None: not queued
    is_open: bool = True  # its rows are still wanted
    started_s: float | None = None  # its first batch
    parts: list[tuple[Sequence[int], Vectors]] = field(default_factory=list)  # rows by sequence
    row_count: int = 0  # in `parts`

    def __post_init__(self) -> None:
        self.tokens_left = self.sequences.token_count
        if len(self.sequences) == 1:
            self.order, self.lengths = [0], [self.tokens_left]
            return
        lengths = self.sequences.lengths()  # [sequences]
        order = np.argsort(-lengths, kind="stable")
        self.order, self.lengths = order.tolist(), lengths[order].tolist()

    @property
    def is_exhausted(self) -> bool:
        """Every sequence is in some batch."""
        return self.taken == len(self.order)

    @property
    def next_length(self) -> int:
        return self.lengths[self.taken]

    def add_rows(self, indices: Sequence[int], vectors: Vectors) -> bool:
        """Keep the rows of the sequences *indices*; whether the request is complete with them."""
        self.parts.append((indices, vectors))
        self.row_count += len(indices)
        return self.row_count == len(self.order)

    def reply(self, now_s: float) -> Reply:
        assert self.started_s is not None
        queue_s, compute_s = self.started_s - self.submitted_s, now_s - self.started_s
        return Reply(self._vectors(), queue_s=queue_s, compute_s=compute_s)

    def _vectors(self) -> Vectors:
        """All rows, row i for sequence i."""
        count, (indices, first) = len(self.order), self.parts[0]
        if len(self.parts) == 1 and indices == list(range(count)):
            return first
        gathered: dict[Output, Rows] = {}
        for output in {output for _, vectors in self.parts for output in vectors.rows}:
            rows = first[output]
            if isinstance(rows, np.ndarray):
                array: Float32Array = np.empty((count, *rows.shape[1:]), np.float32)
                for indices, vectors in self.parts:
                    array[indices] = np.asarray(vectors[output])
                gathered[output] = array
                continue
            listed: list[Row | None] = [None] * count
            for indices, vectors in self.parts:
                for i, row in zip(indices, vectors[output], strict=True):
                    listed[i] = row
            gathered[output] = tuple(listed)
        return Vectors(gathered)


class BatchItem(NamedTuple):
    """What one request has in a batch."""

    request: Request
    indices: list[int]  # of its sequences, in the order of the batch's rows


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
        while self.active:
            request = next(iter(self.active))
            request.deficit += quantum
            if request.deficit >= request.next_length:
                request.has_turn = True
                return request
            self.active.move_to_end(request)
        return None

    def _activate(self, request: Request) -> None:
        """Move *request* from the new ones to the end of the active ones."""
        del self.new[request]
        self.active[request] = None

    def _take(self, request: Request, batch: "_OpenBatch") -> BatchItem:
        """Fill *batch* with the next sequences of *request*, as many as fit."""
        assert request.queue_index is not None
        lengths, begin, tokens_before = request.lengths, request.taken, batch.tokens
        for length in islice(lengths, begin, None):
            if not batch.fits(1, length, length, length):
                break
            batch.add(length)
            request.taken += 1
        tokens = batch.tokens - tokens_before
        request.tokens_left -= tokens
        self.token_count -= tokens
        self._tokens_left[request.queue_index] = request.tokens_left
        if request.is_exhausted:
            self.remove(request)
        return BatchItem(request, request.order[begin : request.taken])


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
