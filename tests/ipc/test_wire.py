"""Both ends over a real socket: what is asked, taken back, refused, lost and found again."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.contract.test_embedder import tokenizer_file
from tests.engine.rig import ALL, NO_FLOOR, Rig, sequences
from tests.hand_clock import HandClock
from tests.ipc.rig import BOUNDS, Relayed, hello_of, page, relayed

from trivec.backends.fake import FakeBackend
from trivec.core.errors import Draining, Overloaded
from trivec.core.types import Output
from trivec.ipc import api_end, engine_end
from trivec.ipc.api_end import EngineLink, first_hello
from trivec.ipc.engine_end import EngineEnd
from trivec.ipc.frames import (
    FRAME_BYTES_MAX,
    End,
    FrameReader,
    Kind,
    Message,
    frames_of,
    header,
)
from trivec.ipc.messages import Ask, write_ask
from trivec.ipc.remote import FULL_S_MAX, RemoteEmbedder
from trivec.ipc.wire import UNSENT_BYTES_MAX, Wire
from trivec.settings import QueueLimits


@dataclass(frozen=True, slots=True)
class Pair:
    """An engine by hand, and the way to it."""

    rig: Rig
    far: Relayed
    folder: Path

    @property
    def waiting_tokens(self) -> int:
        return self.rig.engine.queued_tokens

    @asynccontextmanager
    async def called_by(self, name: str) -> AsyncIterator[EngineLink]:
        """Another API process."""
        hello = hello_of(self.rig.engine, self.folder / "tokenizer.json")
        link = EngineLink(self.far.path, name, hello=hello, bounds=BOUNDS, page=page)
        link.start()
        yield link
        await link.stop(0)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[Pair]:
    tokenizer_file(tmp_path)
    backend = FakeBackend(dimensions=1024, outputs=ALL)
    async with (
        Rig(backend=backend, bound=QueueLimits(tokens_max=100, **NO_FLOOR)) as rig,
        relayed(rig.engine, tmp_path, api_process_count=2) as far,
    ):
        yield Pair(rig, far, tmp_path)


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
    assert sum(one.nbytes for one in near.multi if one is not None) > 2 * FRAME_BYTES_MAX
    np.testing.assert_array_equal(found.dense, near.dense)
    for ours, theirs in zip(found.multi, near.multi, strict=True):
        assert ours is not None
        assert theirs is not None
        np.testing.assert_array_equal(ours, theirs)


async def test_a_call_that_is_cancelled_leaves_the_line_of_the_engine(pair: Pair) -> None:
    holder = await pair.rig.occupy()
    call = asyncio.create_task(pair.far.embedder.embed(sequences(30), Output.DENSE))
    await until(lambda: pair.waiting_tokens == 30)
    call.cancel()
    await until(lambda: pair.waiting_tokens == 0)
    assert call.cancelled()
    pair.rig.backend.gate.set()
    await holder


async def test_an_api_process_that_goes_takes_what_it_asked_with_it(pair: Pair) -> None:
    holder = await pair.rig.occupy()
    async with pair.called_by("api-2") as other:
        await until(lambda: other.troubles == ())
        theirs = RemoteEmbedder(
            0,
            hello_of(pair.rig.engine, pair.folder / "tokenizer.json").models[0],
            tokenizer=None,  # type: ignore[arg-type]  # these tests begin with ids
            link=other,
            clock=HandClock(),
        )
        call = asyncio.create_task(theirs.embed(sequences(30), Output.DENSE))
        mine = asyncio.create_task(pair.far.embedder.embed(sequences(7), Output.DENSE))
        await until(lambda: pair.waiting_tokens == 37)
    await until(lambda: pair.waiting_tokens == 7)
    with pytest.raises(Draining):
        await call
    pair.rig.backend.gate.set()
    assert len((await mine).vectors) == 1
    await holder


async def test_without_an_engine_everybody_is_refused_until_the_next_one_answers(
    pair: Pair,
) -> None:
    far = pair.far
    await pair.rig.occupy()
    call = asyncio.create_task(far.embedder.embed(sequences(5), Output.DENSE))
    await until(lambda: pair.waiting_tokens == 5)
    await far.end.stop(5)
    with pytest.raises(Draining) as away:
        await call
    assert away.value.retry_after_s > 0
    assert far.link.troubles == ("the engine process is away",)
    with pytest.raises(Draining):
        far.embedder.check_admission(2)
    with pytest.raises(Draining):
        await far.embedder.embed(sequences(5), Output.DENSE)

    hello = hello_of(pair.rig.engine, pair.folder / "tokenizer.json")
    engines = [pair.rig.engine]
    after = EngineEnd(hello, engines, bounds=BOUNDS, api_process_count=2, page=page)
    after.start(far.listener)
    await until(lambda: far.link.troubles == ())
    pair.rig.backend.gate.set()
    reply = await far.embedder.embed(sequences(5), Output.DENSE)
    near = await pair.rig.engine.embed(sequences(5), Output.DENSE)
    np.testing.assert_array_equal(reply.vectors.dense, near.vectors.dense)
    await after.stop(5)


async def test_an_engine_that_serves_other_models_ends_the_api_process(pair: Pair) -> None:
    await pair.far.end.stop(5)
    hello = hello_of(pair.rig.engine, pair.folder / "tokenizer.json")
    other = replace(hello.models[0].card, vocabulary_size=9)
    models = (msgspec.structs.replace(hello.models[0], card=other),)
    changed = msgspec.structs.replace(hello, models=models)
    after = EngineEnd(changed, [pair.rig.engine], bounds=BOUNDS, api_process_count=2, page=page)
    after.start(pair.far.listener)
    async with asyncio.timeout(60):
        assert "other models" in await pair.far.link.lost()
    await after.stop(5)


async def test_a_connection_that_sends_noise_is_cut_and_no_other(pair: Pair) -> None:
    loop = asyncio.get_running_loop()
    noisy = socket.socket(socket.AF_UNIX)
    noisy.setblocking(False)
    await loop.sock_connect(noisy, str(pair.far.path))
    await loop.sock_sendall(noisy, header(Kind.REPLY, 1, 0, End.WHOLE))
    with suppress(ConnectionResetError):
        async with asyncio.timeout(60):
            assert await loop.sock_recv(noisy, 1) == b""
    noisy.close()
    assert len((await pair.far.embedder.embed(sequences(5), Output.DENSE)).vectors) == 1


async def test_a_refusal_speaks_for_as_many_tokens_until_one_of_ours_has_left(pair: Pair) -> None:
    clock = HandClock()
    hello = hello_of(pair.rig.engine, pair.folder / "tokenizer.json")
    embedder = RemoteEmbedder(
        0,
        hello.models[0],
        tokenizer=None,  # type: ignore[arg-type]  # this test begins with ids
        link=pair.far.link,
        clock=clock,
    )
    holder = await pair.rig.occupy()
    first = asyncio.create_task(embedder.embed(sequences(80), Output.DENSE))
    await until(lambda: pair.waiting_tokens == 80)
    embedder.check_admission(50)
    with pytest.raises(Overloaded):
        await embedder.embed(sequences(50), Output.DENSE)
    for refused in (50, 99):
        with pytest.raises(Overloaded) as early:
            embedder.check_admission(refused)
        assert early.value.retry_after_s > 0
    embedder.check_admission(49)
    clock.move(FULL_S_MAX)
    embedder.check_admission(50)
    with pytest.raises(Overloaded):
        await embedder.embed(sequences(50), Output.DENSE)
    pair.rig.backend.gate.set()
    await asyncio.gather(holder, first)
    embedder.check_admission(50)


async def test_requests_under_way_are_bounded(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_end, "ASKS_MAX", 1)
    holder = await pair.rig.occupy()
    first = asyncio.create_task(pair.far.embedder.embed(sequences(5), Output.DENSE))
    await until(lambda: pair.waiting_tokens == 5)
    with pytest.raises(Overloaded, match="under way"):
        await pair.far.embedder.embed(sequences(5), Output.DENSE)
    pair.rig.backend.gate.set()
    await asyncio.gather(holder, first)


async def test_all_serve_when_the_last_one_does(pair: Pair) -> None:
    told: list[str] = []
    pair.far.link.serving(lambda: told.append("api-1"))
    async with pair.called_by("api-2") as other:
        await until(lambda: other.troubles == ())
        await pair.far.embedder.embed(sequences(5), Output.DENSE)  # all before it has arrived
        assert told == []
        other.serving(lambda: told.append("api-2"))
        await until(lambda: len(told) == 2)
        assert sorted(told) == ["api-1", "api-2"]


async def test_the_next_engine_knows_who_serves(pair: Pair) -> None:
    """A process that was started again after the engine was must still hear of all others."""
    told: list[str] = []
    async with pair.called_by("api-2") as other:
        other.serving(lambda: None)
        pair.far.link.serving(lambda: told.append("before"))
        await until(lambda: told == ["before"])
        await pair.far.end.stop(5)
        hello = hello_of(pair.rig.engine, pair.folder / "tokenizer.json")
        engines = [pair.rig.engine]
        after = EngineEnd(hello, engines, bounds=BOUNDS, api_process_count=2, page=page)
        after.start(pair.far.listener)
        await until(lambda: other.troubles == pair.far.link.troubles == ())
        pair.far.link.serving(lambda: told.append("after"))
        await until(lambda: told == ["before", "after"])
    await after.stop(5)


async def test_only_a_process_that_was_known_is_missed(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    assert (await first_hello(pair.far.path, bounds=BOUNDS)).backend == "fake"
    async with pair.called_by("api-2") as other:
        await until(lambda: other.troubles == ())
    await until(lambda: "gone" in caplog.text)
    assert [record.getMessage()[:13] for record in caplog.records] == ["api-2 is gone"]


async def test_an_engine_that_cannot_be_called_ends_the_api_process(pair: Pair) -> None:
    pair.far.path.unlink()
    async with pair.called_by("api-2") as other, asyncio.timeout(60):
        assert "cannot be called" in await other.lost()


async def test_senders_that_waited_go_on_one_frame_at_a_time_and_in_turn() -> None:
    near, far = socket.socketpair()
    far.setblocking(False)
    wire = Wire({}, take=lambda wire, message: None, lost=lambda wire, reason: None)
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_unix_connection(lambda: wire, sock=near)
    body = memoryview(bytes(3 * FRAME_BYTES_MAX))
    sends = [asyncio.create_task(wire.send(Kind.REPLY, number, [body])) for number in range(40)]
    reader, came, unsent = FrameReader({Kind.REPLY: len(body)}), list[Message](), 0
    while len(came) < len(sends):
        came += reader.feed(await loop.sock_recv(far, 65_536))
        unsent = max(unsent, transport.get_write_buffer_size())
    assert unsent <= UNSENT_BYTES_MAX + FRAME_BYTES_MAX + 16
    assert [message.number for message in came] == list(range(len(sends)))
    wire.close()
    far.close()


async def stranger(path: Path) -> socket.socket:
    """A connection to the engine process, as bytes; it has said hello."""
    caller = socket.socket(socket.AF_UNIX)
    caller.setblocking(False)
    await asyncio.get_running_loop().sock_connect(caller, str(path))
    await asyncio.get_running_loop().sock_sendall(caller, header(Kind.HELLO, 0, 0, End.WHOLE))
    return caller


async def read_until(caller: socket.socket, kind: Kind | None) -> list[Message]:
    """Messages up to the first of *kind*, or up to the end."""
    reader, found = FrameReader(BOUNDS.downwards()), list[Message]()
    async with asyncio.timeout(60):
        while kind not in [message.kind for message in found]:
            piece = await asyncio.get_running_loop().sock_recv(caller, 65_536)
            if not piece:
                break
            found += reader.feed(piece)
    return found


async def test_a_request_taken_back_leaves_its_place_to_the_next_one_behind_it(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_end, "ASKS_MAX", 1)
    holder = await pair.rig.occupy()
    caller = await stranger(pair.far.path)
    body = write_ask(Ask(0, sequences(5), Output.DENSE, None))
    first, second = (b"".join(frames_of(Kind.ASK, number, body)) for number in (1, 2))
    taken_back = header(Kind.CANCEL, 1, 0, End.WHOLE)
    await asyncio.get_running_loop().sock_sendall(caller, first + taken_back + second)
    await until(lambda: pair.waiting_tokens == 5)
    pair.rig.backend.gate.set()
    found = await read_until(caller, Kind.REPLY)
    assert [(one.kind, one.number) for one in found[1:]] == [(Kind.REPLY, 2)]
    await holder
    caller.close()


async def test_metrics_of_others_go_with_the_engine_and_do_not_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_end, "PAGES_EVERY_S", 0.001)
    tokenizer_file(tmp_path)
    async with Rig() as rig, relayed(rig.engine, tmp_path) as far:
        await until(lambda: set(far.link.others) == {"engine"})
        await far.end.stop(5)
        await until(lambda: far.link.troubles != ())
        assert far.link.others == {}


async def test_pages_that_a_process_does_not_read_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_end, "PAGES_EVERY_S", 0.001)
    page_count = 0

    def large_page() -> bytes:
        nonlocal page_count
        page_count += 1
        return bytes(UNSENT_BYTES_MAX // 2)

    tokenizer_file(tmp_path)
    async with Rig() as rig, relayed(rig.engine, tmp_path) as far:
        hello = hello_of(rig.engine, tmp_path / "tokenizer.json")
        await far.end.stop(5)
        after = EngineEnd(hello, [rig.engine], bounds=BOUNDS, api_process_count=2, page=large_page)
        after.start(far.listener)
        caller = await stranger(far.path)
        await until(lambda: page_count == 30)
        _, found = await asyncio.gather(after.stop(5), read_until(caller, None))
        assert 1 <= [one.kind for one in found].count(Kind.PAGES) < 10
        caller.close()
