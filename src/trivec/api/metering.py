"""One row in the ledger for each authenticated request to a metered route, whatever it came to.

It knows when a booking is opened and closed; what that costs a key is the accounts room's business.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from trivec.accounts import Accounts, Caller, RateLimits, RequestMeta, RequestUsage
from trivec.accounts.rate_limits import Bucket, Cost, Shortage, reserve
from trivec.api.errors import status_of
from trivec.api.visit import Visit
from trivec.core.errors import RateLimitExceeded
from trivec.core.ports import Clock
from trivec.settings import HttpLimits

OUR_FAULT_FROM = 500
TOO_MANY = 429  # what waits for an allowance is bounded by it


class Meter:
    """Opens and closes bookings."""

    def __init__(self, accounts: Accounts, clock: Clock, limits: HttpLimits) -> None:
        self._accounts = accounts
        self._clock = clock
        self._unpaid = UnpaidRate(limits.unpaid_requests_per_minute)

    async def open(self, visit: Visit, body: bytes, *, tokens_follow: bool = False) -> None:
        """Book the request: from here on its key has one request less.

        With *tokens_follow*, `reserve_tokens` may be what takes it. Raises `RateLimitExceeded` and
        `StoreUnavailable`.
        """
        opening = RequestMeta(visit.request_id, visit.model)
        visit.booking = self._accounts.reserve(_caller(visit), opening)
        await visit.booking.acquire(tokens_follow=tokens_follow)

    async def reserve_tokens(self, visit: Visit, count: int) -> None:
        """Take *count* tokens out of the allowance of a request that is booked.

        Raises `RateLimitExceeded`, `RequestTooLarge`, `StoreUnavailable`.
        """
        assert visit.booking is not None
        await visit.booking.reserve_tokens(count)

    @asynccontextmanager
    async def row(self, visit: Visit) -> AsyncIterator[None]:
        """Write the request's row when the block ends, before the answer leaves.

        Raises `RateLimitExceeded` for a key that sent too many requests which cost no tokens.
        A block that raises costs its key no tokens; one that ends before it was booked, as with a
        malformed body, costs it nothing. Raises `StoreUnavailable` rather than lose a success.
        Cancelling it while it writes does not undo the row: the accounts room sees to that.
        """
        try:
            self._unpaid.check(_caller(visit), now_s=self._clock.now_s())
            yield
        except BaseException as error:
            await self._close(visit, status_of(error))
            raise
        await self._close(visit, 200)

    async def _close(self, visit: Visit, status: int) -> None:
        closing = RequestUsage(
            status=status,
            input_count=visit.input_count,
            token_count=visit.tokens_served(status),
            duration_s=self._clock.now_s() - visit.started_s,
            user=visit.user,
        )
        booking = visit.booking
        if booking is None:
            opening = RequestMeta(visit.request_id, visit.model)
            booking = self._accounts.reserve(_caller(visit), opening)
        if closing.token_count == 0 and status < OUR_FAULT_FROM and status != TOO_MANY:
            self._unpaid.charge(_caller(visit), now_s=self._clock.now_s())
        await booking.close(closing)
        visit.allowance = booking.state


class UnpaidRate:
    """Bound of what costs a key nothing: a bucket of requests a minute for each, in this process.

    A request is charged when it is over, and refused while the bucket is empty: before that nobody knows
    what it will cost. The burst is one minute's worth. Keys are few, so no bucket is ever dropped.
    """

    def __init__(self, requests_per_minute: int) -> None:
        self._allowance = RateLimits(requests_per_minute=requests_per_minute)
        self._buckets: dict[str, Bucket] = {}

    def check(self, caller: Caller, *, now_s: float) -> None:
        """Raise `RateLimitExceeded` while *caller* has used up its minute."""
        found = self._reserve(caller, now_s)
        if isinstance(found, Shortage):
            raise RateLimitExceeded(
                kind=found.kind,
                limit=found.limit,
                requested=found.requested,
                retry_after_s=found.retry_after_us / 1e6,
                what="requests that cost no tokens",
            )

    def charge(self, caller: Caller, *, now_s: float) -> None:
        found = self._reserve(caller, now_s)
        if isinstance(found, Bucket):
            self._buckets[caller.key_id] = found

    def _reserve(self, caller: Caller, now_s: float) -> Bucket | Shortage:
        bucket = self._buckets.get(caller.key_id, Bucket())
        return reserve(bucket, self._allowance, Cost(requests=1), now_us=int(now_s * 1e6))


def _caller(visit: Visit) -> Caller:
    assert visit.caller is not None, "only a request whose key is known is metered"
    return visit.caller
