"""Background requests, of batch jobs: computed only while nothing else waits."""

import asyncio

import pytest
from tests.engine.rig import NO_FLOOR, Rig, sequences
from tests.engine.test_engine import TakingTime
from tests.hand_clock import HandClock

from trivec.backends.fake import FakeBackend
from trivec.core.errors import Overloaded
from trivec.core.events import BatchRan
from trivec.core.types import Batch, BatchBudget, Output, Vectors
from trivec.settings import QueueLimits


def small_batches() -> FakeBackend:
    return FakeBackend(dimensions=8, outputs=Output.DENSE, budget=BatchBudget(100, 4))


async def test_a_lone_query_waits_for_the_batch_on_the_device_at_most() -> None:
    async with Rig(backend=small_batches()) as rig:
        holder = await rig.occupy()
        behind = rig.send(sequences(*[50] * 20), background=True)
        await rig.queued(behind)
        query = rig.send(sequences(7, first=5_000))
        await rig.queued(query)
        rig.backend.gate.set()
        await asyncio.gather(holder, query, behind)
    assert rig.batches()[:2] == [[4], [7]]
    assert len(rig.batches()) == 2 + 10


async def test_it_comes_between_two_batches_of_one_background_request() -> None:
    async with Rig(backend=small_batches()) as rig:
        rig.backend.gate.clear()
        behind = rig.send(sequences(*[50] * 20), background=True)
        await rig.entered(1)
        query = rig.send(sequences(7, first=5_000))
        await rig.queued(query)
        rig.backend.gate.set()
        await asyncio.gather(query, behind)
    assert rig.batches()[:2] == [[50, 50], [7]]


async def test_of_two_models_the_one_with_a_query_is_served_first() -> None:
    other = small_batches()
    async with Rig(backend=small_batches()) as rig:
        second = rig.add("second", other)
        holder = await rig.occupy()
        behind = rig.send(sequences(*[50] * 4), background=True)
        await rig.queued(behind)
        query = asyncio.create_task(second.embed(sequences(7, first=5_000), Output.DENSE))
        await rig.queued(query)
        rig.backend.gate.set()
        await query
        assert len(rig.backend.ran) <= 2  # the holder, and at most the batch beside the query
        await asyncio.gather(holder, behind)


class HeldInTheEnd(TakingTime):
    """A second a batch; from the twentieth on they wait for the gate."""

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        if len(self.ran) == 19:
            self.gate.clear()
        return super().run(batch, slot=slot)


async def test_a_model_whose_background_requests_wait_gains_no_claim_by_it() -> None:
    clock = HandClock()
    async with Rig(backend=HeldInTheEnd(clock, 1.0), clock=clock) as rig:
        other = rig.add("late", TakingTime(clock, 1.0))
        busy = rig.send(sequences(*[500] * 40))
        await rig.entered(1)
        texts = sequences(*[500] * 10, first=50_000)
        behind = asyncio.create_task(other.embed(texts, Output.DENSE, background=True))
        await rig.entered(20)
        late = asyncio.create_task(other.embed(texts, Output.DENSE))
        await rig.queued(late)
        rig.backend.gate.set()
        await asyncio.gather(busy, behind, late)
    order = [event.model for event in rig.listener.heard(BatchRan)]
    assert order[20:30].count("late") == pytest.approx(5, abs=1)


async def test_background_requests_take_no_room_in_the_queue_and_are_not_refused() -> None:
    limits = QueueLimits(tokens_max=100, **NO_FLOOR)
    async with Rig(backend=small_batches(), limits=limits) as rig:
        holder = await rig.occupy()
        behind = [rig.send(sequences(*[50] * 10), background=True) for _ in range(3)]
        await rig.queued(*behind)
        assert rig.engine.queued_tokens == 0
        query, late = rig.send(sequences(90)), rig.send(sequences(50))
        await rig.queued(query)
        with pytest.raises(Overloaded):
            await late
        rig.backend.gate.set()
        await asyncio.gather(holder, query, *behind)


async def test_one_that_is_cancelled_leaves_nothing() -> None:
    async with Rig(backend=small_batches()) as rig:
        holder = await rig.occupy()
        behind = rig.send(sequences(*[50] * 20), background=True)
        await rig.queued(behind)
        behind.cancel()
        await asyncio.wait([behind])
        assert behind.cancelled()
        later = rig.send(sequences(7, first=5_000), background=True)
        await rig.queued(later)
        rig.backend.gate.set()
        await asyncio.gather(holder, later)
    assert rig.batches() == [[4], [7]]
    assert rig.engine.open_requests == 0
