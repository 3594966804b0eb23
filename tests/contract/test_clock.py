"""What every `Clock` promises."""

from collections.abc import Callable

import pytest
from tests.hand_clock import HandClock

from trivec.core.clock import SystemClock
from trivec.core.ports import Clock

CLOCKS: dict[str, Callable[[], Clock]] = {"real": SystemClock, "hand-moved": HandClock}


@pytest.fixture(params=CLOCKS)
def clock(request: pytest.FixtureRequest) -> Clock:
    return CLOCKS[request.param]()


def test_waits_are_measured_by_time_that_never_runs_backwards(clock: Clock) -> None:
    times = [clock.now_s() for _ in range(1_000)]
    assert times == sorted(times)


def test_what_is_written_down_is_seconds_since_the_epoch(clock: Clock) -> None:
    in_2020, in_2100 = 1_577_836_800, 4_102_444_800
    assert in_2020 < clock.wall_s() < in_2100


def test_the_real_clock_moves_by_itself() -> None:
    clock = SystemClock()
    began_s = clock.now_s()
    while clock.now_s() == began_s:
        pass
    assert clock.now_s() > began_s


def test_the_hand_moved_clock_moves_both_times_by_what_it_is_told_and_only_then() -> None:
    clock = HandClock()
    now_s, wall_s = clock.now_s(), clock.wall_s()
    assert (clock.now_s(), clock.wall_s()) == (now_s, wall_s)
    clock.move(2.5)
    assert (clock.now_s(), clock.wall_s()) == (now_s + 2.5, wall_s + 2.5)
    with pytest.raises(AssertionError):
        clock.move(-1)
