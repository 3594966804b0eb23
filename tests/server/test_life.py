"""The life of the process as a table: which stage follows which, and what the probes then say."""

import pytest

from trivec.server.life import NEXT, Happening, Life, Stage, health

BROKEN = 70


def lived(*happenings: Happening) -> Life:
    life = Life()
    for happening in happenings:
        life = life.after(happening)
    return life


LOADED, FAILED, ASKED = Happening.LOADED, Happening.FAILED, Happening.ASKED
HUNG, TIME_UP, EMPTY = Happening.HUNG, Happening.TIME_UP, Happening.EMPTY


@pytest.mark.parametrize(
    ("happenings", "stage", "exit_code"),
    [
        pytest.param([], Stage.LOADING, 0, id="it-begins-by-loading"),
        pytest.param([LOADED], Stage.SERVING, 0, id="loaded-it-serves"),
        pytest.param([FAILED], Stage.GONE, 0, id="what-cannot-load-leaves"),
        pytest.param([ASKED], Stage.GONE, 0, id="asked-while-loading-it-leaves-at-once"),
        pytest.param([LOADED, ASKED], Stage.LINGERING, 0, id="asked-it-still-listens"),
        pytest.param([LOADED, ASKED, TIME_UP], Stage.FINISHING, 0, id="then-it-stops-listening"),
        pytest.param([LOADED, ASKED, TIME_UP, EMPTY], Stage.GONE, 0, id="and-leaves-when-empty"),
        pytest.param(
            [LOADED, ASKED, TIME_UP, TIME_UP], Stage.REFUSING, 0, id="who-takes-too-long-is-refused"
        ),
        pytest.param([LOADED, ASKED, ASKED], Stage.REFUSING, 0, id="asked-twice-it-refuses"),
        pytest.param(
            [LOADED, ASKED, TIME_UP, ASKED], Stage.REFUSING, 0, id="asked-twice-later-too"
        ),
        pytest.param([LOADED, ASKED, ASKED, TIME_UP], Stage.GONE, 0, id="refusing-has-an-end"),
        pytest.param([LOADED, HUNG], Stage.REFUSING, BROKEN, id="a-hang-refuses-everyone"),
        pytest.param([LOADED, HUNG, EMPTY], Stage.GONE, BROKEN, id="and-leaves-to-be-restarted"),
        pytest.param(
            [LOADED, ASKED, HUNG, TIME_UP], Stage.GONE, BROKEN, id="a-hang-while-draining-too"
        ),
        pytest.param([LOADED, EMPTY], Stage.GONE, BROKEN, id="a-server-that-ends-by-itself-broke"),
        pytest.param([HUNG, LOADED], Stage.SERVING, 0, id="nothing-hangs-before-it-serves"),
    ],
)
def test_what_follows(happenings: list[Happening], stage: Stage, exit_code: int) -> None:
    life = lived(*happenings)
    assert (life.stage, life.exit_code) == (stage, exit_code)


def test_nothing_returns_from_the_end_and_nothing_goes_back() -> None:
    order = list(Stage)
    for (before, _), after in NEXT.items():
        assert order.index(after) > order.index(before)


@pytest.mark.parametrize("stage", list(Stage))
def test_only_a_serving_process_is_ready(stage: Stage) -> None:
    look = health(Life(stage), loading="m", hung=None, troubles=())
    assert look.ready == (stage is Stage.SERVING)
    assert look.alive
    assert (look.reason == "ok") == look.ready


def test_a_trouble_that_may_pass_makes_it_unready_and_is_named() -> None:
    look = health(Life(Stage.SERVING), loading="", hung=None, troubles=("the disk is full",))
    assert (look.alive, look.ready, look.reason) == (True, False, "the disk is full")


def test_a_hang_makes_it_neither_alive_nor_ready() -> None:
    look = health(Life(Stage.SERVING), loading="", hung="worker 0 hangs", troubles=())
    assert (look.alive, look.ready, look.reason) == (False, False, "worker 0 hangs")
