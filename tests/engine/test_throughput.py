"""The estimate of a model's throughput, by tables of batches."""

import pytest

from trivec.engine.scheduler import START_TOKENS_PER_S, ThroughputEstimator, batch_cost


def ran(
    estimate: ThroughputEstimator, tokens: int, duration_s: float, fill: float = 1.0
) -> ThroughputEstimator:
    return estimate.after(tokens=tokens, cost=tokens, duration_s=duration_s, fill=fill)


def test_the_first_batch_replaces_the_initial_estimate_and_slots_add_up() -> None:
    estimate = ThroughputEstimator(2)
    assert estimate.tokens_per_s == pytest.approx(2 * START_TOKENS_PER_S)
    assert ran(estimate, 512, 0.5).tokens_per_s == pytest.approx(2 * 1_024, rel=1e-3)


def test_the_estimate_follows_a_device_that_slows_down_within_its_window() -> None:
    estimate = ThroughputEstimator(1)
    for _ in range(100):
        estimate = ran(estimate, 1_000, 1.0)
    for _ in range(30):
        estimate = ran(estimate, 100, 1.0)
    assert estimate.tokens_per_s == pytest.approx(100, rel=0.6)


def test_a_night_of_lone_short_texts_does_not_hide_what_full_batches_do() -> None:
    estimate = ThroughputEstimator(1)
    for _ in range(10):
        estimate = ran(estimate, 512, 0.5)
    for _ in range(100):
        estimate = ran(estimate, 16, 0.05, fill=16 / 512)
    assert estimate.tokens_per_s == pytest.approx(1_024, rel=0.15)


def test_one_long_text_is_expected_to_take_longer_than_as_many_tokens_of_short_ones() -> None:
    short = batch_cost([32] * 16)
    estimate = ThroughputEstimator(2).after(tokens=512, cost=short, duration_s=0.5, fill=1.0)
    assert estimate.upper_bound_s(short) == pytest.approx(0.5, rel=1e-3)
    assert estimate.upper_bound_s(batch_cost([8_192])) > 7.5 * 16 * 0.5
