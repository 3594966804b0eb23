"""Rate limiter: a token bucket per key, as integer arithmetic on (bucket, now). No clock, no store.

A bucket holds a debt rather than a level: a reservation adds to it and time pays it off. A key that
was never used therefore starts full, and a changed limit keeps its meaning. The unit of debt is
unit x microsecond a minute: one request or token costs `MINUTE_US`, and a limit of L a minute pays
L of debt a microsecond. Nothing is ever rounded; with L <= 10**9 the debt stays below 2**63.
"""

from typing import NamedTuple

from trivec.accounts.types import RateLimits, RateLimitState
from trivec.accounts.utc import MINUTE_US, SECOND_US
from trivec.core.errors import RateLimitExceeded

LIMIT_MAX = 1_000_000_000
AHEAD_SHARE = 100  # of a limit at most this part is reserved ahead at a time: all a crash loses
LEFT_SHARE = 8  # and this part of what is left, so that the last of it is there for every node


class Cost(NamedTuple):
    """What a request takes out of a bucket."""

    requests: int = 0
    tokens: int = 0

    def plus(self, other: "Cost") -> "Cost":
        return Cost(self.requests + other.requests, self.tokens + other.tokens)

    def minus(self, other: "Cost") -> "Cost":
        """Never less than nothing."""
        requests, tokens = self.requests - other.requests, self.tokens - other.tokens
        return Cost(max(0, requests), max(0, tokens))


NOTHING = Cost()


class Bucket(NamedTuple):
    """The debts of a key as of *at_us*; the fields are columns of the store, in order."""

    requests_debt: int = 0
    tokens_debt: int = 0
    at_us: int = 0


class Grant(NamedTuple):
    """A bucket as it was left, and what was reserved of it ahead of any request."""

    bucket: Bucket
    ahead: Cost = NOTHING


def refill(bucket: Bucket, limits: RateLimits, *, now_us: int) -> Bucket:
    """*bucket* as of *now_us*; a *now_us* before `at_us` changes nothing."""
    elapsed_us = max(0, now_us - bucket.at_us)

    def left(debt: int, limit: int | None) -> int:
        if limit is None:
            return 0
        # A limit that was lowered forgives what is above one minute's worth.
        return max(0, min(debt, limit * MINUTE_US) - limit * elapsed_us)

    return Bucket(
        left(bucket.requests_debt, limits.requests_per_minute),
        left(bucket.tokens_debt, limits.tokens_per_minute),
        max(now_us, bucket.at_us),
    )


def reserve(
    bucket: Bucket, limits: RateLimits, cost: Cost, *, now_us: int
) -> Bucket | RateLimitExceeded:
    """Take all of *cost* or nothing; an error is returned, not raised."""
    bucket = refill(bucket, limits, now_us=now_us)
    debts = {"requests": bucket.requests_debt, "tokens": bucket.tokens_debt}
    for kind, count, limit in (
        ("requests", cost.requests, limits.requests_per_minute),
        ("tokens", cost.tokens, limits.tokens_per_minute),
    ):
        if limit is None or count == 0:
            continue
        debts[kind] += count * MINUTE_US
        excess = debts[kind] - limit * MINUTE_US
        if excess > 0:
            wait_s = -(-excess // limit) / SECOND_US
            return RateLimitExceeded(kind=kind, limit=limit, requested=count, retry_after_s=wait_s)
    return Bucket(debts["requests"], debts["tokens"], bucket.at_us)


def give_back(bucket: Bucket, limits: RateLimits, cost: Cost, *, now_us: int) -> Bucket:
    """Undo a reservation; never more than what is still owed."""
    bucket = refill(bucket, limits, now_us=now_us)
    return Bucket(
        max(0, bucket.requests_debt - cost.requests * MINUTE_US),
        max(0, bucket.tokens_debt - cost.tokens * MINUTE_US),
        bucket.at_us,
    )


def reserve_ahead(bucket: Bucket, limits: RateLimits, wanted: Cost) -> Grant:
    """Take what there may be of *wanted* out of a bucket that was just refilled."""

    def ahead(debt: int, limit: int | None, count: int) -> int:
        if limit is None:
            return count
        left = (limit * MINUTE_US - debt) // MINUTE_US
        return max(0, min(count, limit // AHEAD_SHARE, left // LEFT_SHARE))

    requests = ahead(bucket.requests_debt, limits.requests_per_minute, wanted.requests)
    tokens = ahead(bucket.tokens_debt, limits.tokens_per_minute, wanted.tokens)
    debts = Bucket(
        bucket.requests_debt + (requests * MINUTE_US if limits.requests_per_minute else 0),
        bucket.tokens_debt + (tokens * MINUTE_US if limits.tokens_per_minute else 0),
        bucket.at_us,
    )
    return Grant(debts, Cost(requests, tokens))


def state(bucket: Bucket, limits: RateLimits) -> RateLimitState:
    """What is left as of `bucket.at_us`, and the seconds until all of it is there again."""

    def left(debt: int, limit: int | None) -> tuple[int | None, float | None]:
        if limit is None:
            return None, None
        return (limit * MINUTE_US - debt) // MINUTE_US, -(-debt // limit) / SECOND_US

    requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
    return RateLimitState(
        requests, *left(bucket.requests_debt, requests), tokens, *left(bucket.tokens_debt, tokens)
    )
