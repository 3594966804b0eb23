"""What a device can do to an engine, and who pays for it: only the item at fault."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from tests.engine.rig import Rig, alone, lengths, sequences
from tests.hand_clock import HandClock

from trivec.backends.fake import FakeBackend, Poison
from trivec.core.errors import DeviceLost, Draining, EngineFault
from trivec.core.events import BatchRan, Event, RowNotFinite, WorkerRestarted
from trivec.core.types import Batch, BatchBudget, Output, Reply, Vectors
from trivec.engine import worker
from trivec.engine.pace import Pace

BAD = 200_001


async def send_side_by_side(
    rig: Rig, count: int, *, bad: Sequence[int] = ()
) -> list[Reply | BaseException]:
    """*count* requests of one text that share a batch; those in *bad* hold a poisoned token."""
    holder = await rig.occupy()
    sent = [
        rig.send(sequences(6, first=100 * i + 50, marks=[BAD] if i in bad else []))
        for i in range(count)
    ]
    await rig.queued(*sent)
    rig.backend.gate.set()
    replies = await asyncio.gather(*sent, return_exceptions=True)
    await holder
    return replies


def assert_own_vector(reply: Reply | BaseException, i: int) -> None:
    assert isinstance(reply, Reply), reply
    expected = alone(sequences(6, first=100 * i + 50), 0).dense
    np.testing.assert_array_equal(reply.vectors.dense, expected)


@pytest.mark.parametrize("bad", [[0], [7], [3, 4], list(range(1, 16))], ids=str)
async def test_only_the_requests_with_a_poisoned_text_fail(bad: list[int]) -> None:
    async with Rig() as rig:
        rig.backend.poison[BAD] = Poison.RAISE
        replies = await send_side_by_side(rig, 16, bad=bad)
    assert [i for i, reply in enumerate(replies) if isinstance(reply, EngineFault)] == bad
    for i, reply in enumerate(replies):
        if i not in bad:
            assert_own_vector(reply, i)


async def test_one_poisoned_text_among_many_costs_a_logarithm_of_runs() -> None:
    async with Rig() as rig:
        rig.backend.poison[BAD] = Poison.RAISE
        await send_side_by_side(rig, 32, bad=[11])
    runs = rig.listener.heard(BatchRan)[1:]
    assert len(runs) == 1 + 2 * 5
    assert sum(run.failed for run in runs) == 6


async def test_a_request_with_one_poisoned_text_among_many_fails_and_frees_its_place() -> None:
    async with Rig(backend=FakeBackend(dimensions=8, budget=BatchBudget(100, 8))) as rig:
        rig.backend.poison[BAD] = Poison.RAISE
        what = sequences(90, *[80] * 50, marks=[BAD, *range(5, 55)])
        with pytest.raises(EngineFault):
            await rig.engine.embed(what, Output.DENSE)
        await rig.engine.embed(sequences(3), Output.DENSE)
    assert rig.batches() == [[90], [90], [3]], "its other texts never ran"


class PausingAtItsSecond(FakeBackend):
    """Closes its gate before the second batch."""

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        if len(self.ran) == 1:
            self.gate.clear()
        return super().run(batch, slot=slot)


async def test_a_failed_batch_is_not_run_again_for_those_who_left_meanwhile() -> None:
    async with Rig(backend=PausingAtItsSecond(dimensions=8)) as rig:
        rig.backend.poison[BAD] = Poison.RAISE
        holder = await rig.occupy()
        stays = rig.send(sequences(6))
        leaves = rig.send(sequences(5, marks=[BAD]))
        await rig.queued(stays, leaves)
        rig.backend.gate.set()
        await holder
        await rig.entered(2)
        leaves.cancel()
        await asyncio.wait([leaves])
        rig.backend.gate.set()
        assert len((await stays).vectors) == 1
    assert rig.batches()[1:] == [[6, 5], [6]]


async def test_a_row_that_is_not_finite_is_computed_again_alone_and_exactly() -> None:
    async with Rig() as rig:
        rig.backend.poison[BAD] = Poison.NAN
        replies = await send_side_by_side(rig, 5, bad=[2])
    assert [lengths(call.batch) for call in rig.backend.ran if call.exact] == [[6]]
    for i in (0, 1, 3, 4):
        assert_own_vector(replies[i], i)
    assert isinstance(replies[2], Reply)
    assert np.isfinite(replies[2].vectors.dense).all()
    assert rig.listener.heard(RowNotFinite) == [RowNotFinite("fake", recovered=True)]


async def test_a_row_that_stays_not_finite_is_a_fault_of_that_request_alone() -> None:
    async with Rig() as rig:
        rig.backend.poison[BAD] = Poison.NAN_ALWAYS
        replies = await send_side_by_side(rig, 5, bad=[2])
    assert isinstance(replies[2], EngineFault)
    for i in (0, 1, 3, 4):
        assert_own_vector(replies[i], i)
    assert rig.listener.heard(RowNotFinite) == [RowNotFinite("fake", recovered=False)]


async def test_rows_of_one_request_around_a_recovered_one_stay_in_order() -> None:
    what = sequences(6, 6, 6, 6, marks=[1, BAD, 3, 4])
    async with Rig() as rig:
        rig.backend.poison[BAD] = Poison.NAN
        reply = await rig.engine.embed(what, Output.DENSE)
    for i in range(4):
        np.testing.assert_array_equal(reply.vectors.dense[i], alone(what, i).dense[0])


class ShortOfMemory(FakeBackend):
    """Has memory for *tokens_max* tokens at a time."""

    def __init__(self, tokens_max: int) -> None:
        super().__init__(dimensions=8)
        self._tokens_max = tokens_max

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        vectors = super().run(batch, slot=slot)
        if batch.token_count > self._tokens_max:
            raise MemoryError
        return vectors


async def test_a_device_short_of_memory_is_given_smaller_batches_from_then_on() -> None:
    async with Rig(backend=ShortOfMemory(300)) as rig:
        await rig.engine.embed(sequences(*[100] * 5), Output.DENSE)
        first = len(rig.batches())
        reply = await rig.engine.embed(sequences(*[100] * 5), Output.DENSE)
    assert rig.batches()[0] == [100] * 5, "the first batch was as large as the budget"
    assert all(sum(batch) <= 300 for batch in rig.batches()[first:])
    assert len(reply.vectors) == 5


async def test_one_text_that_memory_does_not_suffice_for_is_a_fault() -> None:
    async with Rig(backend=ShortOfMemory(300)) as rig:
        with pytest.raises(EngineFault):
            await rig.engine.embed(sequences(301), Output.DENSE)
        assert len((await rig.engine.embed(sequences(64, 64), Output.DENSE)).vectors) == 2


class Upset:
    """An observer that breaks its word *times* times: the thread that tells it dies."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.replaced: list[WorkerRestarted] = []

    def observe(self, event: Event) -> None:
        if isinstance(event, BatchRan) and self.times > 0:
            self.times -= 1
            raise SystemError("the observer broke")
        if isinstance(event, WorkerRestarted):
            self.replaced.append(event)


