"""Faults of a device and of a worker: only the sequence at fault fails, or all, and none waits."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tests.engine.rig import ALL, Listener, Rig, alone, lengths, sequences
from tests.hand_clock import HandLoop

from trivec.backends.fake import FakeBackend, Poison
from trivec.core.errors import DeviceLost, Draining, EngineFault
from trivec.core.events import BatchRan, RowNotFinite
from trivec.core.types import Batch, BatchBudget, Output, Reply, SparseVector, Vectors
from trivec.engine import request, scheduler, worker

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


class Away(FakeBackend):
    """A device that is there for one batch."""

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        vectors = super().run(batch, slot=slot)
        if len(self.ran) > 1:
            raise Draining("nobody is there", retry_after_s=7.0)
        return vectors


async def test_where_a_device_is_away_each_request_is_told_when_to_return() -> None:
    async with Rig(backend=Away(dimensions=8)) as rig:
        replies = await send_side_by_side(rig, 3)
    assert [getattr(reply, "retry_after_s", None) for reply in replies] == [7.0] * 3
    assert {type(reply) for reply in replies} == {Draining}
    assert len({id(reply) for reply in replies}) == 3
    assert rig.batches()[1:] == [[6, 6, 6]], "no sequence is looked for"


class PausingAtItsSecond(FakeBackend):
    """Closes its gate before the second batch."""

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        if len(self.ran) == 1:
            self.gate.clear()
        return super().run(batch, slot=slot)


async def test_a_failed_batch_is_not_run_again_for_requests_cancelled_meanwhile() -> None:
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


class Unsound(FakeBackend):
    """Spoils one number of *output*'s first row, but for exact runs."""

    def __init__(self, output: Output, number: float) -> None:
        super().__init__(dimensions=8, outputs=ALL)
        self._output = output
        self._number = number

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        vectors = super().run(batch, slot=slot)
        row = vectors[self._output][0]
        numbers = row.weights if isinstance(row, SparseVector) else row
        assert numbers is not None
        numbers.flat[-1] = self._number
        return vectors


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("output", [Output.DENSE, Output.SPARSE, Output.MULTI], ids=str)
async def test_a_row_is_computed_again_for_any_number_of_any_output(
    output: Output, number: float
) -> None:
    what = sequences(9, 6)
    async with Rig(backend=Unsound(output, number)) as rig:
        reply = await rig.engine.embed(what, ALL)
    assert [lengths(call.batch) for call in rig.backend.ran if call.exact] == [[9]]
    np.testing.assert_array_equal(reply.vectors.dense[0], alone(what, 0, ALL).dense[0])
    sparse, multi = reply.vectors.sparse[0], reply.vectors.multi[0]
    assert sparse is not None
    assert multi is not None
    assert np.isfinite(sparse.weights).all()
    assert np.isfinite(multi).all()


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


