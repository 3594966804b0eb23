"""An engine through its port: order, sharing, admission, deadlines, departures."""

import asyncio

import numpy as np
import pytest
from tests.engine.rig import ALL, NO_FLOOR, Rig, alone, sequences
from tests.hand_clock import HandClock, HandLoop

from trivec.backends.fake import FakeBackend
from trivec.core.errors import DeadlineExceeded, Overloaded
from trivec.core.events import BatchRan, QueueChanged
from trivec.core.types import Batch, BatchBudget, Output, Vectors
from trivec.engine.pace import Pace
from trivec.settings import QueueLimits


async def test_answers_are_in_the_order_of_the_texts_whatever_the_packing() -> None:
    what = sequences(*(7 + 31 * i % 400 for i in range(100)))
    async with Rig(backend=FakeBackend(dimensions=8, outputs=ALL, slot_count=3)) as rig:
        reply = await rig.engine.embed(what, ALL)
    assert len(rig.batches()) > 5
    assert len(reply.vectors) == 100
    for i in range(100):
        expected = alone(what, i, ALL)
        sparse, multi = reply.vectors.sparse[i], reply.vectors.multi[i]
        assert sparse is not None
        assert multi is not None
        np.testing.assert_array_equal(reply.vectors.dense[i], expected.dense[0])
        np.testing.assert_array_equal(sparse.token_ids, expected.sparse[0].token_ids)
        np.testing.assert_array_equal(multi, expected.multi[0])


async def test_requests_with_different_outputs_share_a_batch() -> None:
    async with Rig() as rig:
        holder = await rig.occupy()
        dense = rig.send(sequences(9), Output.DENSE)
        sparse = rig.send(sequences(8), Output.SPARSE)
        both = rig.send(sequences(7), Output.DENSE | Output.MULTI)
        await rig.queued(dense, sparse, both)
        rig.backend.gate.set()
        replies = [one.vectors for one in (await dense, await sparse, await both)]
        await holder
    assert rig.batches() == [[4], [9, 8, 7]]
    assert [one.sparse[0] is not None for one in replies] == [False, True, False]
    assert [one.multi[0] is not None for one in replies] == [False, False, True]


async def test_requests_of_several_texts_that_share_a_batch_get_their_own_rows() -> None:
    first, second = sequences(20, 30, 10), sequences(15, 25, first=90_000)
    async with Rig() as rig:
        holder = await rig.occupy()
        sent = [rig.send(first), rig.send(second)]
        await rig.queued(*sent)
        rig.backend.gate.set()
        replies = await asyncio.gather(*sent)
        await holder
    assert rig.batches()[1:] == [[30, 20, 10, 25, 15]]
    for what, reply in zip((first, second), replies, strict=True):
        for i in range(len(what)):
            np.testing.assert_array_equal(reply.vectors.dense[i], alone(what, i).dense[0])


async def test_free_slots_share_a_request_that_one_row_could_hold() -> None:
    async with Rig(backend=FakeBackend(dimensions=8, slot_count=2)) as rig:
        rig.backend.gate.clear()
        request = rig.send(sequences(128, 128, 128, 128))
        await rig.entered(2)
        rig.backend.gate.set()
        await request
    assert rig.batches() == [[128, 128], [128, 128]]
    assert {call.slot for call in rig.backend.ran} == {0, 1}


async def test_a_small_request_is_not_split_however_many_slots_are_free() -> None:
    async with Rig(backend=FakeBackend(dimensions=8, slot_count=4)) as rig:
        await rig.engine.embed(sequences(30, 30, 30), Output.DENSE)
    assert rig.batches() == [[30, 30, 30]]


async def test_queue_and_compute_times_meet_at_the_first_batch() -> None:
    async with Rig() as rig:
        holder = await rig.occupy()
        request = rig.send(sequences(400, 300))
        await rig.queued(request)
        rig.clock.move(3)
        rig.backend.gate.set()
        reply = await request
        await holder
    assert (reply.queue_s, reply.compute_s) == (3, 0)


async def test_a_full_line_refuses_at_once_and_says_when_to_return() -> None:
    bound = QueueLimits(wait_s_max=10, **NO_FLOOR)
    async with Rig(bound=bound) as rig:
        holder = await rig.occupy()  # nothing measured yet: 1,000 tokens a second
        big = [rig.send(sequences(*[500] * 10)) for _ in range(3)]
        await rig.queued(*big)
        with pytest.raises(Overloaded) as refusal:
            await rig.engine.embed(sequences(*[500] * 8), Output.DENSE)
        assert 5 <= refusal.value.retry_after_s <= 7.5, "2 s, and no client comes back so soon"
        small = rig.send(sequences(500))
        await rig.queued(small)
        rig.backend.gate.set()
        await asyncio.gather(holder, small, *big)


