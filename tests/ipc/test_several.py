"""Both ends over a real socket: what is asked, cancelled, refused, lost and found again."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import zmq.asyncio
from tests.contract.test_embedder import tokenizer_file
from tests.engine.rig import ALL, NO_FLOOR, Rig, sequences
from tests.ipc.rig import Several, several

from trivec.backends.fake import FakeBackend
from trivec.core.errors import Draining, EngineFault, Overloaded
from trivec.core.types import Output
from trivec.ipc import folder as shared
from trivec.settings import QueueLimits


@dataclass(frozen=True, slots=True)
class Pair:
    """An engine by hand, and the way to it."""

    rig: Rig
    far: Several

    @property
    def waiting_tokens(self) -> int:
        return self.rig.engine.queued_tokens


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    backend = FakeBackend(dimensions=1024, outputs=ALL)
    async with (
        Rig(backend=backend, limits=QueueLimits(tokens_max=100, **NO_FLOOR)) as rig,
        several(rig.engine, tokenizer_file(tmp_path)) as far,
    ):
        yield Pair(rig, far)


async def until(what: Callable[[], bool]) -> None:
    """Let the event loop turn until *what* is true."""
    for _ in range(10_000):
        if what():
            return
        await asyncio.sleep(0.001)
    pytest.fail("it never came true")


async def test_every_vector_of_a_large_answer_crosses_whole(pair: Pair) -> None:
    asked = sequences(40, 3, 50, 45)
    found = (await pair.far.embedder.embed(asked, ALL)).vectors
    near = (await pair.rig.engine.embed(asked, ALL)).vectors
    np.testing.assert_array_equal(found.dense, near.dense)
    for ours, theirs in zip(found.multi, near.multi, strict=True):
        assert ours is not None
        assert theirs is not None
        np.testing.assert_array_equal(ours, theirs)


async def test_a_call_that_is_cancelled_leaves_the_queue_of_the_engine(pair: Pair) -> None:
    holder = await pair.rig.occupy()
    call = asyncio.create_task(pair.far.embedder.embed(sequences(30), Output.DENSE))
    await until(lambda: pair.waiting_tokens == 30)
    call.cancel()
    await until(lambda: pair.waiting_tokens == 0)
    assert call.cancelled()
    pair.rig.backend.gate.set()
    await holder


async def test_an_api_process_that_stops_cancels_what_it_asked(pair: Pair) -> None:
    holder = await pair.rig.occupy()
    async with pair.far.connected("api-2") as other:
        theirs = pair.far.remote(other)
        call = asyncio.create_task(theirs.embed(sequences(30), Output.DENSE))
        mine = asyncio.create_task(pair.far.embedder.embed(sequences(7), Output.DENSE))
        await until(lambda: pair.waiting_tokens == 37)
    await until(lambda: pair.waiting_tokens == 7)
    with pytest.raises(Draining):
        await call
    pair.rig.backend.gate.set()
    assert len((await mine).vectors) == 1
    await holder


async def test_what_a_dead_api_process_asked_is_cancelled_by_the_next_of_its_name(
    pair: Pair,
) -> None:
    holder = await pair.rig.occupy()
    async with pair.far.connected("api-2") as dead:
        call = asyncio.create_task(pair.far.remote(dead).embed(sequences(30), Output.DENSE))
        await until(lambda: pair.waiting_tokens == 30)
        async with pair.far.connected("api-2") as born:
            await until(lambda: pair.waiting_tokens == 0)
            pair.rig.backend.gate.set()
            reply = await pair.far.remote(born).embed(sequences(5), Output.DENSE)
            assert len(reply.vectors) == 1
            call.cancel()
    await holder


async def test_without_an_engine_everybody_is_refused_until_the_next_one_answers(
    pair: Pair,
) -> None:
    far = pair.far
    holder = await pair.rig.occupy()
    call = asyncio.create_task(far.embedder.embed(sequences(5), Output.DENSE))
    await until(lambda: pair.waiting_tokens == 5)
    await far.server.stop(5)
    with pytest.raises(Draining) as away:
        await call
    assert away.value.retry_after_s > 0
    assert far.client.problems == ("the engine process is away",)
    with pytest.raises(Draining):
        far.embedder.check_admission(2)
    with pytest.raises(Draining):
        await far.embedder.embed(sequences(5), Output.DENSE)

    far.start_engine_process(far.folder.read_served())
    await until(lambda: far.client.problems == ())
    pair.rig.backend.gate.set()
    reply = await far.embedder.embed(sequences(5), Output.DENSE)
    near = await pair.rig.engine.embed(sequences(5), Output.DENSE)
    np.testing.assert_array_equal(reply.vectors.dense, near.vectors.dense)
    await holder


async def test_an_engine_that_serves_other_models_ends_the_api_process(pair: Pair) -> None:
    await pair.far.server.stop(5)
    before = pair.far.folder.read_served()
    other = msgspec.structs.replace(
        before.models[0], card=replace(before.models[0].card, vocabulary_size=9)
    )
    pair.far.start_engine_process(msgspec.structs.replace(before, models=(other,)))
    async with asyncio.timeout(60):
        assert "other models" in await pair.far.client.lost()
    assert pair.far.client.problems != ()


async def test_noise_is_ignored_and_everybody_else_served(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    context = zmq.asyncio.Context()
    noisy = context.socket(zmq.DEALER)
    noisy.connect(pair.far.folder.endpoint)
    await noisy.send(b"\xc1 noise")
    await until(lambda: "is ignored" in caplog.text)
    assert len((await pair.far.embedder.embed(sequences(5), Output.DENSE)).vectors) == 1
    context.destroy(linger=0)


async def test_an_answer_that_cannot_be_read_fails_its_request(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivec.ipc.messages.Embedded.reply", lambda _: 1 / 0)
    async with asyncio.timeout(60):
        with pytest.raises(EngineFault, match="cannot be read"):
            await pair.far.embedder.embed(sequences(5), Output.DENSE)


async def test_a_mistake_of_the_engine_process_is_an_engine_fault(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pair.far.embedder, "_index", 7)
    with pytest.raises(EngineFault, match="IndexError"):
        await pair.far.embedder.embed(sequences(5), Output.DENSE)
    assert "failed" in caplog.text


async def test_a_full_queue_refuses_from_afar(pair: Pair) -> None:
    holder = await pair.rig.occupy()
    first = asyncio.create_task(pair.far.embedder.embed(sequences(80), Output.DENSE))
    await until(lambda: pair.waiting_tokens == 80)
    with pytest.raises(Overloaded) as full:
        await pair.far.embedder.embed(sequences(50), Output.DENSE)
    assert full.value.retry_after_s > 0
    pair.rig.backend.gate.set()
    await asyncio.gather(holder, first)


async def test_a_task_of_the_connection_that_fails_ends_the_api_process(pair: Pair) -> None:
    await until(lambda: pair.far.client.problems == ())
    (watching, *_) = pair.far.client._tasks
    pair.far.folder.read_served = lambda: 1 / 0  # type: ignore[assignment,return-value]
    await pair.far.server.stop(5)
    pair.far.server = type(pair.far.server)([pair.far.engine])
    pair.far.server.start(pair.far.folder.endpoint)
    async with asyncio.timeout(60):
        assert "ZeroDivisionError" in await pair.far.client.lost()
    assert watching.done()


async def test_stopping_twice_is_stopping_once(pair: Pair) -> None:
    await pair.far.client.stop(0)
    await pair.far.client.stop(0)
    assert pair.far.client.problems != ()


async def test_all_serve_when_the_last_one_does(tmp_path: Path) -> None:
    folder = shared.SharedFolder(tmp_path)
    first = asyncio.create_task(folder.all_serving("api-1", count=2))
    await asyncio.wait([first], timeout=3 * shared.LOOK_EVERY_S)
    assert not first.done()
    async with asyncio.timeout(60):
        await folder.all_serving("api-2", count=2)
        await first


async def test_each_process_leaves_its_metrics_for_the_others(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pair.far.connected("api-2"):
        await until(lambda: len(pair.far.folder.read_metrics()) == 2)
    assert pair.far.folder.read_metrics() == {"api-1": b"api-1", "api-2": b"api-2"}


async def test_only_an_engine_process_that_was_there_is_missed(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    await until(lambda: pair.far.client.problems == ())
    await pair.far.server.stop(5)
    await until(lambda: pair.far.client.problems != ())
    pair.far.start_engine_process(pair.far.folder.read_served())
    await until(lambda: pair.far.client.problems == ())
    gone = [one for one in caplog.records if one.getMessage() == "the engine process is gone"]
    assert len(gone) == 1
