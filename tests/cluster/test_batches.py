"""A backend behind a handle: what becomes of faults on its way, and what scales it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from tests.backends.batches import batch_of
from tests.cluster.handles import handle_backend
from tests.engine.rig import Listener, sequences

from trivec.backends.fake import FakeBackend, Poison
from trivec.cluster.serve import BackendReplica, Call, HandleBackend, QueuePolicy, call_budget
from trivec.core.clock import SystemClock
from trivec.core.errors import DeviceLost, Draining, EngineFault
from trivec.core.types import Batch, BatchBudget, ModelCard, Output, Vectors
from trivec.engine import Engine, Workers
from trivec.settings import QueueLimits

BAD_TOKEN = 7


class DyingBackend(FakeBackend):
    """A device that is lost so many times, as replicas that die one after another."""

    def __init__(self, *, times: int) -> None:
        super().__init__(dimensions=8)
        self.times = times

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        self.times -= 1
        if self.times >= 0:
            raise DeviceLost("no such device")
        return super().run(batch, slot=slot)


def call_of(token_ids: list[int], *, ingress: str = "a", open_tokens: int = 0) -> Call:
    return Call(batch_of([token_ids]), exact=False, ingress=ingress, open_tokens=open_tokens)


@asynccontextmanager
async def engine_on(backend: HandleBackend) -> AsyncIterator[Engine]:
    workers = Workers(backend.slot_count, clock=SystemClock(), observer=Listener())
    card = ModelCard("m", 512, 10_000, 8, Output.DENSE, "fp32", 0, "tests")
    engine = Engine(card, tokenizer=None, backend=backend, workers=workers, limits=QueueLimits())
    workers.start()
    yield engine
    await workers.stop(5)


async def test_only_the_sequence_at_fault_fails() -> None:
    inner = FakeBackend(dimensions=8, slot_count=2)
    inner.poison[BAD_TOKEN] = Poison.RAISE
    with handle_backend(inner) as backend:
        async with engine_on(backend) as engine:
            given = [sequences(5, 9, marks=(mark, 8)) for mark in (BAD_TOKEN, 8, 9)]
            asked = [engine.embed(one, Output.DENSE) for one in given]
            bad, *good = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(bad, EngineFault)
    assert [len(reply.vectors) for reply in good if not isinstance(reply, BaseException)] == [2, 2]


async def test_a_batch_goes_to_another_replica_where_one_is_lost() -> None:
    with handle_backend(DyingBackend(times=2)) as backend:
        async with engine_on(backend) as engine:
            reply = await engine.embed(sequences(5, 9), Output.DENSE)
    assert len(reply.vectors) == 2
    assert not backend.is_away


async def test_requests_are_told_to_come_back_when_every_replica_is_lost() -> None:
    inner = DyingBackend(times=3)
    with handle_backend(inner) as backend:
        async with engine_on(backend) as engine:
            with pytest.raises(Draining) as refused:
                await engine.embed(sequences(5, 9), Output.DENSE)
            assert refused.value.retry_after_s > 0
            assert backend.is_away
            assert len((await engine.embed(sequences(5, 9), Output.DENSE)).vectors) == 2
    assert not backend.is_away


async def test_requests_are_told_to_come_back_when_no_replica_answers_in_time() -> None:
    inner = FakeBackend(dimensions=8)
    inner.gate.clear()
    with handle_backend(inner, call_s_max=0.05) as backend:
        async with engine_on(backend) as engine:
            with pytest.raises(Draining):
                await engine.embed(sequences(5), Output.DENSE)
            inner.gate.set()
            await asyncio.to_thread(inner.wait_entered, 1)


async def test_a_replica_whose_device_is_lost_asks_to_be_replaced() -> None:
    runner = BackendReplica(DyingBackend(times=1), call_s_max=60)
    runner.check_health()
    with pytest.raises(DeviceLost):
        await runner.run(call_of([0, 5, 1]))
    with pytest.raises(DeviceLost, match="no such device"):
        runner.check_health()


async def test_a_replica_whose_batch_hangs_asks_to_be_replaced() -> None:
    inner = FakeBackend(dimensions=8)
    inner.gate.clear()
    runner = BackendReplica(inner, call_s_max=0.0)
    running = asyncio.create_task(runner.run(call_of([0, 5, 1])))
    await asyncio.to_thread(inner.wait_entered, 1)
    with pytest.raises(DeviceLost, match="has been running"):
        runner.check_health()
    inner.gate.set()
    await running
    runner.check_health()


async def test_a_caller_that_leaves_frees_no_slot_that_computes() -> None:
    inner = FakeBackend(dimensions=8)
    inner.gate.clear()
    runner = BackendReplica(inner, call_s_max=60)

    left, stays = (asyncio.create_task(runner.run(call_of([0, 5, 1]))) for _ in range(2))
    await asyncio.to_thread(inner.wait_entered, 1)
    left.cancel()
    await asyncio.wait([left])
    assert len(inner.ran) == 1
    inner.gate.set()
    assert len(await stays) == 1


async def test_a_replica_tells_what_waits_at_all_ingresses_and_how_fast_it_is() -> None:
    runner = BackendReplica(FakeBackend(dimensions=8, tokens_per_s=10_000.0), call_s_max=60)
    assert runner.record_autoscaling_stats()["tokens_per_s"] == 0
    for ingress, open_tokens in (("a", 900), ("b", 50), ("a", 300)):
        await runner.run(call_of([0, *[5] * 98, 1], ingress=ingress, open_tokens=open_tokens))
    said = runner.record_autoscaling_stats()
    assert said["open_tokens"] == 350
    assert 0 < said["tokens_per_s"] <= 10_000
    assert 0 < said["busy"] <= 1


@pytest.mark.parametrize(
    ("tokens_max", "batch_s", "wanted"),
    [
        pytest.param(512, 0.001, 2_048, id="four-small-batches-of-a-quick-model"),
        pytest.param(512, 0.04, 1_024, id="two-of-one-that-takes-longer"),
        pytest.param(512, 0.6, 512, id="one-of-a-large-model"),
        pytest.param(16_384, 0.02, 16_384, id="one-that-is-large-already"),
    ],
)
def test_a_call_is_worth_its_cost(tokens_max: int, batch_s: float, wanted: int) -> None:
    made = call_budget(BatchBudget(tokens_max, 64), batch_s)
    assert made == BatchBudget(wanted, 64 * wanted // tokens_max)


@pytest.mark.parametrize(
    ("open_tokens", "busy", "second_rate", "wanted"),
    [
        pytest.param(8_000, 1.0, 1_000, 8.0, id="four-seconds-of-work-wait-where-one-may"),
        pytest.param(1_000, 0.8, 1_000, 2.0, id="as-busy-as-they-should-be"),
        pytest.param(0, 0.4, 1_000, 1.0, id="half-as-busy-with-nothing-waiting"),
        pytest.param(2_000, 0.1, 1_000, 2.0, id="just-as-much-waits-as-may"),
        pytest.param(8_000, 1.0, 0, 8.0, id="one-that-has-just-started-counts"),
    ],
)
def test_replicas_follow_what_waits_and_how_busy_they_are(
    open_tokens: float, busy: float, second_rate: float, wanted: float
) -> None:
    policy = QueuePolicy(queue_s_target=1.0, busy_target=0.8)
    means = {
        "open_tokens": {"r1": open_tokens, "r2": open_tokens / 2},  # r2 has heard it later
        "tokens_per_s": {"r1": 1_000.0, "r2": second_rate},
        "busy": {"r1": busy, "r2": busy},
    }
    context: Any = SimpleNamespace(current_num_replicas=2, aggregated_metrics=means)
    assert np.isclose(policy(context)[0], wanted)


def test_replicas_stay_as_they_are_before_anything_was_measured() -> None:
    policy = QueuePolicy(queue_s_target=1.0, busy_target=0.8)
    context = SimpleNamespace(
        current_num_replicas=1, target_num_replicas=3, aggregated_metrics={"tokens_per_s": {"r": 0}}
    )
    assert policy(cast(Any, context))[0] == 3
