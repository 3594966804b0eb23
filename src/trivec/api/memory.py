"""Byte budget: what the bodies, vectors and answers of all requests may hold at one time.

Each request has a `Held`, which grows as its body arrives and before its vectors are computed, and
is given back when its answer has left. Lives on the event loop; counts, and allocates nothing.

Nobody can take all of it. A request that holds little always fits: its part is kept free of large
ones. And a body that is still arriving gives way to a request that needs half of it or less, so that
those who send most of a body and stop are the first to be refused.
"""

import random
from collections.abc import Callable

from trivec.core.errors import AnswerTooLarge, Overloaded
from trivec.settings import MEBIBYTE, Settings

DEFAULT_BYTES_MAX = 512 * MEBIBYTE
DEFAULT_SHARE = 4  # a fourth of the memory that is ours, where that is less
BODIES_MIN = 8  # that fit in any budget; a body counts three times while it is read and parsed
GIVES_WAY_TO = 2  # times smaller
PIECE_BYTES = 64  # around each piece of a body, in CPython


class ByteBudget:
    """How many bytes all requests of this process hold, and may."""

    def __init__(self, bytes_max: int = DEFAULT_BYTES_MAX, *, connections_max: int = 1024) -> None:
        kept_for_small = bytes_max * 3 // 8
        self.bytes_max = bytes_max
        self.large_bytes_max = bytes_max - kept_for_small  # all that large requests share
        self.small_bytes = kept_for_small // connections_max  # so that all can be small at once
        self.used_bytes = 0
        self.arriving: set[Held] = set()

    def open(self) -> "Held":
        """What a new request holds: nothing yet."""
        return Held(self)

    def make_room(self, bytes_wanted: int, *, limit: int, holder_bytes: int) -> bool:
        """Whether *bytes_wanted* more stay within *limit*, larger arriving bodies refused if need be."""
        while self.used_bytes + bytes_wanted > limit:
            largest = max(self.arriving, key=lambda one: one.bytes, default=None)
            if largest is None or largest.bytes < GIVES_WAY_TO * holder_bytes:
                return False
            largest.give_way()
        return True


class Held:
    """The bytes of one request."""

    __slots__ = ("_budget", "_give_way", "bytes")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._give_way: Callable[[Overloaded], None] | None = None
        self.bytes = 0

    def add(self, byte_count: int) -> None:
        """Hold *byte_count* more. Raises `Overloaded` where the budget has no room for them."""
        budget, total = self._budget, self.bytes + byte_count
        limit = budget.bytes_max if total <= budget.small_bytes else budget.large_bytes_max
        if not budget.make_room(byte_count, limit=limit, holder_bytes=total):
            raise _spent(budget)
        self.bytes = total
        budget.used_bytes += byte_count

    def add_answer(self, byte_count: int) -> None:
        """`add`, for what is about to be made. Raises `AnswerTooLarge` where it can never fit."""
        most = self._budget.large_bytes_max - self.bytes
        if byte_count > most:
            raise AnswerTooLarge(answer_bytes=byte_count, answer_bytes_max=most)
        self.add(byte_count)

    def shrink(self, byte_count: int) -> None:
        """Hold *byte_count* and no more, or what it holds where that is less."""
        freed = max(0, self.bytes - byte_count)
        self.bytes -= freed
        self._budget.used_bytes -= freed

    def arrives(self, give_way: Callable[[Overloaded], None]) -> None:
        """A body is being read: *give_way* is called if a smaller request needs its room."""
        self._give_way = give_way
        self._budget.arriving.add(self)

    def has_arrived(self) -> None:
        """The body is read, or given up."""
        self._give_way = None
        self._budget.arriving.discard(self)

    def give_way(self) -> None:
        """Refuse the body that is being read, and free what it holds."""
        assert self._give_way is not None, "only what is arriving gives way"
        self._give_way(_spent(self._budget))
        self.close()

    def close(self) -> None:
        """Hold nothing."""
        self.shrink(0)
        self.has_arrived()


def budget_bytes(settings: Settings, *, machine_bytes: int) -> int:
    """One API process's share of the setting, or of what a machine of *machine_bytes* can spare."""
    limits = settings.http
    whole = limits.memory_bytes_max or min(DEFAULT_BYTES_MAX, machine_bytes // DEFAULT_SHARE)
    return max(whole // settings.api_processes, BODIES_MIN * limits.body_bytes_max)


def _spent(budget: ByteBudget) -> Overloaded:
    return Overloaded(
        f"The requests being served hold all of the {budget.bytes_max:,} bytes that bodies and "
        "answers may take. Please try again shortly, with fewer inputs at a time.",
        retry_after_s=random.uniform(5, 10),  # noqa: S311 # so that not all come back at once
    )
