"""Between requests on the event loop and the writer's thread: makes entries and hands them over."""

from trivec.accounts import keys
from trivec.accounts.entries import ClaimName, ClaimRequest, LedgerRow, Reserve, Settle
from trivec.accounts.page import SUCCESS_BELOW
from trivec.accounts.store import unavailable
from trivec.accounts.types import Caller, RateLimitState, RequestMeta, RequestUsage
from trivec.accounts.writer import Promise, Writer
from trivec.core.ports import Clock

PLENTY_SHARE = 0.5


class Desk:
    """Turns what a request says of itself into entries. What a client chose is stored as digests."""

    def __init__(self, writer: Writer, *, clock: Clock, secret: bytes) -> None:
        self._writer = writer
        self._clock = clock
        self._secret = secret
        self._seen: dict[str, RateLimitState] = {}  # by key id: what it had left when last asked

    @property
    def is_writable(self) -> bool:
        """Whether the ledger could be written when last tried."""
        return self._writer.health.writable

    def check_writable(self) -> None:
        """Raise `StoreUnavailable` while the ledger cannot be written, as of the last try."""
        if not self.is_writable:
            raise unavailable()

    def submit(self, entry: Reserve | Settle) -> Promise:
        """May raise, when awaited, what `Writer.submit` says."""
        return self._writer.submit(entry)

    def remember(self, key_id: str, state: RateLimitState) -> None:
        self._seen[key_id] = state

    def has_plenty(self, key_id: str) -> bool:
        """Whether a key's next request is all but sure to be let in, as far as this process knows.

        It decides only whether to ask the store before the texts are tokenised or after.
        """
        seen = self._seen.get(key_id)
        if seen is None:
            return False
        limit, remaining = seen.limit_requests, seen.remaining_requests
        return limit is None or remaining is None or remaining > limit * PLENTY_SHARE

    def claim(self, caller: Caller, opening: RequestMeta) -> ClaimRequest | None:
        if opening.idempotency_key is None:
            return None
        digest = self._pseudonym(opening.idempotency_key, purpose="idempotency")
        name = ClaimName(caller.key_id, digest)
        return ClaimRequest(name, opening.body_digest, self._writer.owner)

    def row(self, caller: Caller, opening: RequestMeta, closing: RequestUsage) -> LedgerRow:
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
