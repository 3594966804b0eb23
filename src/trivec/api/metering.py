"""One row in the ledger for each authenticated request to a metered route, whatever it came to.

It knows when a booking is opened and closed; what that costs a key is the accounts room's business.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

from trivec.accounts import Accounts, Caller, Closing, Opening
from trivec.api.errors import status_of
from trivec.api.visit import Visit
from trivec.core.errors import FieldInvalid
from trivec.core.ports import Clock

IDEMPOTENCY_KEY_CHARS_MAX = 255


class Meter:
    """Opens and closes bookings."""

    def __init__(self, accounts: Accounts, clock: Clock) -> None:
        self._accounts = accounts
        self._clock = clock

    async def open(self, visit: Visit, body: bytes) -> None:
        """Book the request: from here on its key has one request less.

        Raises `AllowanceExhausted`, `IdempotencyKeyReused`, `IdempotencyInProgress`,
        `StoreUnavailable`, and `FieldInvalid` for an `Idempotency-Key` that cannot be one.
        A call that is cancelled still books, so that there is something to close.
        """
        key = visit.header(b"idempotency-key")
        if key is not None and not 0 < len(key) <= IDEMPOTENCY_KEY_CHARS_MAX:
            raise FieldInvalid(
                f"Idempotency-Key has {len(key)} characters; it must have between 1 and "
                f"{IDEMPOTENCY_KEY_CHARS_MAX}."
            )
        digest = b"" if key is None else _digest(visit, body)
        opening = Opening(visit.request_id, visit.model, key, digest)
        await _to_its_end(self._book(visit, opening))

    async def _book(self, visit: Visit, opening: Opening) -> None:
        visit.booking = await self._accounts.open(_caller(visit), opening)

    async def reserve_tokens(self, visit: Visit, count: int) -> None:
        """Take *count* tokens out of the allowance of a request that is booked.

        Raises `AllowanceExhausted`, `RequestTooLarge`, `StoreUnavailable`. A call that is cancelled
        still reserves, so that closing gives everything back.
        """
        assert visit.booking is not None
        await _to_its_end(visit.booking.reserve_tokens(count))

    @asynccontextmanager
    async def row(self, visit: Visit) -> AsyncIterator[None]:
        """Write the request's row when the block ends, before the answer leaves.

        A block that raises costs its key no tokens; one that ends before it was booked, as with a
        malformed body, costs it nothing. Raises `StoreUnavailable` rather than lose a success.
        Cancelling it while it writes does not undo the row: the accounts room sees to that.
        """
        try:
            yield
        except BaseException as error:
            await self._close(visit, status_of(error))
            raise
        await self._close(visit, 200)

    async def _close(self, visit: Visit, status: int) -> None:
        closing = Closing(
            status=status,
            input_count=visit.input_count,
            token_count=visit.tokens_served(status),
            duration_s=self._clock.now_s() - visit.started_s,
            user=visit.user,
        )
        if visit.booking is not None:
            await visit.booking.close(closing)
            visit.allowance = visit.booking.state
            return
        caller = _caller(visit)
        opening = Opening(visit.request_id, visit.model, None, b"")
        await self._accounts.record(caller, opening, closing)
        visit.allowance = await self._accounts.allowance_state(caller)


async def _to_its_end(work: Coroutine[object, object, None]) -> None:
    """Do all of *work*, and be cancelled only then: a store may be at it, and cannot be stopped."""
    task = asyncio.create_task(work, name="booking")
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _caller(visit: Visit) -> Caller:
    assert visit.caller is not None, "only a request whose key is known is metered"
    return visit.caller


def _digest(visit: Visit, body: bytes) -> bytes:
    """The same body sent to another route is another request."""
    return hashlib.sha256(visit.route.encode() + b"\0" + body).digest()