async def test_eight_clients_of_a_slow_model_are_all_served() -> None:
    """A 24-layer model at 200 tokens/s: each client sends one list of 6 texts, 800 tokens."""
    async with Rig() as rig:
        (lane,) = rig.workers.desk.lanes
        lane.pace = Pace(1).after(tokens=2_000, work=2_000, duration_s=10, fill=1)
        assert lane.pace.tokens_per_s == pytest.approx(200, rel=0.01)
        holder = await rig.occupy()
        lists = [rig.send(sequences(133, 133, 133, 133, 134, 134)) for _ in range(8)]
        await rig.queued(*lists)
        assert lane.line.token_count == 8 * 800
        rig.engine.check_admission(800, tokens_ahead=8 * 800)  # as before a ninth is tokenised
        rig.clock.move(59)  # the last of them waits half a minute for its first batch
        rig.backend.gate.set()
        assert [len((await one).vectors) for one in lists] == [6] * 8
        await holder


async def test_a_refusal_names_the_estimate_the_setting_and_when_to_come_back() -> None:
    async with Rig() as rig:
        (lane,) = rig.workers.desk.lanes
        lane.pace = Pace(1).after(tokens=2_000, work=2_000, duration_s=10, fill=1)
        with pytest.raises(Overloaded) as early:
            rig.engine.check_admission(40_000, tokens_ahead=40_000)
    assert "40000 tokens" in str(early.value)
    assert "about 200 s, more than queue.wait_s_max, 60 s" in str(early.value)
    assert 5 <= early.value.retry_after_s <= 60


async def test_an_empty_line_admits_what_is_larger_than_its_bound() -> None:
    async with Rig(bound=QueueLimits(tokens_max=100, wait_s_max=0.1, **NO_FLOOR)) as rig:
        holder = await rig.occupy()
        huge = rig.send(sequences(500, 500))
        await rig.queued(huge)
        with pytest.raises(Overloaded):
            await rig.engine.embed(sequences(3), Output.DENSE)
        rig.backend.gate.set()
        assert len((await huge).vectors) == 2
        await holder


async def test_a_caller_that_leaves_frees_its_tokens_at_once_and_never_runs() -> None:
    async with Rig(bound=QueueLimits(tokens_max=1_000, **NO_FLOOR)) as rig:
        holder = await rig.occupy()
        leaver = rig.send(sequences(900))
        await rig.queued(leaver)
        with pytest.raises(Overloaded):
            await rig.engine.embed(sequences(200), Output.DENSE)
        leaver.cancel()
        await asyncio.wait([leaver])
        stayer = rig.send(sequences(200))
        await rig.queued(stayer)
        rig.backend.gate.set()
        await asyncio.gather(holder, stayer)
    assert rig.batches() == [[4], [200]]


async def test_a_caller_that_leaves_in_the_middle_has_no_more_batches() -> None:
    async with Rig() as rig:
        rig.backend.gate.clear()
        leaver = rig.send(sequences(*[500] * 10))
        await rig.entered(1)
        leaver.cancel()
        await asyncio.wait([leaver])
        rig.backend.gate.set()
        await rig.engine.embed(sequences(5), Output.DENSE)
    assert rig.batches() == [[500], [5]]


async def test_a_deadline_that_passes_in_line_is_answered_while_the_device_is_busy() -> None:
    async with Rig() as rig:
        holder = await rig.occupy()
        with pytest.raises(DeadlineExceeded) as late:
            await rig.engine.embed(sequences(5), Output.DENSE, deadline_s=0.001)
        assert late.value.retry_after_s >= 0
        rig.backend.gate.set()
        await holder
        await rig.engine.embed(sequences(6), Output.DENSE)
    assert rig.batches() == [[4], [6]], "what is late never reaches the device"


async def test_whoever_is_late_when_a_slot_frees_is_dropped_before_the_choice() -> None:
    async with Rig(bound=QueueLimits(wait_s_max=30, first_batch_s_max=30)) as rig:
        holder = await rig.occupy()
        late = rig.send(sequences(9))
        await rig.queued(late)
        rig.clock.move(29)
        in_time = rig.send(sequences(7))
        await rig.queued(in_time)
        rig.clock.move(1)
        rig.backend.gate.set()
        with pytest.raises(DeadlineExceeded):
            await late
        await asyncio.gather(holder, in_time)
    assert rig.batches() == [[4], [7]]


async def test_a_request_that_began_in_time_may_take_longer_than_its_deadline() -> None:
    async with Rig() as rig:
        rig.backend.gate.clear()
        request = rig.send(sequences(500, 500, 500), deadline_s=5)
        await rig.entered(1)
        rig.clock.move(100)
        rig.backend.gate.set()
        assert len((await request).vectors) == 3


