"""Between requests on the event loop and the writer's thread: makes entries, waits for them."""

import asyncio

from trivec.accounts import keys
from trivec.accounts.entries import (
    ClaimName,
    ClaimRequest,
    Granted,
    LedgerRow,
    Reserve,
    Settle,
)
from trivec.accounts.page import SUCCESS_BELOW
from trivec.accounts.types import Caller, Closing, Opening
from trivec.accounts.writer import Writer
from trivec.core.ports import Clock


class Desk:
    """Turns what a request says of itself into entries. What a client chose is stored as digests."""

    def __init__(self, writer: Writer, *, clock: Clock, secret: bytes) -> None:
        self._writer = writer
        self._clock = clock
        self._secret = secret

    async def reserve(self, entry: Reserve) -> Granted:
        """Cancelling withdraws an entry that is not yet being written."""
        return await self._writer.submit(entry)

    async def settle(self, entry: Settle) -> Granted:
        """Cancelling changes nothing: what happened is written down."""
        return await asyncio.shield(self._writer.submit(entry))

    def claim(self, caller: Caller, opening: Opening) -> ClaimRequest | None:
        if opening.idempotency_key is None:
            return None
        digest = self._pseudonym(opening.idempotency_key, purpose="idempotency")
        name = ClaimName(caller.key_id, digest)
        return ClaimRequest(name, opening.body_digest, self._writer.owner)

    def row(self, caller: Caller, opening: Opening, closing: Closing) -> LedgerRow:
        """The row of a request that is billed what it computed, or nothing if it failed."""
        user = closing.user
        return LedgerRow(
            time_us=int(self._clock.wall_s() * 1_000_000),
            request_id=opening.request_id,
            key_id=caller.key_id,
            model=opening.model,
            input_count=closing.input_count,
            token_count=closing.token_count if closing.status < SUCCESS_BELOW else 0,
            status=closing.status,
            duration_us=round(closing.duration_s * 1_000_000),
            user_digest=None if user is None else self._pseudonym(user, purpose="user").hex(),
            replayed=False,
        )

    def _pseudonym(self, text: str, *, purpose: str) -> bytes:
        return keys.pseudonym(text, secret=self._secret, purpose=purpose)
