"""The last free slot leaves a short queue to a busy one, unless the work is worth a core."""

import asyncio
import threading

import pytest
from tests.engine.rig import Rig, sequences
from tests.hand_clock import HandClock

from trivec.backends.fake import FakeBackend
from trivec.core.types import Output, Reply
from trivec.engine.scheduler import coalescing_delay_s


@pytest.mark.parametrize(
    ("request_count", "queued_s", "next_free_s", "expected_s"),
    [
        pytest.param(1, 0.002, 0.003, 0.013, id="a-short-query"),
        pytest.param(8, 0.009, 0.003, 0.013, id="several"),
        pytest.param(
            1, 0.007, 0.003, 0.0, id="a-request-that-costs-the-device-much-more-than-http"
        ),
        pytest.param(20, 0.010, 0.003, 0.0, id="a-third-of-a-full-batch"),
        pytest.param(1, 0.002, 0.010, 0.0, id="no-slot-is-free-soon"),
        pytest.param(1, 0.002, -0.004, 0.006, id="a-slot-is-late"),
        pytest.param(1, 0.002, -0.011, 0.0, id="a-slot-is-very-late"),
    ],
)
def test_delay_of_a_batch(
    request_count: int, queued_s: float, next_free_s: float, expected_s: float
) -> None:
    delay_s = coalescing_delay_s(
        request_count=request_count, queued_s=queued_s, full_batch_s=0.030, next_free_s=next_free_s
    )
    assert delay_s == pytest.approx(expected_s)


def test_a_slow_model_delays_no_more_than_a_moment() -> None:
    """Two words to BGE-M3, whose full batch takes half a second."""
    now = coalescing_delay_s(request_count=1, queued_s=0.004, full_batch_s=0.5, next_free_s=0.1)
    soon = coalescing_delay_s(request_count=1, queued_s=0.004, full_batch_s=0.5, next_free_s=0.01)
    assert now == 0.0
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

    def __init__(self, *, coalesces: bool = True) -> None:
        self.asked_clock = AskedClock()
        backend = FakeBackend(dimensions=8, slot_count=2)
        super().__init__(backend=backend, clock=self.asked_clock, coalesces=coalesces)

    async def hold_and_ask(self) -> "list[asyncio.Task[Reply]]":
        holder = await self.occupy()
        self.asked_clock.asked.clear()
        query = self.send(sequences(4, first=50_000))
        assert await asyncio.to_thread(self.asked_clock.asked.wait, 60)
        return [holder, query]


async def test_a_short_queue_waits_for_the_busy_slot_and_makes_one_batch() -> None:
    async with Pair() as rig:
        sent = [*await rig.hold_and_ask(), rig.send(sequences(5, first=60_000))]
        await rig.queued(*sent)
        rig.backend.gate.set()
        await asyncio.gather(*sent)
    assert rig.batches() == [[4], [4, 5]]


async def test_a_queue_that_grows_is_taken_before_the_busy_slot_is_free() -> None:
    async with Pair() as rig:
        sent = [*await rig.hold_and_ask(), rig.send(sequences(250, first=60_000))]
        await rig.entered(2)
        rig.backend.gate.set()
        await asyncio.gather(*sent)
    assert {length for batch in rig.batches()[1:] for length in batch} == {4, 250}


async def test_nothing_is_delayed_while_another_model_has_work_worth_a_core() -> None:
    async with Pair() as rig:
        other = FakeBackend(dimensions=8, slot_count=2)
        engine = rig.add("other", other)
        sent = await rig.hold_and_ask()
        full = asyncio.create_task(engine.embed(sequences(300), Output.DENSE))
        assert await asyncio.to_thread(other.wait_entered, 1)
        rig.backend.gate.set()
        await asyncio.gather(*sent, full)


async def test_no_batch_waits_for_a_slot_that_is_late() -> None:
    async with Pair() as rig:
        sent = await rig.hold_and_ask()
        rig.clock.move(1)
        await rig.entered(2)
        rig.backend.gate.set()
        await asyncio.gather(*sent)
    assert rig.batches() == [[4], [4]]


async def test_a_device_with_no_core_to_spare_takes_what_there_is() -> None:
    async with Pair(coalesces=False) as rig:
        sent = await rig.hold_and_ask()
        await rig.entered(2)
        rig.backend.gate.set()
        await asyncio.gather(*sent)
    assert rig.batches() == [[4], [4]]
