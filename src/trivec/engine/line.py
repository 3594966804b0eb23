"""What waits for one model: requests, and the tokens each has left.

Plain state with O(1) changes; whoever holds it holds the lock. It knows no clock, no future and no
policy: who goes next is `batcher`'s, who may join is `admission`'s.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from trivec.core.types import Output, Sequences


@dataclass(eq=False, slots=True)
class Request:
    """One client's list of sequences, as far as choosing goes.

    Sequences leave longest first: neighbours in that order are of similar length, so a row of them
    pads little, and the short ones that come last fill the ends of rows.
    """

    sequences: Sequences
    outputs: Output
    deadline_s: float  # on the engine's clock: when its first batch must have begun
    order: list[int] = field(init=False)  # sequence indices, longest first
    lengths: list[int] = field(init=False)  # tokens of each of `order`
    tokens_left: int = field(init=False)  # not yet in any batch
    taken: int = 0  # how many of `order` are in batches
    credit: int = 0  # tokens it may still take in its turn, or has saved up
    turn_is_open: bool = False
    place: int | None = None  # in the line's account of tokens left; None: not in line
    is_wanted: bool = True  # somebody still waits for its vectors

    def __post_init__(self) -> None:
        self.tokens_left = self.sequences.token_count
        if len(self.sequences) == 1:
            self.order, self.lengths = [0], [self.tokens_left]
            return
        lengths = self.sequences.lengths()  # [sequences]
        order = np.argsort(-lengths, kind="stable")
        self.order = order.tolist()
        self.lengths = lengths[order].tolist()

    @property
    def is_exhausted(self) -> bool:
        """Every sequence is in some batch."""
        return self.taken == len(self.order)

    @property
    def next_length(self) -> int:
        return self.lengths[self.taken]


R = TypeVar("R", bound=Request)


class Line(Generic[R]):
    """Requests in line. `fresh` had no turn yet, `ring` take turns; each in order of service."""

    def __init__(self) -> None:
        self.fresh: OrderedDict[R, None] = OrderedDict()
        self.ring: OrderedDict[R, None] = OrderedDict()
        self.passed_over_tokens = 0  # taken by fresh requests since the ring last had a turn
        self.token_count = 0
        self._left = np.zeros(64, np.int64)  # [places]: tokens left of each request, 0 where free
        self._free_places = list(range(64))

    def __len__(self) -> int:
        return len(self.fresh) + len(self.ring)

    def __iter__(self) -> Iterator[R]:
        yield from self.fresh
        yield from self.ring

    def tokens_before(self, token_count: int) -> int:
        """Tokens that fair turns serve before a new request of *token_count* is through.

        Σ min(tokens left of r, token_count) over the requests r in line (ENGINE.md, Scheduling).
        """
        return int(np.minimum(self._left, token_count).sum())

    def join(self, request: R) -> None:
        assert request.place is None
        if not self._free_places:
            count = len(self._left)
            self._left = np.concatenate((self._left, np.zeros(count, np.int64)))
            self._free_places = list(range(count, 2 * count))
        request.place = self._free_places.pop()
        self._left[request.place] = request.tokens_left
        self.token_count += request.tokens_left
        self.fresh[request] = None

    def leave(self, request: R) -> None:
        """Free the tokens of *request* at once; nothing if it left before."""
        if request.place is None:
            return
        self._left[request.place] = 0
        self._free_places.append(request.place)
        request.place = None
        self.token_count -= request.tokens_left
        queue = self.fresh if request in self.fresh else self.ring
        del queue[request]

    def take(self, request: R, end: int, token_count: int) -> list[int]:
        """Sequence indices of *request* up to place *end* of its order: out of the line.

        *token_count* is what they hold together.
        """
        assert request.place is not None
        indices = request.order[request.taken : end]
        request.taken = end
        request.tokens_left -= token_count
        self.token_count -= token_count
        self._left[request.place] = request.tokens_left
        if request.is_exhausted:
            self.leave(request)
        return indices

    def put_in_ring(self, request: R) -> None:
        """*request* had its first visit: from now on it takes turns, starting at the front."""
        del self.fresh[request]
        self.ring[request] = None
        self.ring.move_to_end(request, last=False)