def test_a_deadline_that_passes_after_the_first_batch_began_changes_nothing() -> None:
    async def begin_and_let_pass(loop: HandLoop) -> None:
        async with Rig() as rig:
            rig.backend.gate.clear()
            request = rig.send(sequences(5), deadline_s=60)
            await rig.entered(1)
            loop.move(600)
            rig.clock.move(600)
            await asyncio.sleep(0.01)  # a turn in which timers are looked at, with time to spare
            rig.backend.gate.set()
            assert len((await asyncio.wait_for(request, 60)).vectors) == 1

    loop = HandLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(begin_and_let_pass(loop))


async def test_a_query_waits_for_no_more_than_the_batch_under_way() -> None:
    async with Rig() as rig:
        rig.backend.gate.clear()
        bulk = rig.send(sequences(*[128] * 200))
        await rig.entered(1)
        query = rig.send(sequences(16))
        await rig.queued(query)
        rig.backend.gate.set()
        await asyncio.gather(bulk, query)
    assert rig.batches()[1] == [16]
    assert sum(map(len, rig.batches())) == 201


class TakingTime(FakeBackend):
    """Moves the clock by *batch_s* in every batch."""

    def __init__(self, clock: HandClock, batch_s: float) -> None:
        super().__init__(dimensions=8)
        self._clock = clock
        self._batch_s = batch_s

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        vectors = super().run(batch, slot=slot)
        self._clock.move(self._batch_s)
        return vectors


async def test_two_models_share_a_device_by_the_time_they_take() -> None:
    clock = HandClock()
    async with Rig(backend=TakingTime(clock, 0.1), clock=clock) as rig:
        other = rig.add("slow", TakingTime(clock, 1.0))
        holder = await rig.occupy()
        slow = asyncio.create_task(other.embed(sequences(*[500] * 3), Output.DENSE))
        quick = rig.send(sequences(*[500] * 30))
        await rig.queued(slow, quick)
        rig.backend.gate.set()
        await asyncio.gather(holder, slow, quick)
    order = "".join(event.model[0] for event in rig.listener.heard(BatchRan))
    assert [len(run) for run in order.split("s")][1:] == pytest.approx([10, 10, 10], abs=1)


async def test_a_model_that_was_idle_has_no_claim_on_the_time_it_did_not_use() -> None:
    clock = HandClock()
    async with Rig(backend=TakingTime(clock, 1.0), clock=clock) as rig:
        late_comer = rig.add("late", TakingTime(clock, 1.0))
        await rig.engine.embed(sequences(*[500] * 20), Output.DENSE)
        holder = await rig.occupy()
        before = len(rig.listener.heard(BatchRan))
        late = asyncio.create_task(late_comer.embed(sequences(*[500] * 10), Output.DENSE))
        steady = rig.send(sequences(*[500] * 10))
        await rig.queued(late, steady)
        rig.backend.gate.set()
        await asyncio.gather(holder, late, steady)
    order = [event.model for event in rig.listener.heard(BatchRan)][before + 1 :]
    assert order[:10].count("late") == pytest.approx(5, abs=1)


async def test_each_batch_and_a_line_that_grows_are_told() -> None:
    async with Rig(backend=FakeBackend(dimensions=8, budget=BatchBudget(100, 8))) as rig:
        holder = await rig.occupy()
        waiting = rig.send(sequences(60, 50))
        await rig.queued(waiting)
        assert rig.listener.heard(QueueChanged)[-1] == QueueChanged("fake", 1, 110)
        rig.backend.gate.set()
        await asyncio.gather(holder, waiting)
    runs = rig.listener.heard(BatchRan)
    assert [(run.sequences, run.tokens, run.failed) for run in runs] == [
        (1, 4, False),
        (1, 60, False),
        (1, 50, False),
    ]
    assert rig.listener.heard(QueueChanged)[-1] == QueueChanged("fake", 0, 0)


async def test_what_is_on_its_way_counts_for_a_query_no_more_than_turns_do() -> None:
    """Beside a bulk request that nearly fills the line: fair turns serve a query long before it."""
    bound = QueueLimits(
        wait_s_max=10, **NO_FLOOR
    )  # at 1,000 tokens/s, as every device is taken for at first
    async with Rig(bound=bound) as rig:
        holder = await rig.occupy()
        bulk = rig.send(sequences(*[99] * 100))
        await rig.queued(bulk)
        rig.engine.check_admission(10, tokens_ahead=110)
        with pytest.raises(Overloaded):
            rig.engine.check_admission(10, tokens_ahead=10_000)
        rig.backend.gate.set()
        await asyncio.gather(holder, bulk)
