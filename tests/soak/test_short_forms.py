"""The short form of each soak: the same code as the long one, for seconds."""

import pytest
from tests.soak import (
    drain,
    kills,
    leavers,
    memory_bound,
    overload,
    poison,
    slow,
    soak,
    usage_sums,
)
from tests.soak.report import Report

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def hang_guards_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """How soon something comes is for the long forms: here it only has to come."""
    monkeypatch.setattr(kills, "BACK_S_MAX", 60.0)
    monkeypatch.setattr(slow, "LET_GO_S", 60.0)
    monkeypatch.setattr(leavers, "SETTLE_S_MAX", 60.0)


TIMINGS = ("seconds", "p99 of")


def assert_passed(report: Report) -> None:
    assert report.checks
    assert [one for one in report.failures if not one.says.startswith(TIMINGS)] == []


def test_only_the_poisoned_item_of_a_batch_fails() -> None:
    assert_passed(poison.run(batches=4 * len(poison.STAGES)))


def test_who_leaves_the_line_is_not_computed_and_not_billed() -> None:
    assert_passed(leavers.run(clients=150))


def test_stops_under_load_lose_nothing_that_was_accepted() -> None:
    assert_passed(drain.run(times=2))


def test_killed_or_hung_it_ends_and_the_next_is_never_ready_while_dead() -> None:
    assert_passed(kills.run(times=1))


def test_slow_clients_are_let_go_of_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good traffic fares beside them is for the long form: no timing fails a test here."""
    monkeypatch.setattr(slow, "BASELINE_S", 0.5)
    monkeypatch.setattr(slow, "SETTLE_S", 0.5)
    report = slow.run(clients=50, bound_s=1.0)
    assert [one for one in report.failures if "still held" in one.says] == []


def test_what_clients_can_make_it_hold_is_refused_and_given_back() -> None:
    """How much, and how good traffic fares beside it, is for the long form."""
    report = memory_bound.run(clients=40, tokenizers=8, seconds=1.0, backend="fake", memory_mib=64)
    assert [one for one in report.failures if not one.says.startswith(("good", "peak"))] == []
    bodies = report.figures["half-sent bodies"]["came_to"]
    assert bodies.get("503", 0) > 0, "240 MiB of bodies fit in 40"


def test_a_flood_is_refused_with_a_time_to_return_and_passes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(overload, "TIMES", (20,))
    monkeypatch.setattr(overload, "CAPACITY_S", 2.0)
    report = overload.run(seconds=2.0, tokens_per_s=40_000.0)
    # How many are refused, exactly, is in `test_flood`. How fast is for the long form, and so is how
    # many the probe saw: on a slow machine the clients are what is full.
    timings = ("goodput", "p99", "refusals that were timed", "seconds until back")
    assert [one for one in report.failures if not one.says.startswith(timings)] == []


def test_sums_over_a_filled_ledger_miss_nothing_beside_good_clients() -> None:
    """How long the good ones wait is for the long form."""
    report = usage_sums.run(seconds=1.0, rows=20_000, backend="fake")
    assert report.checks
    assert [one for one in report.failures if "p99" not in one.says] == []


def test_ordinary_life_leaves_nothing_behind() -> None:
    assert_passed(soak.run(minutes=0.1, backend="fake"))


@pytest.mark.parametrize(("figure", "holds"), [(1.0, True), (1.1, False)])
def test_a_figure_beyond_its_pass_line_fails_the_report(figure: float, holds: bool) -> None:
    report = Report()
    report.at_most("a figure", figure, 1.0)
    assert (not report.failures) is holds
