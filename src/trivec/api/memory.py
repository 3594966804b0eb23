"""Byte budget: what the bodies, vectors and responses of all requests may hold at one time.

Each request has a `MemoryReservation`, which grows as its body arrives and before its vectors are
computed, and is released when its response has left. Lives on the event loop; allocates nothing.

No client can take all of it. A request that holds little always fits: its part is kept free of
large ones. A body that is still arriving gives way to a request that needs half of it or less, so
that clients that send most of a body and stop are the first to be refused.
"""

import random
from collections.abc import Callable

from trivec.core.errors import AnswerTooLarge, Overloaded
from trivec.settings import MEBIBYTE, Settings

DEFAULT_BYTES_MAX = 512 * MEBIBYTE
DEFAULT_SHARE = 4  # a fourth of the machine's memory, where that is less
BODIES_MIN = 8  # that fit in any budget; a body counts three times while it is read and parsed
GIVES_WAY_TO = 2  # times smaller


class ByteBudget:
    """How many bytes all requests of this process hold, and may."""

    def __init__(self, bytes_max: int = DEFAULT_BYTES_MAX, *, connections_max: int = 1024) -> None:
        kept_for_small = bytes_max * 3 // 8
        self.bytes_max = bytes_max
        self.large_bytes_max = bytes_max - kept_for_small  # all that large requests share
        self.small_bytes = kept_for_small // connections_max  # so that all can be small at once
        self.used_bytes = 0
        # Of the bodies that are being read: how each is refused if a smaller request needs its room.
        self.arriving: dict[MemoryReservation, Callable[[Exception], None]] = {}

    def overloaded(self) -> Overloaded:
        """The refusal of what does not fit."""
        return Overloaded(
            f"The requests being served hold all of the {self.bytes_max:,} bytes that bodies and "
            "answers may take. Please try again shortly, with fewer inputs at a time.",
            retry_after_s=random.uniform(5, 10),  # noqa: S311 # so that not all come back at once
        )


class MemoryReservation:
    """The bytes of one request."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.bytes = 0

    def add(self, byte_count: int, *, is_response: bool = False) -> None:
        """Reserve *byte_count* more, before they are there. Raises `Overloaded` where there is no
        room for them; `AnswerTooLarge` for a response that can never fit.
        """
        budget, total = self._budget, self.bytes + byte_count
        if is_response and total > budget.large_bytes_max:
            most = budget.large_bytes_max - self.bytes
            raise AnswerTooLarge(answer_bytes=byte_count, answer_bytes_max=most)
        limit = budget.bytes_max if total <= budget.small_bytes else budget.large_bytes_max
        while budget.used_bytes + byte_count > limit:
            largest = max(budget.arriving, key=lambda one: one.bytes, default=None)
            if largest is None or largest.bytes < GIVES_WAY_TO * total:
                raise budget.overloaded()
            budget.arriving.pop(largest)(budget.overloaded())
            largest.shrink(0)
        self.bytes = total
        budget.used_bytes += byte_count

    def shrink(self, byte_count: int) -> None:
        """Keep at most *byte_count*, and release the rest."""
        released = max(0, self.bytes - byte_count)
        self.bytes -= released
        self._budget.used_bytes -= released


def budget_bytes(settings: Settings, *, machine_bytes: int) -> int:
    """One API process's share of the setting, or of what a machine of *machine_bytes* can spare."""
    limits = settings.http
    whole = limits.memory_bytes_max or min(DEFAULT_BYTES_MAX, machine_bytes // DEFAULT_SHARE)
    return max(whole // settings.api_processes, BODIES_MIN * limits.body_bytes_max)
