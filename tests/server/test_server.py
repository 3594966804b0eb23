"""The life of a server, in this process and over real sockets: loading, ready, draining, gone."""

import asyncio
import logging
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from tests.server.test_self_test import OTHER, StubEmbedder

from trivec.accounts import Accounts
from trivec.accounts.types import StoreHealth
from trivec.build import Choice, Models
from trivec.core.errors import CheckpointRefused
from trivec.core.types import LongText, Output, Reply, Sequences
from trivec.engine import Workers
from trivec.server import server as module
from trivec.server.granian_server import GranianServer
from trivec.server.machine import listen
from trivec.server.server import SELF_TEST, HttpServer
from trivec.settings import Settings

BROKEN = 70


class HeldEmbedder(StubEmbedder):
    """An embedder that holds every request but the self-test until it is released."""

    def __init__(self) -> None:
        super().__init__()
        self.released = asyncio.Event()
        self.has_request = asyncio.Event()
        self.was_tested = asyncio.Event()
        self._is_self_test = False

    async def tokenize(
        self,
        inputs: Any,
        *,
        long_text: LongText,
        trusted: bool = False,
        prompt: str = "",
        token_count_max: int | None = None,
    ) -> Sequences:
        self._is_self_test = inputs == [SELF_TEST]
        return Sequences.pack([[1]])

    async def embed(
        self,
        sequences: Sequences,
        outputs: Output,
        *,
        deadline_s: float | None = None,
        background: bool = False,
    ) -> Reply:
        if self._is_self_test:
            self.was_tested.set()
        else:
            self.has_request.set()
            await self.released.wait()
        return await super().embed(sequences, outputs, deadline_s=deadline_s)

    def check_admission(self, token_count: int) -> None:
        pass


class StubWorkers:
    """Workers that are lost when a test says so."""

    def __init__(self) -> None:
        self.loss: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        pass

    async def stop(self, within_s: float) -> None:
        pass

    async def lost(self) -> str:
        return await asyncio.shield(self.loss)


