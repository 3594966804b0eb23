"""How much of an allowance is left, as integer arithmetic on (bucket, now). No clock, no store.

A bucket holds a debt, not a level: a reservation adds to it and time pays it off, so a key that
was never used needs no row, and a changed limit keeps its meaning. The unit of debt is
unit x microsecond a minute: one request or token costs `MINUTE_US`, and a limit of L a minute pays
L of debt a microsecond. Nothing is ever rounded; with L <= 10**9 the debt stays below 2**63.
"""

from dataclasses import dataclass, replace

from trivec.accounts.types import RateLimits, RateLimitState

MINUTE_US = 60_000_000
LIMIT_MAX = 1_000_000_000
SECOND_US = 1_000_000


@dataclass(frozen=True, slots=True)
class Cost:
    """What a request takes out of an allowance."""

    requests: int = 0
    tokens: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.requests + other.requests, self.tokens + other.tokens)


NOTHING = Cost()


@dataclass(frozen=True, slots=True)
class Bucket:
    """What a key owes, as of *at_us* on the store's own timeline."""

    requests_debt: int = 0
    tokens_debt: int = 0
    at_us: int = 0


@dataclass(frozen=True, slots=True)
class Shortage:
    """A reservation that must wait."""

    kind: str  # "requests" or "tokens"
    limit: int
    requested: int
    retry_after_us: int


def paid_off(bucket: Bucket, allowance: RateLimits, *, now_us: int) -> Bucket:
    """*bucket* as of *now_us*. Time never runs backwards here: an earlier *now_us* changes nothing."""
    elapsed_us = max(0, now_us - bucket.at_us)
    return Bucket(
        _remaining_debt(bucket.requests_debt, allowance.requests_per_minute, elapsed_us),
        _remaining_debt(bucket.tokens_debt, allowance.tokens_per_minute, elapsed_us),
        max(now_us, bucket.at_us),
    )


def reserve(bucket: Bucket, allowance: RateLimits, cost: Cost, *, now_us: int) -> Bucket | Shortage:
    """Take all of *cost* or nothing."""
    bucket = paid_off(bucket, allowance, now_us=now_us)
    shortage = _shortage(
        "requests", bucket.requests_debt, cost.requests, allowance.requests_per_minute
    ) or _shortage("tokens", bucket.tokens_debt, cost.tokens, allowance.tokens_per_minute)
    if shortage is not None:
        return shortage
    return replace(
        bucket,
        requests_debt=bucket.requests_debt + _debt(cost.requests, allowance.requests_per_minute),
        tokens_debt=bucket.tokens_debt + _debt(cost.tokens, allowance.tokens_per_minute),
    )


def give_back(bucket: Bucket, allowance: RateLimits, cost: Cost, *, now_us: int) -> Bucket:
    """Undo a reservation; never more than what is still owed."""
    bucket = paid_off(bucket, allowance, now_us=now_us)
    return replace(
        bucket,
        requests_debt=max(0, bucket.requests_debt - cost.requests * MINUTE_US),
        tokens_debt=max(0, bucket.tokens_debt - cost.tokens * MINUTE_US),
    )


def state(bucket: Bucket, allowance: RateLimits, *, now_us: int) -> RateLimitState:
    """What is left, and how long until all of it is there again."""
    bucket = paid_off(bucket, allowance, now_us=now_us)
    requests, tokens = allowance.requests_per_minute, allowance.tokens_per_minute
    return RateLimitState(
        requests,
        _left(bucket.requests_debt, requests),
        _full_again_s(bucket.requests_debt, requests),
        tokens,
        _left(bucket.tokens_debt, tokens),
        _full_again_s(bucket.tokens_debt, tokens),
    )


def _remaining_debt(debt: int, limit: int | None, elapsed_us: int) -> int:
    """No limit, no debt; a lowered limit forgives what is above one minute's worth."""
    if limit is None:
        return 0
    return max(0, min(debt, limit * MINUTE_US) - limit * elapsed_us)


def _debt(count: int, limit: int | None) -> int:
    return 0 if limit is None else count * MINUTE_US


def _shortage(kind: str, debt: int, count: int, limit: int | None) -> Shortage | None:
    if limit is None or count == 0:
        return None
    excess = debt + count * MINUTE_US - limit * MINUTE_US
    if excess <= 0:
        return None
    return Shortage(kind, limit, count, retry_after_us=-(-excess // limit))


def _left(debt: int, limit: int | None) -> int | None:
    return None if limit is None else (limit * MINUTE_US - debt) // MINUTE_US


def _full_again_s(debt: int, limit: int | None) -> float | None:
    return None if limit is None else -(-debt // limit) / SECOND_US
