"""What one request holds of its key's allowance, from the moment it is let in until it is billed."""

from dataclasses import replace

from trivec.accounts.allowance import NOTHING, Cost
from trivec.accounts.desk import Desk
from trivec.accounts.entries import ClaimRequest, Reserve, Settle
from trivec.accounts.page import SUCCESS_BELOW
from trivec.accounts.types import Caller, RateLimitState, RequestMeta, RequestUsage
from trivec.accounts.writer import Promise
from trivec.core.errors import RequestTooLarge, StoreUnavailable

OUR_FAULT_FROM = 500
ONE_REQUEST = Cost(requests=1)


class Reservation:
    """One request. Whoever made it closes it, whatever happens, whether it was let in or not.

    A call that is cancelled while the store is at it ends when the store is done: what it took is
    known then, and closing gives it back. As it stands, this is the booking of an anonymous caller:
    nothing is limited and nothing is written.
    """

    def __init__(self) -> None:
        self.state: RateLimitState | None = None  # None: the key has no limits, or nobody asked yet
        self.replayed = False  # already billed under its idempotency key: compute, do not bill

    async def acquire(self, *, tokens_follow: bool = False) -> None:
        """Take one request out of the allowance, and claim the idempotency key.

        *tokens_follow*: `reserve_tokens` will be called before any work is done, and may take the
        request with them, in one commit. Raises `RateLimitExceeded`, `IdempotencyKeyReused`,
        `IdempotencyInProgress` and `StoreUnavailable`.
        """

    async def reserve_tokens(self, count: int) -> None:
        """Take *count* tokens out of the allowance, before any work is done on them.

        Where `acquire` left the request to be taken too, both or neither. Raises
        `RateLimitExceeded`; `RequestTooLarge` when a full allowance would not hold them;
        `StoreUnavailable`.
        """

    async def close(self, closing: RequestUsage) -> None:
        """Bill the request: its ledger row is durable when this returns. A failure is billed zero.

        Where we refused a request of a key without limits, its row is on its way. Raises
        `StoreUnavailable`: then that is what the client is told. The failure of a request that was
        never let in stays that failure. A second call does nothing.
        """


class MeteredReservation(Reservation):
    """The booking of a caller that has a key."""

    def __init__(self, caller: Caller, opening: RequestMeta, *, desk: Desk) -> None:
        super().__init__()
        self._caller = caller
        self._opening = opening
        self._desk = desk
        self._is_let_in = False
        self._reserved = NOTHING
        self._owed = NOTHING  # let in, but not yet taken out of the allowance
        self._claim: ClaimRequest | None = None
        self._closed = False

    async def acquire(self, *, tokens_follow: bool = False) -> None:
        self._desk.check_writable()
        claim = self._desk.claim(self._caller, self._opening)
        if claim is not None or self._caller.allowance is not None:
            if claim is None and tokens_follow and self._desk.has_plenty(self._caller.key_id):
                self._owed = ONE_REQUEST
            else:
                await self._reserve(ONE_REQUEST, claim)
        self._is_let_in = True

    async def reserve_tokens(self, count: int) -> None:
        allowance = self._caller.allowance
        if allowance is None:
            return
        limit = allowance.tokens_per_minute
        if limit is not None and count > limit:
            raise RequestTooLarge(token_count=count, token_count_max=limit)
        cost = self._owed if limit is None else self._owed + Cost(tokens=count)
        if cost != NOTHING:
            await self._reserve(cost)

    async def close(self, closing: RequestUsage) -> None:
        if self._closed:
            return
        self._closed = True
        key_id, allowance = self._caller.key_id, self._caller.allowance
        if self._owed != NOTHING and closing.status < OUR_FAULT_FROM:
            # It failed before it was taken, and stays that failure. Nobody waits for it: it is
            # written in the order handed over, and a cancellation between the two would lose the row.
            owed = self._desk.submit(Reserve(key_id, allowance, self._owed))
            owed.add_done_callback(Promise.exception)
        row = self._desk.row(self._caller, self._opening, closing)
        if self.replayed:
            row = replace(row, token_count=0, replayed=True)
        unused = Cost(
            requests=self._reserved.requests if closing.status >= OUR_FAULT_FROM else 0,
            tokens=max(0, self._reserved.tokens - row.token_count),
        )
        if self.state is not None and unused == NOTHING and self._claim is None:
            allowance = None  # what was reserved was used: its bucket is not touched again
        promise = self._desk.submit(Settle(row, allowance, unused, self._claim))
        is_refused_by_us = not self._is_let_in and closing.status >= OUR_FAULT_FROM
        if is_refused_by_us and allowance is None and self._desk.is_writable:
            promise.add_done_callback(Promise.exception)
            return  # a refusal is cheap: it waits for no disk, and its row says nothing of money
        try:
            await promise
        except StoreUnavailable:
            if self._is_let_in or closing.status < SUCCESS_BELOW:
                raise
        finally:
            self._hear(promise)
            del promise  # with it, what it raises would hold itself, and all that its callers hold

    async def _reserve(self, cost: Cost, claim: ClaimRequest | None = None) -> None:
        promise = self._desk.submit(
            Reserve(self._caller.key_id, self._caller.allowance, cost, claim)
        )
        try:
            await promise
        finally:  # also when the call was cancelled: the promise is done by then
            if self._hear(promise):
                self._reserved = self._reserved + cost
                self._owed = NOTHING
                self._claim = None if self.replayed else claim or self._claim
            del promise  # with it, what it raises would hold itself, and all that its callers hold

    def _hear(self, promise: Promise) -> bool:
        """Whether it was granted."""
        if not promise.done() or promise.exception() is not None:
            return False
        granted = promise.result()
        self.replayed = self.replayed or granted.replayed
        if granted.state is not None:
            self.state = granted.state
            self._desk.remember(self._caller.key_id, granted.state)
        return True
