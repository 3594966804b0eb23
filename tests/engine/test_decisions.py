"""The pure decisions of the engine by tables: who may join, how fast, what became of a row."""

import numpy as np
import pytest
from tests.hand_clock import HandClock

from trivec.core.retry import spread_retry_s
from trivec.core.types import SparseVector, Vectors
from trivec.engine.admission import Full, LineLoad, refusal
from trivec.engine.heartbeat import Calls
from trivec.engine.pace import START_TOKENS_PER_S, Pace, work
from trivec.engine.reply import Part, assemble, unsound_rows
from trivec.settings import QueueLimits

BOUND = QueueLimits(tokens_max=100_000, wait_s_max=10, always_requests=0)


@pytest.mark.parametrize(
    ("token_count", "waiting", "before", "wait_s"),
    [
        pytest.param(300_000, 0, 0, None, id="an-empty-line-admits-anything"),
        pytest.param(300_000, 0, 100, None, id="and-so-it-does-after-a-query-on-its-way"),
        pytest.param(5_000, 0, 12_000, 2.0, id="but-not-after-more-than-it-holds"),
        pytest.param(100, 10_000, 10_000, None, id="ten-seconds-of-work-are-admitted"),
        pytest.param(100, 10_500, 10_500, 0.5, id="half-a-second-more-is-not"),
        pytest.param(100, 90_000, 100, None, id="a-small-one-passes-a-huge-one"),
        pytest.param(20_000, 90_000, 5_000, 10.0, id="the-line-holds-no-more-than-its-bound"),
        pytest.param(10_000, 90_000, 5_000, None, id="and-no-less"),
        pytest.param(20_000, 90_000, 25_000, 15.0, id="the-longer-of-two-waits-is-said"),
    ],
)
def test_who_may_join_the_line(
    token_count: int, waiting: int, before: int, wait_s: float | None
) -> None:
    load = LineLoad(int(waiting > 0), waiting, before, tokens_per_s=1_000)
    full = refusal(token_count, load, BOUND)
    assert (full and full.room_in_s) == (None if wait_s is None else pytest.approx(wait_s))


@pytest.mark.parametrize(
    ("requests", "tokens", "full"),
    [
        pytest.param(63, 32_767, False, id="a-short-queue-admits-everything"),
        pytest.param(64, 32_767, True, id="many-requests-count-by-seconds"),
        pytest.param(63, 32_768, True, id="and-so-do-many-tokens"),
        pytest.param(64, 11_999, False, id="which-may-be-a-minute"),
    ],
)
def test_below_64_requests_and_32768_tokens_nothing_is_refused_however_slow_the_device(
    requests: int, tokens: int, full: bool
) -> None:
    load = LineLoad(requests, tokens, tokens_before=tokens, tokens_per_s=200)
    found = refusal(800, load, QueueLimits())
    assert isinstance(found, Full) is full
    if found is not None:
        assert "about 164 s" in found.reason
        assert "queue.wait_s_max, 60 s" in found.reason


@pytest.mark.parametrize("wait_s", [0, 1, 5, 30, 59, 60, 10_000])
def test_whoever_is_refused_comes_back_after_5_to_60_s_and_not_all_at_once(wait_s: float) -> None:
    first, last = spread_retry_s(wait_s, 0.0), spread_retry_s(wait_s, 0.999)
    assert 5 <= first < last <= 60


def test_a_wait_that_is_admitted_is_not_cut_short() -> None:
    assert QueueLimits().first_batch_s_max >= 32_768 / 200
    with pytest.raises(ValueError, match="first_batch_s_max is 30 s, below wait_s_max, 60 s"):
        QueueLimits(first_batch_s_max=30)


def ran(pace: Pace, tokens: int, duration_s: float, fill: float = 1.0) -> Pace:
    return pace.after(tokens=tokens, work=tokens, duration_s=duration_s, fill=fill)


def test_the_first_batch_replaces_the_guess_and_slots_add_up() -> None:
    assert Pace(2).tokens_per_s == pytest.approx(2 * START_TOKENS_PER_S)
    assert ran(Pace(2), 512, 0.5).tokens_per_s == pytest.approx(2 * 1_024, rel=1e-3)


def test_the_pace_follows_a_device_that_slows_down_within_its_window() -> None:
    pace = Pace(1)
    for _ in range(100):
        pace = ran(pace, 1_000, 1.0)
    for _ in range(30):
        pace = ran(pace, 100, 1.0)
    assert pace.tokens_per_s == pytest.approx(100, rel=0.6)


def test_a_night_of_lone_short_texts_does_not_hide_what_full_batches_do() -> None:
    pace = Pace(1)
    for _ in range(10):
        pace = ran(pace, 512, 0.5)
    for _ in range(100):
        pace = ran(pace, 16, 0.05, fill=16 / 512)
    assert pace.tokens_per_s == pytest.approx(1_024, rel=0.15)


def test_one_long_text_is_expected_to_take_longer_than_as_many_tokens_of_short_ones() -> None:
    pace = Pace(2).after(tokens=512, work=work([32] * 16), duration_s=0.5, fill=1.0)
    assert pace.expected_s(work([32] * 16)) == pytest.approx(0.5, rel=1e-3)
    assert pace.expected_s(work([8_192])) > 7.5 * 16 * 0.5


def vectors(*rows: float) -> Vectors:
    dense = np.array(rows, np.float32)[:, None] * np.ones((1, 4), np.float32)
    return Vectors.of(dense, (None,) * len(rows), (None,) * len(rows))


def test_parts_come_together_in_the_order_of_the_request() -> None:
    parts = [Part([4, 0], vectors(4, 0)), Part([2], vectors(2)), Part([1, 3], vectors(1, 3))]
    assert assemble(parts, 5).dense[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_single_part_in_order_is_not_copied_and_one_out_of_order_is_mended() -> None:
    whole = vectors(0, 1, 2)
    assert assemble([Part([0, 1, 2], whole)], 3) is whole
    assert assemble([Part([2, 0, 1], vectors(2, 0, 1))], 3).dense[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
def test_a_row_is_unsound_by_any_of_its_vectors(bad: float) -> None:
    dense = np.ones((5, 4), np.float32)
    dense[1, 3] = bad
    weights = [np.array([1, value], np.float32) for value in (1, 1, bad, 1, 1)]
    sparse = tuple(SparseVector(np.array([5, 6], np.int32), one) for one in weights)
    multi = tuple(np.full((2, 4), value, np.float32) for value in (1, 1, 1, 1, bad))
    assert unsound_rows(Vectors.of(dense, sparse, multi)) == [1, 2, 4]


def test_the_next_look_comes_when_a_call_could_be_late_first() -> None:
    clock = HandClock()
    calls = Calls(2, clock)
    assert calls.next_look_s() == pytest.approx(15)
    calls.began(0, "m", expected_s=10)
    calls.began(1, "m", expected_s=0.1)
    clock.move(6)
    assert [beat.bound_s for beat in calls.beats()] == [50, 15]
    assert calls.next_look_s() == pytest.approx(9)
    clock.move(10)
    assert calls.hung() is None
    assert calls.next_look_s() == pytest.approx(1), "soon, to see whether it is still there"
    hung = calls.hung()
    assert hung is not None
    assert hung.slot == 1


def test_another_call_in_the_same_slot_is_not_the_one_that_was_late() -> None:
    clock = HandClock()
    calls = Calls(1, clock)
    for _ in range(2):
        calls.began(0, "m", expected_s=0)
        clock.move(20)
        assert calls.hung() is None
        calls.ended(0)
    assert calls.hung() is None
    assert calls.beats() == ()