async def test_a_thread_that_dies_is_replaced_and_its_batch_runs_once_more() -> None:
    upset = Upset(1)
    async with Rig(listener=upset) as rig:  # type: ignore[arg-type]
        reply = await rig.engine.embed(sequences(5, 9), Output.DENSE)
        await rig.engine.embed(sequences(3), Output.DENSE)
    assert len(reply.vectors) == 2
    assert rig.batches() == [[9, 5], [9, 5], [3]]
    assert [event.slot for event in upset.replaced] == [0]
    assert "the observer broke" in upset.replaced[0].reason


async def test_a_batch_that_kills_two_threads_is_a_fault_and_the_next_one_runs() -> None:
    upset = Upset(2)
    async with Rig(listener=upset) as rig:  # type: ignore[arg-type]
        with pytest.raises(EngineFault):
            await rig.engine.embed(sequences(5), Output.DENSE)
        assert len((await rig.engine.embed(sequences(3), Output.DENSE)).vectors) == 1
    assert len(upset.replaced) == 2


async def test_a_slot_whose_threads_keep_dying_is_lost_instead_of_spinning() -> None:
    upset = Upset(1_000)
    async with Rig(listener=upset) as rig:  # type: ignore[arg-type]
        sent = [rig.send(sequences(500)) for _ in range(8)]
        reason = await rig.workers.lost()
        results = await asyncio.gather(*sent, return_exceptions=True)
    assert len(upset.replaced) == 10
    assert "the observer broke" in reason
    assert {type(result) for result in results} == {EngineFault, Draining}


class Unplugged(FakeBackend):
    def run(self, batch: Batch, *, slot: int) -> Vectors:
        super().run(batch, slot=slot)
        raise DeviceLost("the driver is gone")


async def test_a_lost_device_is_said_and_everyone_is_told_to_come_back() -> None:
    async with Rig(backend=Unplugged(dimensions=8)) as rig:
        running = await rig.occupy()
        waiting = rig.send(sequences(5))
        await rig.queued(waiting)
        rig.backend.gate.set()
        reason = await rig.workers.lost()
        for one in (running, waiting):
            with pytest.raises(Draining):
                await one
        with pytest.raises(Draining):
            await rig.engine.embed(sequences(5), Output.DENSE)
    assert "the driver is gone" in reason


async def test_a_call_that_hangs_is_lost_at_the_second_look_and_not_before_its_time() -> None:
    clock = HandClock()
    async with Rig(clock=clock) as rig:
        hung = await rig.occupy()
        waiting = rig.send(sequences(5))
        await rig.queued(waiting)
        clock.move(15)
        rig.workers.look_for_hang()
        rig.workers.look_for_hang()
        assert not any(beat.is_late for beat in rig.workers.heartbeat())
        clock.move(0.1)
        assert [beat.is_late for beat in rig.workers.heartbeat()] == [True]
        rig.workers.look_for_hang()
        assert not hung.done(), "one look may be that of a process that was itself stopped"
        rig.workers.look_for_hang()
        assert "in one call of fake for 15 s" in await rig.workers.lost()
        for one in (hung, waiting):
            with pytest.raises(Draining):
                await one


