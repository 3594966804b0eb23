"""The estimate of a model's throughput, by tables of batches."""

import pytest

from trivec.core.events import BatchRan
from trivec.engine.scheduler import START_TOKENS_PER_S, ThroughputEstimator, batch_cost


def ran(
    estimate: ThroughputEstimator,
    tokens: int,
    duration_s: float,
    *,
    tokens_max: int | None = None,
    cost: float | None = None,
) -> ThroughputEstimator:
    """*estimate* after a batch of *tokens*, which is a full one unless *tokens_max* is given."""
    batch = BatchRan(
        model="fake",
        slot=0,
        sequences=1,
        tokens=tokens,
        tokens_max=tokens_max or tokens,
        duration_s=duration_s,
        failed=False,
    )
    return estimate.after(batch, cost or tokens)


def tokens_per_s(estimate: ThroughputEstimator) -> float:
    return 1 / estimate.s_per_token


def test_the_first_batch_replaces_the_initial_estimate() -> None:
    estimate = ThroughputEstimator()
    assert tokens_per_s(estimate) == pytest.approx(START_TOKENS_PER_S)
    assert tokens_per_s(ran(estimate, 512, 0.5)) == pytest.approx(1_024, rel=1e-3)


def test_the_estimate_follows_a_device_that_slows_down_within_its_window() -> None:
    estimate = ThroughputEstimator()
    for _ in range(100):
        estimate = ran(estimate, 1_000, 1.0)
    for _ in range(30):
        estimate = ran(estimate, 100, 1.0)
    assert tokens_per_s(estimate) == pytest.approx(100, rel=0.6)


def test_a_night_of_lone_short_texts_does_not_hide_what_full_batches_do() -> None:
    estimate = ThroughputEstimator()
    for _ in range(10):
        estimate = ran(estimate, 512, 0.5)
    for _ in range(100):
        estimate = ran(estimate, 16, 0.05, tokens_max=512)
    assert tokens_per_s(estimate) == pytest.approx(1_024, rel=0.15)


def test_one_long_text_is_expected_to_take_longer_than_as_many_tokens_of_short_ones() -> None:
    short = batch_cost([32] * 16)
    estimate = ran(ThroughputEstimator(), 512, 0.5, cost=short)
    assert short * estimate.s_per_cost == pytest.approx(0.5, rel=1e-3)
    assert batch_cost([8_192]) * estimate.s_per_cost > 7.5 * 16 * 0.5
