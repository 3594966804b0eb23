"""The instant that allowances go by, whatever somebody does to the wall clock."""

import pytest
from tests.hand_clock import HandClock

from trivec.accounts import timeline
from trivec.accounts.timeline import Timeline

HOUR_S = 3600


@pytest.mark.parametrize("moved_s", [HOUR_S, -HOUR_S], ids=["an-hour-ahead", "an-hour-back"])
def test_moving_the_wall_clock_moves_nothing(moved_s: float) -> None:
    clock = HandClock()
    line = Timeline(clock)
    before_us = line.now_us()

    clock.set_wall_by(moved_s)
    clock.move(2)

    assert line.now_us() - before_us == 2_000_000


@pytest.mark.parametrize("moved_s", [HOUR_S, -HOUR_S], ids=["an-hour-ahead", "an-hour-back"])
def test_a_process_that_starts_after_the_wall_clock_was_moved_agrees_with_the_first(
    moved_s: float,
) -> None:
    clock = HandClock()
    first = Timeline(clock)
    agreed_us = first.offset_proposed_us()
    first.agree(agreed_us)

    clock.set_wall_by(moved_s)
    second = Timeline(clock)
    second.agree(agreed_us)

    assert second.now_us() == first.now_us()


def test_it_jumps_forward_to_what_others_have_seen_and_never_back() -> None:
    line = Timeline(HandClock())
    start_us = line.now_us()

    line.catch_up(start_us + 5_000_000)
    line.catch_up(start_us - 5_000_000)

    assert line.now_us() == start_us + 5_000_000


def test_processes_of_one_boot_know_each_other() -> None:
    if not timeline.BOOT_ID.exists():
        pytest.skip("this system does not say which boot it is")

    assert timeline.boot_id() == timeline.boot_id()