class StuckExactly(FakeBackend):
    """Closes its gate before an exact run."""

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        self.gate.clear()
        return super().run_exact(batch, slot=slot)


async def test_an_exact_run_that_hangs_is_noticed_as_well_but_has_time_to_load() -> None:
    clock = HandClock()
    async with Rig(backend=StuckExactly(dimensions=8), clock=clock) as rig:
        rig.backend.poison[BAD] = Poison.NAN
        request = rig.send(sequences(6, marks=[BAD]))
        await rig.entered(2)
        clock.move(299)
        assert [beat.is_late for beat in rig.workers.heartbeat()] == [False]
        clock.move(2)
        rig.workers.look_for_hang()
        rig.workers.look_for_hang()
        with pytest.raises(Draining):
            await request


async def test_a_call_found_late_once_that_then_ends_is_forgiven() -> None:
    clock = HandClock()
    async with Rig(clock=clock) as rig:
        slow = await rig.occupy()
        clock.move(60)
        rig.workers.look_for_hang()
        rig.backend.gate.set()
        await slow
        again = await rig.occupy()
        clock.move(60)
        rig.workers.look_for_hang()
        assert not again.done()
        rig.backend.gate.set()
        await again


async def test_a_long_batch_on_a_slow_device_has_five_times_its_expected_time() -> None:
    clock = HandClock()
    async with Rig(clock=clock) as rig:
        holder = await rig.occupy()
        clock.move(1)  # 4 tokens took a second
        rig.backend.gate.set()
        await holder
        rig.backend.gate.clear()
        long = rig.send(sequences(400))
        await rig.entered(2)
        (beat,) = rig.workers.heartbeat()
        assert beat.bound_s > 5 * 100
        rig.backend.gate.set()
        await long


async def test_stopping_finishes_what_was_accepted_and_admits_nobody() -> None:
    async with Rig() as rig:
        running = await rig.occupy()
        waiting = rig.send(sequences(5))
        await rig.queued(waiting)
        stopping = asyncio.create_task(rig.workers.stop(60))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await rig.engine.embed(sequences(5), Output.DENSE)
        rig.backend.gate.set()
        await stopping
        assert len((await running).vectors) == len((await waiting).vectors) == 1
    assert rig.backend.closed


async def test_stopping_answers_what_does_not_finish_in_time() -> None:
    async with Rig() as rig:
        running = await rig.occupy()
        waiting = rig.send(sequences(5))
        await rig.queued(waiting)
        stopping = asyncio.create_task(rig.workers.stop(0))
        for one in (running, waiting):
            with pytest.raises(Draining):
                await one
        assert not rig.backend.closed, "a thread is still inside the device"
        rig.backend.gate.set()
        await stopping
    assert rig.backend.closed


async def test_a_device_that_a_thread_never_leaves_is_not_closed_under_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "JOIN_S_MAX", 0.01)
    async with Rig() as rig:
        running = await rig.occupy()
        await rig.workers.stop(0)
        assert not rig.backend.closed
        with pytest.raises(Draining):
            await running


async def test_a_second_stop_cuts_the_first_short() -> None:
    async with Rig() as rig:
        running = await rig.occupy()
        first = asyncio.create_task(rig.workers.stop(3_600))
        await asyncio.sleep(0)
        second = asyncio.create_task(rig.workers.stop(0))
        with pytest.raises(Draining):
            await running
        rig.backend.gate.set()
        await asyncio.gather(first, second)
    assert rig.backend.closed


async def test_a_text_that_fails_alone_has_a_second_chance() -> None:
    async with Rig() as rig:
        run, failures = rig.backend.run, [RuntimeError("a hiccup")]

        def hiccup(batch: Batch, *, slot: int) -> Vectors:
            if failures:
                raise failures.pop()
            return run(batch, slot=slot)

        rig.backend.run = hiccup  # type: ignore[method-assign]
        assert len((await rig.engine.embed(sequences(5), Output.DENSE)).vectors) == 1


async def test_what_a_thread_had_in_its_hands_when_it_died_choosing_is_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch was out of the line and in no job: nobody would ever have answered it."""
    deaths = [RuntimeError("in the middle of choosing")]
    whole = Pace.usual_s

    def dying(pace: Pace, tokens: int) -> float:
        if deaths:
            raise deaths.pop()
        return whole(pace, tokens)

    monkeypatch.setattr(Pace, "usual_s", dying)
    async with Rig() as rig:
        with pytest.raises(EngineFault):
            await asyncio.wait_for(rig.engine.embed(sequences(5), Output.DENSE), 60)
        assert len((await rig.engine.embed(sequences(5), Output.DENSE)).vectors) == 1
