"""Who runs next: deficit round robin between requests, similar lengths together.

Pure: it takes a line and a budget and returns a batch; no clock, lock or thread. A choice costs
the same whatever waits: it looks at one leader and at most `CANDIDATES_MAX` others.
"""

from dataclasses import dataclass
from itertools import chain, islice
from typing import Generic

from trivec.core.types import BatchBudget
from trivec.engine.line import Line, R

CANDIDATES_MAX = 64  # requests looked at to top up a row

# A row pads its attention to its longest sequence. Within a factor of two that is cheap; up to 64
# tokens attention is 1 % of BGE-M3's arithmetic, so short texts may always go together.
LENGTH_RATIO_MAX = 2
SHORT_TOKENS_MAX = 64

# The age bound: while fresh requests keep coming, the ring still has one row in five.
PASSED_OVER_ROWS_MAX = 4


@dataclass(frozen=True, slots=True)
class Share(Generic[R]):
    """What one request has in a batch."""

    request: R
    indices: list[int]  # of its sequences, in the order of the batch's rows
    token_count: int


def take_batch(line: Line[R], budget: BatchBudget) -> list[Share[R]]:
    """Remove and return the next batch; empty only when the line is.

    A batch is one leader's row. Others join it only once the leader is through, and only with all
    they have left: so a bulk request never lengthens a query's row, and a query rides along with
    another, or with the tail of something large. A sequence longer than the budget runs alone.
    """
    leader = _leader(line, budget.tokens_max)
    if leader is None:
        return []
    row = _Row(budget)
    was_fresh = leader in line.fresh
    shares = [_take(line, leader, row)]
    if leader.is_exhausted:
        shares += _top_up(line, row)
    else:
        _charge(line, leader, row)
    line.passed_over_tokens = line.passed_over_tokens + row.tokens if was_fresh else 0
    return shares


class _Row:
    """The batch being filled."""

    __slots__ = ("budget", "longest", "sequences", "shortest", "tokens")

    def __init__(self, budget: BatchBudget) -> None:
        self.budget = budget
        self.tokens = 0
        self.sequences = 0
        self.longest = 0
        self.shortest = budget.tokens_max

    @property
    def is_full(self) -> bool:
        return self.tokens >= self.budget.tokens_max or self.sequences >= self.budget.sequences_max

    def holds(self, length: int) -> bool:
        if self.sequences == 0:
            return True
        return (
            self.tokens + length <= self.budget.tokens_max
            and self.sequences < self.budget.sequences_max
            and _are_similar(min(self.shortest, length), max(self.longest, length))
        )

    def holds_all_of(self, request: R) -> bool:
        """Whether everything that *request* has left fits, and in length as well."""
        return (
            self.tokens + request.tokens_left <= self.budget.tokens_max
            and self.sequences + len(request.order) - request.taken <= self.budget.sequences_max
            and _are_similar(
                min(self.shortest, request.lengths[-1]), max(self.longest, request.next_length)
            )
        )

    def add(self, length: int) -> None:
        self.tokens += length
        self.sequences += 1
        self.longest = max(self.longest, length)
        self.shortest = min(self.shortest, length)


def _are_similar(shortest: int, longest: int) -> bool:
    return longest <= max(LENGTH_RATIO_MAX * shortest, SHORT_TOKENS_MAX)


def _leader(line: Line[R], quantum: int) -> R | None:
    """Whose turn it is, with credit for at least its next sequence.

    First whoever has not finished its turn; then fresh requests in order of arrival, unless they
    passed the ring over for long enough; then the ring.
    """
    front = next(iter(line.ring), None)
    if front is not None and front.turn_is_open:
        return front
    is_ring_due = line.passed_over_tokens >= PASSED_OVER_ROWS_MAX * quantum
    while line.fresh and not (line.ring and is_ring_due):
        fresh = next(iter(line.fresh))
        if fresh.next_length <= quantum:
            fresh.credit = quantum
            return fresh
        # A text longer than a turn saves up for itself in the ring, lest it hold up all others.
        line.put_in_ring(fresh)
        line.ring.move_to_end(fresh)
    return _ring_leader(line, quantum) if line.ring else None


def _ring_leader(line: Line[R], quantum: int) -> R:
    """The next in the ring that can afford its next sequence; each visit grants one quantum."""
    for _ in range(len(line.ring)):
        front = next(iter(line.ring))
        front.credit += quantum
        if front.credit >= front.next_length:
            front.turn_is_open = True
            return front
        line.ring.move_to_end(front)
    # All save up for texts longer than a turn. Grant at once the rounds that nobody could use.
    rounds = min(-(-(one.next_length - one.credit) // quantum) for one in line.ring)
    for one in line.ring:
        one.credit += rounds * quantum
    leader = next(one for one in line.ring if one.credit >= one.next_length)
    leader.turn_is_open = True
    line.ring.move_to_end(leader, last=False)
    return leader


def _take(line: Line[R], request: R, row: _Row) -> Share[R]:
    """Fill *row* with the next sequences of *request*, as many as fit."""
    lengths = request.lengths
    end, tokens_before = request.taken, row.tokens
    while end < len(lengths) and row.holds(lengths[end]):
        row.add(lengths[end])
        end += 1
    token_count = row.tokens - tokens_before
    return Share(request, line.take(request, end, token_count), token_count)


def _top_up(line: Line[R], row: _Row) -> list[Share[R]]:
    """Whoever would be through with this row, in order of service."""
    shares = []
    candidates = list(islice(chain(line.fresh, line.ring), CANDIDATES_MAX))  # taking removes them
    for other in candidates:
        if row.is_full:
            break
        if row.holds_all_of(other):
            shares.append(_take(line, other, row))
    return shares


def _charge(line: Line[R], leader: R, row: _Row) -> None:
    """Charge *leader* for its row, and end its turn unless at least half of it is left.

    Rows are not cut to the credit, since a tiny row is dear: what is left or overdrawn is carried.
    """
    if leader in line.fresh:
        line.put_in_ring(leader)
    leader.credit -= row.tokens
    leader.turn_is_open = leader.credit >= max(leader.next_length, row.budget.tokens_max // 2)
    if not leader.turn_is_open:
        line.ring.move_to_end(leader)
