"""An engine through its port: order, sharing, admission, deadlines, cancellation."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from tests.engine.rig import (
    ALL,
    NO_FLOOR,
    Rig,
    alone,
    lengths,
    sequences,
    texts_of,
    unanswered,
)
from tests.hand_clock import HandClock, HandLoop

from trivec.backends.fake import FakeBackend
from trivec.core.errors import DeadlineExceeded, Draining, Overloaded
from trivec.core.events import BatchRan
from trivec.core.health import QueueLoad
from trivec.core.types import Batch, BatchBudget, Output, Vectors
from trivec.engine.scheduler import START_TOKENS_PER_S, ModelQueue, Scheduler, spread_retry_s
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


async def test_free_slots_share_a_request_that_one_batch_could_hold() -> None:
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


async def test_a_full_queue_refuses_at_once_and_says_when_to_return() -> None:
    limits = QueueLimits(wait_s_max=10, **NO_FLOOR)
    async with Rig(limits=limits) as rig:
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
        await rig.run_at(200)
        holder = await rig.occupy()
        lists = [rig.send(sequences(133, 133, 133, 133, 134, 134)) for _ in range(8)]
        await rig.queued(*lists)
        assert (rig.engine.queued_requests, rig.engine.queued_tokens) == (8, 8 * 800)
        assert rig.engine.open_requests == 9
        rig.engine.check_admission(800)
        rig.clock.move(59)  # the last of them waits half a minute for its first batch
        rig.backend.gate.set()
        assert [len((await one).vectors) for one in lists] == [6] * 8
        await holder
        assert (rig.engine.queued_requests, rig.engine.queued_tokens) == (0, 0)


@pytest.mark.parametrize(
    ("queued", "token_count", "retry_s", "message"),
    [
        pytest.param((), 300_000, None, "", id="an-empty-queue-admits-anything"),
        pytest.param((200,) * 50, 200, None, "", id="ten-seconds-of-work-are-admitted"),
        pytest.param((200,) * 95, 200, 9, "19 s, more than queue.wait_s_max, 10 s", id="more-not"),
        pytest.param((90_000,), 100, None, "", id="a-small-one-passes-a-huge-one"),
        pytest.param((5_000, 70_000), 14_000, 9, "wait about 19 s", id="a-large-one-takes-turns"),
        pytest.param((92_000,), 8_000, None, "", id="a-queue-holds-as-much-as-its-limit"),
        pytest.param(
            (99_000,),
            9_000,
            8,
            "9000 they would be more than queue.tokens_max, 100000; there is room in about 8 s",
            id="and-no-more",
        ),
        pytest.param((5_000, 94_000), 20_000, 19, "about 25 s", id="the-longer-wait-is-told"),
    ],
)
async def test_admission_at_1000_tokens_per_s(
    monkeypatch: pytest.MonkeyPatch,
    queued: tuple[int, ...],
    token_count: int,
    retry_s: float | None,
    message: str,
) -> None:
    """As every device is taken for before its first batch."""
    monkeypatch.setattr("random.random", lambda: 0.0)
    limits = QueueLimits(
        tokens_max=100_000, wait_s_max=10, always_requests=0, first_batch_s_max=1e6
    )
    async with Rig(limits=limits) as rig:
        holder = await rig.occupy()
        rig.workers.scheduler.queues[0].limits = QueueLimits()  # until all of them are in
        sent = [rig.send(texts_of(tokens)) for tokens in queued]
        await rig.queued(*sent)
        rig.workers.scheduler.queues[0].limits = limits
        assert rig.engine.queued_tokens == sum(queued)
        if retry_s is None:
            rig.engine.check_admission(token_count)
        else:
            with pytest.raises(Overloaded, match=message) as refusal:
                rig.engine.check_admission(token_count)
            assert refusal.value.retry_after_s == pytest.approx(retry_s)
        for one in sent:
            one.cancel()
        await asyncio.wait([holder, *sent], timeout=0)
        assert rig.engine.queued_tokens == 0
        rig.backend.gate.set()
        await holder


async def test_the_slots_of_a_device_count_together() -> None:
    limits = QueueLimits(wait_s_max=10, **NO_FLOOR)
    async with Rig(backend=FakeBackend(dimensions=8, slot_count=2), limits=limits) as rig:
        holders = [await rig.occupy(), await rig.occupy()]
        sent = [rig.send(texts_of(19_000))]
        await rig.queued(*sent)
        rig.engine.check_admission(19_000)
        sent.append(rig.send(texts_of(5_000)))
        await rig.queued(*sent)
        with pytest.raises(Overloaded, match="wait about 12 s"):
            rig.engine.check_admission(19_000)
        rig.backend.gate.set()
        await asyncio.gather(*holders, *sent)


@pytest.mark.parametrize(
    ("requests", "tokens", "is_refused"),
    [
        pytest.param(63, 32_767, False, id="a-short-queue-admits-everything"),
        pytest.param(64, 32_767, True, id="many-requests-count-by-seconds"),
        pytest.param(63, 32_768, True, id="and-so-do-many-tokens"),
        pytest.param(64, 11_900, False, id="which-may-be-a-minute"),
    ],
)
async def test_below_64_requests_and_32768_tokens_nothing_is_refused_however_slow_the_device(
    requests: int, tokens: int, is_refused: bool
) -> None:
    async with Rig() as rig:
        await rig.run_at(200)
        holder = await rig.occupy()
        sent = [rig.send(sequences(100)) for _ in range(requests - 1)]
        sent.append(rig.send(texts_of(tokens - 100 * len(sent))))
        await rig.queued(*sent)
        assert (rig.engine.queued_requests, rig.engine.queued_tokens) == (requests, tokens)
        if is_refused:
            with pytest.raises(Overloaded, match=r"more than queue\.wait_s_max, 60 s") as refusal:
                rig.engine.check_admission(40_000)
            assert f"{requests} requests with {tokens} tokens wait; " in str(refusal.value)
            assert "would wait about 164 s" in str(refusal.value)
            assert 5 <= refusal.value.retry_after_s <= 60
        else:
            rig.engine.check_admission(40_000)
        rig.backend.gate.set()
        await asyncio.gather(holder, *sent)


@pytest.mark.parametrize("wait_s", [0, 1, 5, 30, 59, 60, 10_000])
def test_a_refused_client_comes_back_after_5_to_60_s_and_not_with_all_others(wait_s: float) -> None:
    first, last = spread_retry_s(wait_s, 0.0), spread_retry_s(wait_s, 0.999)
    assert 5 <= first < last <= 60


def test_a_wait_that_is_admitted_is_not_cut_short() -> None:
    assert QueueLimits().first_batch_s_max >= 32_768 / 200
    with pytest.raises(ValueError, match="first_batch_s_max is 30 s, below wait_s_max, 60 s"):
        QueueLimits(first_batch_s_max=30)


async def test_an_empty_queue_admits_what_is_larger_than_its_limit() -> None:
    async with Rig(limits=QueueLimits(tokens_max=100, wait_s_max=0.1, **NO_FLOOR)) as rig:
        holder = await rig.occupy()
        huge = rig.send(sequences(500, 500))
        await rig.queued(huge)
        with pytest.raises(Overloaded):
            await rig.engine.embed(sequences(3), Output.DENSE)
        rig.backend.gate.set()
        assert len((await huge).vectors) == 2
        await holder


async def test_what_continues_an_admitted_request_is_let_in_until_the_end() -> None:
    async with Rig(limits=QueueLimits(tokens_max=100, wait_s_max=0.1, **NO_FLOOR)) as rig:
        holder = await rig.occupy()
        waiting = rig.send(sequences(500))
        await rig.queued(waiting)
        with pytest.raises(Overloaded):
            await rig.engine.embed(sequences(3), Output.DENSE)
        going_on = rig.send(sequences(3), continues=True)
        await rig.queued(going_on)
        rig.backend.gate.set()
        assert len((await going_on).vectors) == 1
        await asyncio.gather(holder, waiting)
        await rig.workers.stop(0)
        with pytest.raises(Draining):
            await rig.engine.embed(sequences(3), Output.DENSE, continues=True)


async def test_a_cancelled_request_frees_its_tokens_at_once_and_never_runs() -> None:
    async with Rig(limits=QueueLimits(tokens_max=1_000, **NO_FLOOR)) as rig:
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


def test_a_cancellation_right_after_the_last_row_leaves_the_rows_to_the_reply() -> None:
    """The worker reads them without the lock once the request is complete."""
    backend = FakeBackend(dimensions=8, outputs=ALL)
    scheduler = Scheduler(1, coalesces=False, clock=HandClock())
    queue = ModelQueue("m", backend, QueueLimits(), backend.budget)
    request = unanswered(3)
    queue.requests.add(request)
    request.started_s = 0.5
    request.parts.append(([0], Vectors.of(np.ones((1, 8), np.float32))))
    request.is_open = False  # as the scheduler says of a request whose last row has come
    scheduler.cancel(queue, request)
    assert len(request.reply(now_s=1.0).vectors) == 1


async def test_a_request_cancelled_in_the_middle_has_no_more_batches() -> None:
    async with Rig() as rig:
        rig.backend.gate.clear()
        leaver = rig.send(sequences(*[500] * 10))
        await rig.entered(1)
        leaver.cancel()
        await asyncio.wait([leaver])
        rig.backend.gate.set()
        await rig.engine.embed(sequences(5), Output.DENSE)
    assert rig.batches() == [[500], [5]]


async def test_a_deadline_that_passes_in_the_queue_is_answered_while_the_device_is_busy() -> None:
    async with Rig() as rig:
        holder = await rig.occupy()
        with pytest.raises(DeadlineExceeded) as late:
            await rig.engine.embed(sequences(5), Output.DENSE, timeout_s=0.001)
        assert late.value.retry_after_s >= 0
        rig.backend.gate.set()
        await holder
        await rig.engine.embed(sequences(6), Output.DENSE)
    assert rig.batches() == [[4], [6]], "what is late never reaches the device"


async def test_what_is_late_when_a_slot_frees_is_dropped_before_the_choice() -> None:
    async with Rig(limits=QueueLimits(wait_s_max=30, first_batch_s_max=30)) as rig:
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
        request = rig.send(sequences(500, 500, 500), timeout_s=5)
        await rig.entered(1)
        rig.clock.move(100)
        rig.backend.gate.set()
        assert len((await request).vectors) == 3


def test_a_deadline_that_passes_after_the_first_batch_began_changes_nothing() -> None:
    async def begin_and_let_pass(loop: HandLoop) -> None:
        async with Rig() as rig:
            rig.backend.gate.clear()
            request = rig.send(sequences(5), timeout_s=60)
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


async def test_each_batch_is_observed() -> None:
    async with Rig(backend=FakeBackend(dimensions=8, budget=BatchBudget(100, 8))) as rig:
        holder = await rig.occupy()
        waiting = rig.send(sequences(60, 50))
        await rig.queued(waiting)
        rig.backend.gate.set()
        await asyncio.gather(holder, waiting)
    runs = rig.listener.heard(BatchRan)
    assert [(run.sequences, run.tokens, run.failed) for run in runs] == [
        (1, 4, False),
        (1, 60, False),
        (1, 50, False),
    ]


async def test_the_load_is_what_waits_over_the_throughput_of_all_slots() -> None:
    clock = HandClock()
    backend = FakeBackend(dimensions=8, budget=BatchBudget(1_000, 8), slot_count=2)
    async with Rig(backend=backend, clock=clock) as rig:
        scheduler = rig.workers.scheduler
        assert scheduler.loads() == [QueueLoad("fake", 0, 0, 0.0)]
        holders = [await rig.occupy(), await rig.occupy()]
        waiting = [rig.send(sequences(60, 50)), rig.send(sequences(90))]
        await rig.queued(*waiting)
        (load,) = scheduler.loads()
        assert (load.requests, load.tokens) == (2, 200)
        assert load.seconds == pytest.approx(200 / (2 * START_TOKENS_PER_S))
        waiting[0].cancel()
        waiting[1].cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert scheduler.loads() == [QueueLoad("fake", 0, 0, 0.0)], "nothing ran in between"
        rig.backend.gate.set()
        await asyncio.gather(*holders)


async def test_token_types_travel_with_their_sequences_in_any_packing() -> None:
    """Those of pairs; a request without any has zeros where others of its batch have some."""
    pairs = [sequences(6, 9, first=100), sequences(8, first=20_000)]
    types = [np.array([0] * 3 + [1] * 3 + [0] * 4 + [1] * 5, np.int32), np.ones(8, np.int32)]
    typed = [replace(pair, token_types=own) for pair, own in zip(pairs, types, strict=True)]
    async with Rig() as rig:
        await rig.engine.embed(typed[1], Output.DENSE)
        holder = await rig.occupy()
        sent = [rig.send(typed[0]), rig.send(sequences(7)), rig.send(typed[1])]
        await rig.queued(*sent)
        rig.backend.gate.set()
        await asyncio.gather(holder, *sent)
    alone, without, mixed = (call.batch for call in rig.backend.ran)
    assert alone.token_types is not None
    assert alone.token_types.tolist() == [1] * 8
    assert without.token_types is None
    assert lengths(mixed) == [9, 6, 7, 8]
    assert mixed.token_types is not None
    assert mixed.token_types.tolist() == [0] * 4 + [1] * 5 + [0] * 3 + [1] * 3 + [0] * 7 + [1] * 8


async def test_what_a_mean_leaves_out_travels_with_its_sequence_in_any_packing() -> None:
    """A request without a prompt has zeros where others of its batch have some."""
    skips = [np.array([3, 4], np.int32), np.array([5], np.int32)]
    given = [sequences(6, 9, first=100), sequences(8, first=20_000)]
    prompted = [replace(own, skip=skip) for own, skip in zip(given, skips, strict=True)]
    async with Rig() as rig:
        await rig.engine.embed(prompted[1], Output.DENSE)
        holder = await rig.occupy()
        sent = [rig.send(prompted[0]), rig.send(sequences(7)), rig.send(prompted[1])]
        await rig.queued(*sent)
        rig.backend.gate.set()
        await asyncio.gather(holder, *sent)
    alone, without, mixed = (call.batch for call in rig.backend.ran)
    assert alone.skip is not None
    assert alone.skip.tolist() == [5]
    assert without.skip is None
    assert lengths(mixed) == [9, 6, 7, 8]
    assert mixed.skip is not None
    assert mixed.skip.tolist() == [4, 3, 0, 5]


async def test_chunks_travel_with_their_sequence_in_any_packing() -> None:
    given = sequences(6, 9, first=100)
    bounds = (np.array([1, 3, 5], np.int32), np.array([1, 8], np.int32))
    chunked = replace(given, chunks=bounds)
    async with Rig() as rig:
        holder = await rig.occupy()
        sent = [rig.send(chunked, Output.CHUNKS), rig.send(sequences(7))]
        await rig.queued(*sent)
        rig.backend.gate.set()
        _, reply, _ = await asyncio.gather(holder, *sent)
    assert [len(rows) for rows in reply.vectors.chunks if rows is not None] == [2, 1]
    mixed = rig.backend.ran[-1].batch
    assert lengths(mixed) == [9, 6, 7]
    assert mixed.chunks is not None
    assert [own.tolist() for own in mixed.chunks] == [[1, 8], [1, 3, 5], [0]]