class Rig:
    """A server under test; `done` is its life, whose result is the exit code."""

    def __init__(self, data_dir: Path, **life: float) -> None:
        probe_port = life.pop("probe_port", None)
        settings = Settings.model_validate(
            {
                "data_dir": data_dir,
                "no_auth": True,
                "probe_port": probe_port,
                "life": {"drain_grace_s": 0.0, **life},
            }
        )
        self.embedder = HeldEmbedder()
        self.workers = StubWorkers()
        self.loaded: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_ready = asyncio.Event()
        listener = listen("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        loop = asyncio.get_running_loop()

        def load(_parts: object) -> Models:
            asyncio.run_coroutine_threadsafe(self._loaded(), loop).result()
            return Models(
                choice=Choice("fake", "cpu", "a test"),
                cards=[self.embedder.card],
                certificates={},
                embedders={"stub": self.embedder},
                workers=cast(Workers, self.workers),
                slot_count=1,
            )

        server = HttpServer(
            settings,
            listener,
            load=load,
            on_first_key=lambda _key: None,
            on_ready=lambda _models: self.is_ready.set(),
        )
        self.done = asyncio.create_task(server.run())

    async def _loaded(self) -> None:
        await self.loaded

    def _client(self, port: int) -> httpx.AsyncClient:
        # Without TLS: reading the system's certificates takes longer than most of these tests.
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, verify=False)

    async def get(self, path: str, *, port: int | None = None) -> httpx.Response:
        async with self._client(port or self.port) as client:
            return await client.get(path)

    async def embed(self) -> httpx.Response:
        async with self._client(self.port) as client:
            return await client.post("/v1/embeddings", json={"model": "stub", "input": "hello"})

    async def hold_a_request(self) -> "asyncio.Task[httpx.Response]":
        request = asyncio.create_task(self.embed())
        await self.embedder.has_request.wait()
        return request


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No collector settings that outlive the test, and no signal that counts as an echo."""
    monkeypatch.setattr(module, "freeze_garbage_collector", lambda: None)
    monkeypatch.setattr(module, "SAME_REQUEST_S", 0.0)
    monkeypatch.setattr(module, "ENGINE_REFUSAL_S", 0.01)


@asynccontextmanager
async def ready(data_dir: Path, **life: float) -> AsyncIterator[Rig]:
    rig = Rig(data_dir, **life)
    rig.loaded.set_result(None)
    await rig.is_ready.wait()
    yield rig
    async with asyncio.timeout(60):
        if not rig.done.done():
            signal.raise_signal(signal.SIGTERM)
            rig.embedder.released.set()
        await rig.done


async def test_it_listens_while_it_loads_and_is_ready_afterwards(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    assert (await rig.get("/livez")).status_code == 200
    loading = await rig.get("/readyz")
    assert (loading.status_code, loading.json()["reason"]) == (503, "loading: the default model")
    rig.loaded.set_result(None)
    await rig.is_ready.wait()
    assert (await rig.get("/readyz")).status_code == 200
    signal.raise_signal(signal.SIGTERM)
    assert await rig.done == 0


async def test_a_model_that_cannot_load_is_raised(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.loaded.set_exception(CheckpointRefused("no such model"))
    with pytest.raises(CheckpointRefused, match="no such model"):
        await rig.done


async def test_asked_to_stop_while_it_loads_it_leaves_at_once(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.get("/livez")
    signal.raise_signal(signal.SIGTERM)
    assert await rig.done == 0
    rig.loaded.cancel()


async def test_what_was_accepted_is_finished(tmp_path: Path) -> None:
    async with ready(tmp_path) as rig:
        request = await rig.hold_a_request()
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        rig.embedder.released.set()
        assert (await request).status_code == 200
        assert await rig.done == 0


async def test_in_the_grace_it_answers_and_is_not_ready(tmp_path: Path) -> None:
    async with ready(tmp_path, drain_grace_s=600) as rig:
        signal.raise_signal(signal.SIGTERM)
        draining = await rig.get("/readyz")
        assert (draining.status_code, draining.json()["reason"]) == (503, "draining: asked to stop")
        rig.embedder.released.set()
        assert (await rig.embed()).status_code == 200
        signal.raise_signal(signal.SIGTERM)
        assert await rig.done == 0


@pytest.mark.parametrize(
    ("signals", "life"),
    [
        pytest.param(1, {"drain_s_max": 0.01}, id="that-takes-too-long"),
        pytest.param(2, {"drain_s_max": 600}, id="when-asked-twice"),
        pytest.param(2, {"drain_grace_s": 600}, id="when-asked-twice-in-the-grace"),
    ],
)
async def test_a_request_is_answered_503(
    tmp_path: Path, signals: int, life: dict[str, float]
) -> None:
    async with ready(tmp_path, **life) as rig:
        request = await rig.hold_a_request()
        for _ in range(signals):
            signal.raise_signal(signal.SIGTERM)
        answer = await request
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert await rig.done == 0


@pytest.mark.parametrize("is_draining", [False, True], ids=["while-ready", "while-draining"])
async def test_a_lost_device_ends_it_with_70_and_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_draining: bool
) -> None:
    async with ready(tmp_path, drain_grace_s=600) as rig:
        request = await rig.hold_a_request()
        if is_draining:
            signal.raise_signal(signal.SIGTERM)
            assert (await rig.get("/livez")).status_code == 200
        rig.workers.loss.set_result("slot 0 hangs")
        assert (await request).status_code == 503
        assert await rig.done == BROKEN
    said = [one.getMessage() for one in caplog.records if one.levelno == logging.CRITICAL]
    assert said == ["cannot go on: slot 0 hangs; leaving with exit code 70"]


async def test_a_ledger_thread_that_died_ends_it_with_70(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_died = asyncio.Event()

    async def lost(_accounts: Accounts) -> str:
        await has_died.wait()
        return "the ledger's thread has died"

    monkeypatch.setattr(Accounts, "lost", lost)
    async with ready(tmp_path) as rig:
        has_died.set()
        assert await rig.done == BROKEN
    assert "cannot go on: the ledger's thread has died" in caplog.text


async def test_while_a_request_is_refused_for_a_lost_device_the_probes_say_it_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ENGINE_REFUSAL_S", 600.0)
    with listen("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    async with ready(tmp_path, probe_port=port) as rig:
        request = await rig.hold_a_request()
        rig.workers.loss.set_result("slot 0 hangs")
        await asyncio.sleep(0)
        for path in ("/livez", "/readyz"):
            answer = await rig.get(path, port=port)
            assert answer.status_code == 503
            assert "slot 0 hangs" in answer.json()["reason"]
        rig.embedder.released.set()
        assert (await request).status_code == 200
        assert await rig.done == BROKEN


async def test_granian_ending_by_itself_is_70(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = asyncio.Event()

    async def serve(self: GranianServer) -> None:
        await ends.wait()

    monkeypatch.setattr(GranianServer, "serve", serve)
    monkeypatch.setattr(GranianServer, "stop", lambda self: None)
    async with ready(tmp_path) as rig:
        ends.set()
        assert await rig.done == BROKEN


async def test_a_problem_makes_it_unready_and_is_named(tmp_path: Path) -> None:
    async with ready(tmp_path, self_test_every_s=0.01) as rig:
        assert (await rig.get("/readyz")).status_code == 200
        rig.embedder.next = OTHER
        for _ in range(3):  # one may be under way; after the next begins, one with it is over
            rig.embedder.was_tested.clear()
            await rig.embedder.was_tested.wait()
        unready = await rig.get("/readyz")
        assert unready.status_code == 503
        assert "the self-test of stub changed" in unready.json()["reason"]
        assert (await rig.get("/livez")).status_code == 200


async def test_systemds_watchdog_hears_of_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "2000")
        loop = asyncio.get_running_loop()
        async with ready(tmp_path), asyncio.timeout(60):
            for _ in range(3):
                assert await loop.sock_recv(systemd, 100) == b"WATCHDOG=1"


async def test_a_store_that_is_away_is_not_named_to_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = StoreHealth(writable=False, reason="could not connect to server db.internal:5432")
    async with ready(tmp_path) as rig:
        monkeypatch.setattr(Accounts, "health", lambda self: away)
        reason = (await rig.get("/readyz")).json()["reason"]
        assert "the store cannot be written" in reason
        assert "db.internal" not in reason
