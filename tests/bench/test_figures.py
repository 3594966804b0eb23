"""Figures: medians, percentiles, turns and ratios, each from numbers one can check by hand."""

import os
from typing import Any

import pytest
from benchmarks.figures import MASK, Spread, parser, percentile, provenance, ratio


def test_a_spread_is_its_median_and_both_ends() -> None:
    assert Spread.of([3.0, 1.0, 10.0]) == Spread(3.0, 1.0, 10.0, 3)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        pytest.param(range(1, 101), 0.99, 99, id="the-ninety-ninth-of-a-hundred"),
        pytest.param(range(1, 101), 0.5, 50, id="half-of-a-hundred"),
        pytest.param([7], 0.99, 7, id="the-only-one"),
        pytest.param([5, 1, 3], 1.0, 5, id="all-of-them-unsorted"),
        pytest.param([5, 1, 3], 0.0, 1, id="none-of-them"),
    ],
)
def test_a_percentile_is_a_value_that_was_seen(
    values: list[float], share: float, expected: float
) -> None:
    assert percentile(values, share) == expected


def test_a_ratio_is_taken_round_by_round() -> None:
    slow_round = ratio([10.0, 1.0, 10.0], [5.0, 0.5, 5.0])
    assert (slow_round.lowest, slow_round.median, slow_round.highest) == (2.0, 2.0, 2.0)


def test_a_result_says_where_it_comes_from() -> None:
    said: dict[str, Any] = provenance("numpy", "no-such-package")
    assert said["packages"]["no-such-package"] == "absent"
    assert all(said[name] for name in ("date", "commit", "cpu", "core_count", "python"))


def test_a_measurement_is_given_its_own_options_and_the_mask_is_set_for_all() -> None:
    with pytest.MonkeyPatch.context() as patched:
        for name in MASK:
            patched.delenv(name, raising=False)
            patched.setenv(name, "")  # so that it is put back as it was
        given = vars(parser("", seconds=1.0).parse_args(["--avx2", "--seconds", "2"]))
        assert {name: os.environ[name] for name in MASK} == MASK
    assert given == {"record": False, "seconds": 2.0}
