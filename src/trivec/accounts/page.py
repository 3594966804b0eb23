"""One group of entries, decided in order over the rows they touch. No clock, no SQL.

Every store does the same: read the buckets and claims that `keys_touched` and `claims_touched`
name, lay them on a `Page`, take each entry, write what changed, commit.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from trivec.accounts import allowance as arithmetic
from trivec.accounts.allowance import MINUTE_US, SECOND_US, Bucket, Shortage
from trivec.accounts.entries import (
    Claim,
    ClaimName,
    ClaimRequest,
    Count,
    Entry,
    Granted,
    LedgerRow,
    Outcome,
    Reserve,
    Settle,
    Upkeep,
)
from trivec.accounts.types import RateLimits, RateLimitState
from trivec.accounts.utc import DAY_US
from trivec.core.errors import IdempotencyInProgress, IdempotencyKeyReused, RateLimitExceeded

CLAIM_HELD_US = 15 * SECOND_US  # without a sign of life from its process
CLAIM_KEPT_US = 24 * 3600 * SECOND_US
SUCCESS_BELOW = 400


class DayOf(NamedTuple):
    """A key's use of a model on a day."""

    key_id: str
    model: str | None
    day: int  # since the epoch, in UTC


@dataclass(slots=True)
class Total:
    """What requests came to."""

    requests: int = 0
    failed: int = 0
    tokens: int = 0

    def add(self, requests: int, *, status: int, tokens: int = 0) -> None:
        self.requests += requests
        self.failed += requests if status >= SUCCESS_BELOW else 0
        self.tokens += tokens


class Page:
    """The part of the books that one commit reads and writes."""

    def __init__(
        self, *, now_us: int, buckets: Mapping[str, Bucket], claims: Mapping[ClaimName, Claim]
    ) -> None:
        # Another machine's clock may be ahead of ours: then its last instant is ours too.
        self.now_us = max([now_us, *(bucket.at_us for bucket in buckets.values())])
        self._buckets = dict(buckets)
        self._claims = dict(claims)
        self.buckets_changed: dict[str, Bucket] = {}
        self.claims_changed: dict[ClaimName, Claim | None] = {}  # None: dropped
        self.rows: list[LedgerRow] = []
        self.counts: Counter[Count] = Counter()
        self.upkeep: Upkeep | None = None

    def take(self, entry: Entry) -> Outcome:
        match entry:
            case Reserve():
                return self._reserve(entry)
            case Settle():
                return self._settle(entry)
            case Upkeep():
                self.upkeep = entry
                return Granted()

    def totals(self) -> dict[DayOf, Total]:
        """Of rows and counts, by day."""
        totals: dict[DayOf, Total] = {}
        for row in self.rows:
            day = DayOf(row.key_id, row.model, row.time_us // DAY_US)
            total = totals.setdefault(day, Total())
            total.add(1, status=row.status, tokens=row.token_count)
        for count, requests in self.counts.items():
            day = DayOf(count.key_id, count.model, count.minute * MINUTE_US // DAY_US)
            totals.setdefault(day, Total()).add(requests, status=count.status)
        return totals

    def _reserve(self, entry: Reserve) -> Outcome:
        replayed = False
        if entry.claim is not None:
            found = self._claims.get(entry.claim.name)
            verdict = judge_claim(found, entry.claim, now_us=self.now_us)
            if not isinstance(verdict, bool):
                return verdict
            replayed = verdict
        state = None
        if entry.allowance is not None:
            bucket = self._buckets.get(entry.key_id, Bucket())
            taken = arithmetic.reserve(bucket, entry.allowance, entry.cost, now_us=self.now_us)
            if isinstance(taken, Shortage):
                return _exhausted(taken)
            state = self._put_bucket(entry.key_id, taken, entry.allowance)
        if entry.claim is not None and not replayed:
            self._put_claim(entry.claim.name, self._running(entry.claim))
        return Granted(state, replayed)

    def _settle(self, entry: Settle) -> Outcome:
        row, unused = entry.row, entry.unused
        if entry.claim is not None:
            row = self._finish(entry.claim, row)
            if row.replayed:  # another process was quicker: what it billed, we do not bill again
                unused = replace(unused, tokens=unused.tokens + entry.row.token_count)
        if row.is_counted:
            minute = row.time_us // MINUTE_US
            self.counts[Count(row.key_id, row.model, row.status, minute)] += 1
        else:
            self.rows.append(row)
        state = None
        if entry.allowance is not None:
            bucket = self._buckets.get(row.key_id, Bucket())
            bucket = arithmetic.give_back(bucket, entry.allowance, unused, now_us=self.now_us)
            state = self._put_bucket(row.key_id, bucket, entry.allowance)
        return Granted(state, row.replayed)

    def _finish(self, wish: ClaimRequest, row: LedgerRow) -> LedgerRow:
        """Bill the first success of this name and no other; drop our claim on a failure."""
        found = self._claims.get(wish.name)
        if row.status >= SUCCESS_BELOW:
            if found is not None and not found.done and found.owner == wish.owner:
                self._put_claim(wish.name, None)
            return row
        if found is not None and found.done and self.now_us < found.expires_us:
            return replace(row, token_count=0, replayed=True)
        done = replace(self._running(wish), done=True, token_count=row.token_count)
        self._put_claim(wish.name, done)
        return row

    def _running(self, wish: ClaimRequest) -> Claim:
        return Claim(
            wish.body_digest,
            wish.owner,
            held_until_us=self.now_us + CLAIM_HELD_US,
            expires_us=self.now_us + CLAIM_KEPT_US,
        )

    def _put_bucket(self, key_id: str, bucket: Bucket, limits: RateLimits) -> RateLimitState:
        self._buckets[key_id] = self.buckets_changed[key_id] = bucket
        return arithmetic.state(bucket, limits, now_us=self.now_us)

    def _put_claim(self, name: ClaimName, claim: Claim | None) -> None:
        self.claims_changed[name] = claim
        if claim is None:
            self._claims.pop(name, None)
        else:
            self._claims[name] = claim


def judge_claim(
    found: Claim | None, wish: ClaimRequest, *, now_us: int
) -> bool | IdempotencyKeyReused | IdempotencyInProgress:
    """Whether the request was billed already (a replay); False: it is the first, or takes over."""
    if found is None or now_us >= found.expires_us:
        return False
    if found.body_digest != wish.body_digest:
        return IdempotencyKeyReused()
    if found.done:
        return True
    if now_us < found.held_until_us:
        return IdempotencyInProgress()
    return False


def keys_touched(entries: Iterable[Entry]) -> list[str]:
    """Ids of the keys whose bucket must be read and locked, in the one order that all use."""
    touched = set()
    for entry in entries:
        match entry:
            case Reserve() if entry.allowance is not None or entry.claim is not None:
                touched.add(entry.key_id)
            case Settle() if entry.allowance is not None or entry.claim is not None:
                touched.add(entry.row.key_id)
            case _:
                pass
    return sorted(touched)


def claims_touched(entries: Iterable[Entry]) -> list[ClaimName]:
    """Names of the claims that must be read."""
    claims = (entry.claim for entry in entries if not isinstance(entry, Upkeep))
    return sorted({claim.name for claim in claims if claim is not None})


def _exhausted(shortage: Shortage) -> RateLimitExceeded:
    return RateLimitExceeded(
        kind=shortage.kind,
        limit=shortage.limit,
        requested=shortage.requested,
        retry_after_s=shortage.retry_after_us / SECOND_US,
    )
