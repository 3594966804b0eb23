"""The last free core is left to those who ask, unless what waits is worth it."""

import asyncio
import threading

import pytest
from tests.engine.rig import Rig, sequences
from tests.hand_clock import HandClock

from trivec.backends.fake import FakeBackend
from trivec.core.types import Output, Reply
from trivec.engine.sparing import time_to_spare_s


@pytest.mark.parametrize(
    ("request_count", "waiting_s", "ends_in_s", "expected_s"),
    [
        pytest.param(1, 0.002, 0.003, 0.013, id="a-short-query"),
        pytest.param(8, 0.009, 0.003, 0.013, id="several"),
        pytest.param(
            1, 0.007, 0.003, 0.0, id="a-request-that-costs-the-device-much-more-than-http"
        ),
        pytest.param(20, 0.010, 0.003, 0.0, id="a-third-of-a-full-row"),
        pytest.param(1, 0.002, 0.010, 0.0, id="nobody-is-through-soon"),
        pytest.param(1, 0.002, -0.004, 0.006, id="somebody-is-late"),
        pytest.param(1, 0.002, -0.011, 0.0, id="somebody-is-very-late"),
    ],
)
def test_time_to_spare(
    request_count: int, waiting_s: float, ends_in_s: float, expected_s: float
) -> None:
    left_s = time_to_spare_s(
        request_count=request_count, waiting_s=waiting_s, row_s=0.030, ends_in_s=ends_in_s
    )
    assert left_s == pytest.approx(expected_s)


def test_a_slow_model_spares_no_more_than_a_moment() -> None:
    """Two words to BGE-M3, whose full row takes half a second."""
    at_once = time_to_spare_s(request_count=1, waiting_s=0.004, row_s=0.5, ends_in_s=0.1)
    soon = time_to_spare_s(request_count=1, waiting_s=0.004, row_s=0.5, ends_in_s=0.01)
    assert at_once == 0.0
    assert soon == pytest.approx(0.03)


class AskedClock(HandClock):
    """Tells when a slot's thread has asked for the time, as each does before it chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = threading.Event()

    def now_s(self) -> float:
        if threading.current_thread().name.startswith("trivec-slot"):
            self.asked.set()
        return super().now_s()


class Pair(Rig):
    """Two slots, of which one is held at work and the other has thought about what came since."""

    def __init__(self, *, spares_core: bool = True) -> None:
        self.asked_clock = AskedClock()
        backend = FakeBackend(dimensions=8, slot_count=2)
        super().__init__(backend=backend, clock=self.asked_clock, spares_core=spares_core)

    async def hold_and_ask(self) -> "list[asyncio.Task[Reply]]":
        holder = await self.occupy()
        self.asked_clock.asked.clear()
        query = self.send(sequences(4, first=50_000))
        assert await asyncio.to_thread(self.asked_clock.asked.wait, 60)
        return [holder, query]


async def test_a_short_line_waits_for_the_slot_at_work_and_makes_one_row() -> None:
    async with Pair() as rig:
        sent = [*await rig.hold_and_ask(), rig.send(sequences(5, first=60_000))]
        await rig.queued(*sent)
        rig.backend.gate.set()
        await asyncio.gather(*sent)
    assert rig.batches() == [[4], [4, 5]]


async def test_a_line_that_grows_is_taken_before_the_slot_at_work_is_through() -> None:
    async with Pair() as rig:
        sent = [*await rig.hold_and_ask(), rig.send(sequences(250, first=60_000))]
        await rig.entered(2)
        rig.backend.gate.set()
        await asyncio.gather(*sent)
    assert {length for batch in rig.batches()[1:] for length in batch} == {4, 250}


async def test_no_core_is_spared_while_another_model_has_work_worth_it() -> None:
    async with Pair() as rig:
        other = FakeBackend(dimensions=8, slot_count=2)
        engine = rig.add("other", other)
        sent = await rig.hold_and_ask()
        row = asyncio.create_task(engine.embed(sequences(300), Output.DENSE))
        assert await asyncio.to_thread(other.wait_entered, 1)
        rig.backend.gate.set()
        await asyncio.gather(*sent, row)


async def test_nobody_waits_for_a_slot_that_is_late() -> None:
    async with Pair() as rig:
        sent = await rig.hold_and_ask()
        rig.clock.move(1)
        await rig.entered(2)
        rig.backend.gate.set()
        await asyncio.gather(*sent)
    assert rig.batches() == [[4], [4]]


async def test_a_device_with_no_core_to_spare_takes_what_there_is() -> None:
    async with Pair(spares_core=False) as rig:
        sent = await rig.hold_and_ask()
        await rig.entered(2)
        rig.backend.gate.set()
        await asyncio.gather(*sent)
    assert rig.batches() == [[4], [4]]
