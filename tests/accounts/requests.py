"""Requests as the HTTP room would bring them."""

from collections import Counter
from itertools import count as numbers

from tests.support.memory_store import MemoryStore

from trivec.accounts import (
    Accounts,
    Key,
    KeyPlan,
    RateLimits,
    RateLimitState,
    RequestMeta,
    RequestUsage,
    Reservation,
)

_numbers = numbers()
WIDE = RateLimits(requests_per_minute=1_000_000, tokens_per_minute=1_000_000_000)
"""Limits that nobody meets, with all the reserving and giving back that limits bring."""


def opening(request_id: str | None = None) -> RequestMeta:
    """A request for the model `m`."""
    return RequestMeta(request_id or f"req_{next(_numbers)}", "m")


def closing(status: int = 200, tokens: int = 7, *, user: str | None = None) -> RequestUsage:
    return RequestUsage(status, input_count=1, token_count=tokens, duration_s=0.25, user=user)


def plan_of(number: int) -> KeyPlan:
    """A key; every second one has limits, wide ones."""
    return KeyPlan(f"k{number}", limits=WIDE if number % 2 else RateLimits())


def statuses(store: MemoryStore) -> list[int]:
    """Of all that is written down, a row each or in a count, in order of their number."""
    counted = Counter[int]()
    for count, requests in store.counts.items():
        counted[count.status] += requests
    return sorted([row.status for row in store.rows] + list(counted.elements()))


async def acquire(
    accounts: Accounts, caller: Key, opening: RequestMeta, *, tokens_follow: bool = False
) -> Reservation:
    """The booking of a request that was let in."""
    booking = Reservation(accounts, caller, opening)
    await booking.acquire(tokens_follow=tokens_follow)
    return booking


async def record(
    accounts: Accounts, caller: Key, opening: RequestMeta, closing: RequestUsage
) -> RateLimitState | None:
    """Write down a request that failed before it was let in; what its key has left."""
    booking = Reservation(accounts, caller, opening)
    await booking.close(closing)
    return booking.state


async def caller_with(accounts: Accounts, limits: RateLimits) -> Key:
    new = await accounts.create_key(KeyPlan("t", limits=limits))
    return await accounts.identify(new.plain)
