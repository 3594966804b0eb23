"""Deadlines that share one timer: each is called for when it is due, and not before."""

import asyncio

import pytest

from trivec.core.clock import Deadlines

AGES_S = 3600.0


class Called:
    """What was called for, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.is_full = asyncio.Event()

    def __call__(self, name: str) -> None:
        self.names.append(name)
        if len(self.names) == 2:
            self.is_full.set()


async def test_what_is_due_earlier_is_called_for_earlier_in_whichever_order_it_was_set() -> None:
    called, now_s = Called(), asyncio.get_running_loop().time()
    deadlines = Deadlines(called)
    for name, in_s in (("never", AGES_S), ("second", 0.02), ("first", 0.01)):
        deadlines.set(name, now_s + in_s)
    await called.is_full.wait()
    assert called.names == ["first", "second"]


async def test_what_was_unset_or_set_anew_is_not_called_for_at_its_old_time() -> None:
    called, now_s = Called(), asyncio.get_running_loop().time()
    deadlines = Deadlines(called)
    for name in ("unset", "moved", "kept"):
        deadlines.set(name, now_s + 0.01)
    deadlines.set("unset", None)
    deadlines.set("moved", now_s + 0.02)
    await called.is_full.wait()
    assert called.names == ["kept", "moved"]


async def test_a_deadline_that_is_set_when_another_is_due_is_called_for_too() -> None:
    called = Called()

    def again(name: str) -> None:
        called(name)
        if name == "first":
            deadlines.set("second", 0.0)

    deadlines = Deadlines(again)
    deadlines.set("first", 0.0)
    await called.is_full.wait()
    assert called.names == ["first", "second"]


async def test_a_late_deadline_that_is_set_when_another_is_due_hides_no_earlier_one() -> None:
    called, now_s = Called(), asyncio.get_running_loop().time()

    def later(name: str) -> None:
        called(name)
        deadlines.set(name, now_s + AGES_S)

    deadlines = Deadlines(later)
    deadlines.set("first", now_s + 0.01)
    deadlines.set("second", now_s + 0.02)
    await asyncio.wait_for(called.is_full.wait(), 60)
    assert called.names == ["first", "second"]


@pytest.mark.parametrize("after_s", [AGES_S, None], ids=["put-off", "unset"])
async def test_of_several_that_are_due_at_once_one_may_move_another(after_s: float | None) -> None:
    called, now_s = Called(), asyncio.get_running_loop().time()

    def move(name: str) -> None:
        called(name)
        deadlines.set("second", None if after_s is None else now_s + after_s)

    deadlines = Deadlines(move)
    for name, ago_s in (("first", 3), ("second", 2), ("third", 1)):
        deadlines.set(name, now_s - ago_s)
    await called.is_full.wait()
    assert called.names == ["first", "third"]