def break_once(owner: Any, name: str, monkeypatch: pytest.MonkeyPatch, *, after: bool) -> None:
    """*owner*'s function *name* fails when a worker next calls it, *after* its work or before."""
    whole = getattr(owner, name)
    failures = [ZeroDivisionError("a bug")]

    def broken(*args: Any, **options: Any) -> Any:
        is_due = failures and threading.current_thread().name.startswith("trivec-slot")
        if is_due and not after:
            raise failures.pop()
        result = whole(*args, **options)
        if is_due:
            raise failures.pop()
        return result

    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (scheduler.Scheduler, "next_batch"),
        (request.RequestQueue, "take_batch"),
        (scheduler.ThroughputEstimator, "after"),
        (worker, "pack"),
        (worker, "nonfinite_rows"),
        (scheduler.Scheduler, "complete"),
        (request.Request, "reply"),
        (Listener, "observe"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_bug_in_a_worker_fails_every_request_and_is_told_as_a_loss(
    owner: Any, name: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Rig(backend=FakeBackend(dimensions=8, budget=BatchBudget(100, 8))) as rig:
        running = await rig.occupy()
        waiting = [rig.send(sequences(90, 90)), rig.send(sequences(80))]
        await rig.queued(*waiting)
        break_once(owner, name, monkeypatch, after=after)
        rig.backend.gate.set()
        reason = await asyncio.wait_for(rig.workers.lost(), 60)
        results = await asyncio.gather(running, *waiting, return_exceptions=True)
        with pytest.raises(Draining):
            await rig.engine.embed(sequences(5), Output.DENSE)
    assert "slot 0: its worker failed in " in reason
    assert "ZeroDivisionError('a bug')" in reason
    assert {type(result) for result in results[1:]} == {EngineFault}
    assert isinstance(results[0], EngineFault | Reply), "which may have had its rows before"
    assert (rig.engine.open_requests, rig.engine.queued_tokens) == (0, 0)


async def test_what_no_handler_of_exceptions_catches_ends_a_worker_too() -> None:
    class Killed(BaseException):
        pass

    def killed(batch: Batch, *, slot: int) -> Vectors:
        raise Killed

    async with Rig() as rig:
        rig.backend.run = killed  # type: ignore[method-assign]
        with pytest.raises(EngineFault, match="Killed"):
            await rig.engine.embed(sequences(5), Output.DENSE)
        assert "Killed" in await rig.workers.lost()


class Unplugged(FakeBackend):
    def run(self, batch: Batch, *, slot: int) -> Vectors:
        super().run(batch, slot=slot)
        raise DeviceLost("the driver is gone")


async def test_a_lost_device_is_reported_and_every_request_is_told_to_come_back() -> None:
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


def check_twice(rig: Rig) -> None:
    rig.workers.check_for_hang()
    rig.workers.check_for_hang()


async def test_a_call_that_hangs_is_lost_at_the_second_check_and_not_before_its_time() -> None:
    async with Rig() as rig:
        hung = await rig.occupy()
        waiting = rig.send(sequences(5))
        await rig.queued(waiting)
        rig.clock.move(15)
        check_twice(rig)
        rig.clock.move(0.1)
        rig.workers.check_for_hang()
        rig.engine.check_admission(5)  # one check may be that of a process that was itself stopped
        rig.workers.check_for_hang()
        assert "slot 0 has been in one call of fake for 15 s" in await rig.workers.lost()
        for one in (hung, waiting):
            with pytest.raises(Draining):
                await one


def test_the_watchdog_checks_when_a_call_could_be_late_first_and_a_second_later() -> None:
    async def hang(loop: HandLoop) -> None:
        async with Rig() as rig:
            hung = await rig.occupy()
            rig.clock.move(10)
            lost = asyncio.create_task(rig.workers.lost())
            await asyncio.sleep(0)
            for seconds in (5.1, 1.1):
                assert not lost.done()
                rig.clock.move(seconds)
                loop.move(seconds)
                await asyncio.sleep(0.01)  # turns in which timers are looked at
            assert "for 16 s" in await asyncio.wait_for(lost, 5)
            with pytest.raises(Draining):
                await hung

    loop = HandLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(hang(loop))


class StuckExactly(FakeBackend):
    """Closes its gate before an exact run."""

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        self.gate.clear()
        return super().run_exact(batch, slot=slot)


async def test_an_exact_run_that_hangs_is_noticed_as_well_but_has_time_to_load() -> None:
    async with Rig(backend=StuckExactly(dimensions=8)) as rig:
        rig.backend.poison[BAD] = Poison.NAN
        request = rig.send(sequences(6, marks=[BAD]))
        await rig.entered(2)
        rig.clock.move(299)
        check_twice(rig)
        rig.engine.check_admission(5)
        rig.clock.move(2)
        check_twice(rig)
        with pytest.raises(Draining):
            await request


async def test_a_call_found_late_once_that_then_ends_is_forgiven() -> None:
    async with Rig() as rig:
        for _ in range(2):
            slow = await rig.occupy()
            rig.clock.move(60)
            rig.workers.check_for_hang()
            rig.engine.check_admission(5)
            rig.backend.gate.set()
            await slow
        rig.workers.check_for_hang()
        rig.engine.check_admission(5)


async def test_a_long_batch_on_a_slow_device_has_five_times_its_expected_time() -> None:
    async with Rig() as rig:
        await rig.run_at(4)
        long = await rig.occupy(400)
        rig.clock.move(499)
        check_twice(rig)
        rig.engine.check_admission(5)
        rig.clock.move(2)
        check_twice(rig)
        with pytest.raises(Draining):
            await long


async def test_stopping_finishes_what_was_admitted_and_admits_no_more() -> None:
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
