"""The arithmetic of rate limits: exact, in integers, over any times."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivec.accounts import RateLimits, rate_limits
from trivec.accounts.rate_limits import LIMIT_MAX, Bucket, Cost
from trivec.accounts.utc import MINUTE_US, SECOND_US
from trivec.core.errors import RateLimitExceeded

ONE = Cost(requests=1)
limits_a_minute = st.integers(1, LIMIT_MAX)
instants_us = st.integers(0, 2**52)


@pytest.mark.parametrize("limit", [1, 7, 60, 600, 999, 6_000])
def test_ten_times_the_limit_for_a_minute_after_the_burst_admits_the_limit(limit: int) -> None:
    allowed = RateLimits(requests_per_minute=limit)
    bucket = Bucket()
    for _ in range(limit):
        spent = rate_limits.reserve(bucket, allowed, ONE, now_us=0)
        assert isinstance(spent, Bucket)
        bucket = spent

    admitted = 0
    for n in range(1, 10 * limit + 1):
        now_us = n * MINUTE_US // (10 * limit)
        answer = rate_limits.reserve(bucket, allowed, ONE, now_us=now_us)
        if isinstance(answer, Bucket):
            bucket, admitted = answer, admitted + 1

    assert abs(admitted - limit) <= max(1, limit // 100)


@given(limit=limits_a_minute, tokens=st.integers(1, LIMIT_MAX), now_us=instants_us)
def test_whoever_waits_as_long_as_told_is_let_in_and_not_a_microsecond_before(
    limit: int, tokens: int, now_us: int
) -> None:
    allowed = RateLimits(tokens_per_minute=limit)
    tokens = min(tokens, limit)
    full = Bucket(tokens_debt=limit * MINUTE_US, at_us=now_us)

    short = rate_limits.reserve(full, allowed, Cost(tokens=tokens), now_us=now_us)

    assert isinstance(short, RateLimitExceeded)
    wait_us = round(short.retry_after_s * SECOND_US)
    assert 0 < wait_us <= MINUTE_US
    then_us = now_us + wait_us
    assert isinstance(
        rate_limits.reserve(full, allowed, Cost(tokens=tokens), now_us=then_us), Bucket
    )
    early = rate_limits.reserve(full, allowed, Cost(tokens=tokens), now_us=then_us - 1)
    assert isinstance(early, RateLimitExceeded)


@given(
    limit=limits_a_minute,
    steps=st.lists(
        st.tuples(st.integers(0, 3 * MINUTE_US), st.integers(0, 2_000)), min_size=1, max_size=30
    ),
)
def test_no_stretch_of_time_admits_more_than_its_share_and_the_burst(
    limit: int, steps: list[tuple[int, int]]
) -> None:
    allowed = RateLimits(tokens_per_minute=limit)
    bucket, now_us, taken = Bucket(), 0, 0
    for pause_us, tokens in steps:
        now_us += pause_us
        answer = rate_limits.reserve(bucket, allowed, Cost(tokens=tokens), now_us=now_us)
        if isinstance(answer, Bucket):
            bucket, taken = answer, taken + tokens
        assert 0 <= bucket.tokens_debt <= limit * MINUTE_US < 2**63
        assert taken * MINUTE_US <= limit * (MINUTE_US + now_us)


@given(
    limit=limits_a_minute,
    times_us=st.lists(instants_us, min_size=2, max_size=20),
)
def test_a_clock_that_runs_backwards_refills_nothing(limit: int, times_us: list[int]) -> None:
    allowed = RateLimits(requests_per_minute=limit)
    bucket = Bucket(requests_debt=limit * MINUTE_US, at_us=max(times_us))
    for now_us in times_us:
        later = rate_limits.refill(bucket, allowed, now_us=now_us)
        assert later == bucket


@given(limit=limits_a_minute, times_us=st.lists(instants_us, min_size=2, max_size=20))
def test_looking_more_often_changes_nothing(limit: int, times_us: list[int]) -> None:
    allowed = RateLimits(requests_per_minute=limit)
    times_us.sort()
    start = Bucket(requests_debt=limit * MINUTE_US, at_us=times_us[0])
    often = start
    for _, now_us in pairwise(times_us):
        often = rate_limits.refill(often, allowed, now_us=now_us)

    assert often == rate_limits.refill(start, allowed, now_us=times_us[-1])


def test_requests_and_tokens_are_taken_together_or_not_at_all() -> None:
    allowed = RateLimits(requests_per_minute=5, tokens_per_minute=10)

    short = rate_limits.reserve(Bucket(), allowed, Cost(requests=1, tokens=11), now_us=0)
    taken = rate_limits.reserve(Bucket(), allowed, Cost(requests=1, tokens=10), now_us=0)

    assert isinstance(short, RateLimitExceeded)
    assert (short.kind, short.retry_after_s) == ("tokens", 6.0)
    assert "limit 10, requested 11" in str(short)
    assert taken == Bucket(MINUTE_US, 10 * MINUTE_US, 0)


def test_what_has_no_limit_owes_nothing() -> None:
    allowed = RateLimits(requests_per_minute=5)

    taken = rate_limits.reserve(Bucket(), allowed, Cost(requests=1, tokens=10**12), now_us=0)

    assert taken == Bucket(requests_debt=MINUTE_US)


def test_giving_back_never_makes_more_than_a_full_allowance() -> None:
    allowed = RateLimits(tokens_per_minute=10)
    bucket = Bucket(tokens_debt=2 * MINUTE_US, at_us=0)

    assert rate_limits.give_back(bucket, allowed, Cost(tokens=9), now_us=0).tokens_debt == 0


def test_a_lowered_limit_forgives_what_it_could_never_have_lent() -> None:
    owing = Bucket(requests_debt=100 * MINUTE_US, at_us=0)
    lowered = RateLimits(requests_per_minute=10)

    after = rate_limits.reserve(owing, lowered, ONE, now_us=6 * SECOND_US)

    assert after == Bucket(requests_debt=10 * MINUTE_US, at_us=6 * SECOND_US)


def test_the_state_says_what_is_left_and_when_all_of_it_is_back() -> None:
    allowed = RateLimits(requests_per_minute=60, tokens_per_minute=1000)
    bucket = Bucket(requests_debt=3 * MINUTE_US, tokens_debt=500 * MINUTE_US, at_us=0)

    state = rate_limits.state(rate_limits.refill(bucket, allowed, now_us=500_000), allowed)

    assert (state.limit_requests, state.remaining_requests, state.reset_requests_s) == (60, 57, 2.5)
    assert (state.limit_tokens, state.remaining_tokens, state.reset_tokens_s) == (1000, 508, 29.5)


def test_the_state_is_silent_where_there_is_no_limit() -> None:
    state = rate_limits.state(Bucket(), RateLimits(tokens_per_minute=5))

    assert (state.limit_requests, state.remaining_requests, state.reset_requests_s) == (None,) * 3
    assert (state.limit_tokens, state.remaining_tokens, state.reset_tokens_s) == (5, 5, 0.0)
