"""What one request holds of its key's allowance, from the moment it is let in until it is billed."""

from dataclasses import replace

from trivec.accounts.allowance import Cost
from trivec.accounts.desk import Desk
from trivec.accounts.entries import ClaimRequest, Granted, Reserve, Settle
from trivec.accounts.types import AllowanceState, Caller, Closing, Opening
from trivec.core.errors import RequestTooLarge

OUR_FAULT_FROM = 500


class Booking:
    """One request that was let in. Whoever opened it closes it, whatever happens.

    As it stands, that of an anonymous caller: nothing is limited and nothing is written.
    """

    def __init__(self, *, state: AllowanceState | None = None, replayed: bool = False) -> None:
        self.state = state  # None: the key has no limits
        self.replayed = replayed  # already billed under its idempotency key: compute, do not bill

    async def reserve_tokens(self, count: int) -> None:
        """Take *count* tokens out of the allowance, before any work is done on them.

        Raises `AllowanceExhausted`; `RequestTooLarge` when a full allowance would not hold them;
        `StoreUnavailable`.
        """

    async def close(self, closing: Closing) -> None:
        """Bill the request: its ledger row is durable when this returns. A failure is billed zero.

        Raises `StoreUnavailable`: then that is what the client is told. A second call does nothing.
        Cancelling the call does not undo it.
        """


class MeteredBooking(Booking):
    """The booking of a caller that has a key."""

    def __init__(self, caller: Caller, opening: Opening, *, desk: Desk, granted: Granted) -> None:
        super().__init__(state=granted.state, replayed=granted.replayed)
        self._caller = caller
        self._opening = opening
        self._desk = desk
        self._tokens_reserved = 0
        self._closed = False

    async def reserve_tokens(self, count: int) -> None:
        allowance = self._caller.allowance
        if allowance is None or allowance.tokens_per_minute is None:
            return
        if count > allowance.tokens_per_minute:
            raise RequestTooLarge(token_count=count, token_count_max=allowance.tokens_per_minute)
        cost = Cost(tokens=count)
        granted = await self._desk.reserve(Reserve(self._caller.key_id, allowance, cost))
        self._tokens_reserved += count
        self.state = granted.state

    async def close(self, closing: Closing) -> None:
        if self._closed:
            return
        self._closed = True
        row = self._desk.row(self._caller, self._opening, closing)
        if self.replayed:
            row = replace(row, token_count=0, replayed=True)
        unused = Cost(
            requests=1 if closing.status >= OUR_FAULT_FROM else 0,
            tokens=max(0, self._tokens_reserved - row.token_count),
        )
        settle = Settle(row, self._caller.allowance, unused, self._claim())
        granted = await self._desk.settle(settle)
        self.state = granted.state
        self.replayed = granted.replayed

    def _claim(self) -> ClaimRequest | None:
        """A replay has none: the claim was finished by the request that was billed."""
        return None if self.replayed else self._desk.claim(self._caller, self._opening)
