"""Requests, and the queue that serves them by deficit round robin. Plain state: no clock, no lock.

The scheduler's lock guards all of it, but for a request's future, which its event loop sets.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

from trivec.core.types import BatchBudget, Output, Reply, Sequences, Vectors

# A batch pads its attention to its longest sequence. Within a factor of two that is cheap; up to 64
# tokens attention is 1 % of BGE-M3's arithmetic, so short texts may always share a batch.
LENGTH_RATIO_MAX = 2
SHORT_TOKENS_MAX = 64

CANDIDATES_MAX = 64  # requests looked at to fill a batch
OVERTAKING_BATCHES_MAX = 4  # while new requests keep coming, older ones still have one in five


@dataclass(eq=False, slots=True)
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
    background: bool = False  # served only while no other request waits
    order: list[int] = field(init=False)  # sequence indices, longest first
    lengths: list[int] = field(init=False)  # tokens of each of `order`
    tokens_left: int = field(init=False)  # in no batch yet
    taken: int = 0  # how many of `order` are in batches
    deficit: int = 0  # tokens it may take in its turn, as in deficit round robin
    has_turn: bool = False
    queue_index: int | None = None  # in the queue's array of tokens left; None: not queued
    is_open: bool = True  # its rows are still wanted
    started_s: float | None = None  # its first batch
    parts: list[tuple[list[int], Vectors]] = field(default_factory=list)  # rows, and whose they are
    rows_left: int = field(init=False)  # in no part yet

    def __post_init__(self) -> None:
        self.tokens_left, self.rows_left = self.sequences.token_count, len(self.sequences)
        if self.rows_left == 1:
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

    def reply(self, now_s: float) -> Reply:
        """The reply, once every row is there: row i for sequence i."""
        assert self.started_s is not None
        indices, vectors = [i for own, _ in self.parts for i in own], self.parts[0][1]
        if len(self.parts) > 1 or indices != sorted(indices):
            vectors = Vectors.join([own for _, own in self.parts], np.argsort(indices))
        queue_s, compute_s = self.started_s - self.submitted_s, now_s - self.started_s
        return Reply(vectors, queue_s=queue_s, compute_s=compute_s)


class BatchItem(NamedTuple):
    """What one request has in a batch."""

    request: Request
    indices: list[int]  # of its sequences, in the order of the batch's rows


class RequestQueue:
    """Requests with sequences in no batch yet, served by deficit round robin.

    `new` requests have had no batch, `active` ones take turns; each is in order of service. Changes
    are O(1), and a choice costs the same whatever waits: it looks at `CANDIDATES_MAX` others.
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
            self._tokens_left = np.pad(self._tokens_left, (0, count))
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

        A batch belongs to the next request. Others join it only if that is then exhausted, and only
        with all they have left: so a bulk request never lengthens a query's batch, and a query
        shares one with other queries, or with the tail of something large. A sequence longer than
        the budget runs alone.
        """
        request = self._next_request(budget.tokens_max)
        if request is None:
            return []
        was_new = request in self.new
        longest = shortest = tokens = request.next_length
        end = request.taken + 1
        for length in request.lengths[end : request.taken + budget.sequences_max]:
            is_similar = longest <= max(LENGTH_RATIO_MAX * length, SHORT_TOKENS_MAX)
            if tokens + length > budget.tokens_max or not is_similar:
                break
            tokens, shortest, end = tokens + length, length, end + 1
        items = [self._take(request, end, tokens)]
        if request.is_exhausted:
            sequences = len(items[0].indices)
            for other in list(islice(self, CANDIDATES_MAX)):  # a copy: taking changes the queue
                if tokens >= budget.tokens_max or sequences >= budget.sequences_max:
                    break
                tokens_with = tokens + other.tokens_left
                sequences_with = sequences + len(other.order) - other.taken
                longest_with = max(longest, other.next_length)
                shortest_with = min(shortest, other.lengths[-1])
                if (
                    tokens_with <= budget.tokens_max
                    and sequences_with <= budget.sequences_max
                    and longest_with <= max(LENGTH_RATIO_MAX * shortest_with, SHORT_TOKENS_MAX)
                ):
                    items.append(self._take(other, len(other.order), other.tokens_left))
                    tokens, sequences = tokens_with, sequences_with
                    longest, shortest = longest_with, shortest_with
        else:
            # Batches are not cut to the deficit, since tiny ones are dear: the rest is carried
            # over. A turn goes on while at least half a batch of it is left.
            request.deficit -= tokens
            request.has_turn = request.deficit >= max(request.next_length, budget.tokens_max // 2)
            if was_new:
                self._activate(request)
            self.active.move_to_end(request, last=not request.has_turn)
        self._overtaking_tokens = self._overtaking_tokens + tokens if was_new else 0
        return items

    def _next_request(self, quantum: int) -> Request | None:
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
            for _ in range(len(self.active)):
                request = next(iter(self.active))
                request.deficit += quantum
                if request.deficit >= request.next_length:
                    request.has_turn = True
                    return request
                self.active.move_to_end(request)
            # Every next text is longer than a turn: grant at once the rounds that none can use.
            rounds = min((one.next_length - one.deficit - 1) // quantum for one in self.active)
            for one in self.active:
                one.deficit += rounds * quantum
        return None

    def _activate(self, request: Request) -> None:
        """Move *request* from the new ones to the end of the active ones."""
        del self.new[request]
        self.active[request] = None

    def _take(self, request: Request, end: int, tokens: int) -> BatchItem:
        """Take the sequences of *request* up to *end* in its order: *tokens* of them."""
        item = BatchItem(request, request.order[request.taken : end])
        request.taken = end
        request.tokens_left -= tokens
        self.token_count -= tokens
        if request.is_exhausted:
            self.remove(request)
        else:
            self._tokens_left[request.queue_index] = request.tokens_left
        return item
