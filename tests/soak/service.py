"""A whole service in this process: real app, engine and tokenizer, books in memory, a faulty device.

Forms that must look inside, or break something there, use it; the others start a server.
"""

import asyncio
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Self

import httpx
import tokenizers
from tests.soak.faulty import Fault, Faulty
from tests.support.memory_store import MemoryStore

from trivec.accounts import Accounts, KeyPlan, NewKey
from trivec.api import build_app
from trivec.backends.fake import FakeBackend
from trivec.build import Choice, LoadedModel, load_checkpoint, model_card
from trivec.checkpoints import open_checkpoint
from trivec.checkpoints.checkpoint import Checkpoint
from trivec.core.clock import SystemClock
from trivec.core.events import Event
from trivec.core.health import Health
from trivec.core.ports import Backend
from trivec.engine import Engine, Workers
from trivec.server.granian_server import GranianServer
from trivec.server.machine import listen
from trivec.settings import Settings
from trivec.tokenizer import Tokenizer

MODEL = "all-minilm-l6-v2"
READY = Health("ready", alive=True, ready=True, reason="ok")
NO_FAULTS: Mapping[str, Fault] = MappingProxyType({})


class Ears:
    """An `Observer` that counts kinds of events and keeps none."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def observe(self, event: Event) -> None:
        name = type(event).__name__
        self.counts[name] = self.counts.get(name, 0) + 1


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(MODEL, cache_dir=folder / "models")


def words_to_ids(checkpoint: Checkpoint, faults: Mapping[str, Fault]) -> dict[int, Fault]:
    """*faults* by token id; each word is one token of the model's vocabulary."""
    codec = tokenizers.Tokenizer.from_file(str(checkpoint.tokenizer_file))
    by_id: dict[int, Fault] = {}
    for word, fault in faults.items():
        token_id = codec.token_to_id(word)
        assert token_id is not None, f"{word} is no single token"
        by_id[token_id] = fault
    return by_id


def device(checkpoint: Checkpoint, kind: str, folder: Path, *, tokens_per_s: float) -> Backend:
    """The real CPU engine, or a fake one of a fixed rate."""
    if kind == "fake":
        size = checkpoint.config.hidden_size
        return FakeBackend(dimensions=size, tokens_per_s=tokens_per_s)
    settings = Settings(data_dir=folder, backend="openvino")
    choice = Choice("openvino", "cpu", "a soak")
    return load_checkpoint(checkpoint, choice, settings=settings, cores=2).backend


def faulty_model(
    checkpoint: Checkpoint, inner: Backend, faults: Mapping[str, Fault]
) -> LoadedModel:
    backend = Faulty(inner, words_to_ids(checkpoint, faults))
    return LoadedModel(checkpoint, backend, model_card(checkpoint, "fake"), None)


class Service:
    """`async with Service(...) as service`: everything on the running loop."""

    def __init__(
        self,
        folder: Path,
        *,
        faults: Mapping[str, Fault] = NO_FAULTS,
        kind: str = "fake",
        tokens_per_s: float = float("inf"),
        settings: Settings | None = None,
    ) -> None:
        checkpoint = opened(folder)
        self.settings = settings or Settings()
        self.inner = device(checkpoint, kind, folder, tokens_per_s=tokens_per_s)
        self.model = faulty_model(checkpoint, self.inner, faults)
        assert isinstance(self.model.backend, Faulty)
        self.faulty = self.model.backend
        self.ears = Ears()
        self.store = MemoryStore()
        clock = SystemClock()
        self.accounts = Accounts(self.store, clock=clock, secret=b"s" * 32, no_auth=False)
        self.workers = Workers(1, clock=clock, observer=self.ears)
        self.pool = ThreadPoolExecutor(2)
        self.engine = Engine(
            self.model.card,
            tokenizer=Tokenizer(
                checkpoint.tokenizer_file,
                token_count_max=checkpoint.token_count_max,
                vocabulary_size=checkpoint.config.vocab_size,
                pool=self.pool,
                request_tokens_max=self.settings.http.request_tokens_max,
            ),
            backend=self.faulty,
            workers=self.workers,
            limits=self.settings.queue,
        )
        self.app = build_app(
            embedders={MODEL: self.engine},
            accounts=self.accounts,
            observer=self.ears,
            clock=clock,
            limits=self.settings.http,
            health=lambda: READY,
            metrics=None,
            metrics_open=False,
        )

    async def __aenter__(self) -> Self:
        self.accounts.start()
        self.workers.start()
        made: NewKey = await self.accounts.create_key(KeyPlan("soak"))
        self.key = made.plain
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.faulty.gate.set()
        await self.workers.stop(5)
        self.accounts.stop()
        self.pool.shutdown()

    def client(self) -> httpx.AsyncClient:
        """A client that speaks to the app without a socket."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app),
            base_url="http://service/v1",
            headers={"authorization": f"Bearer {self.key}"},
            timeout=30,
        )

    @contextmanager
    def listening(self) -> Iterator[tuple[str, int]]:
        """Serve by granian from a thread with a loop of its own; gives host and port."""
        listener = listen("127.0.0.1", 0)
        host, port = listener.getsockname()[:2]
        up = threading.Event()
        servers: list[GranianServer] = []
        self.loop = asyncio.new_event_loop()

        async def serve() -> None:
            async with self:
                servers.append(
                    GranianServer(self.app, listener, limits=self.settings.http, tls=None)
                )
                up.set()
                await servers[0].serve()

        thread = threading.Thread(target=lambda: self.loop.run_until_complete(serve()))
        thread.start()
        assert up.wait(30), "the service did not start"
        try:
            yield host, port
        finally:
            self.faulty.gate.set()
            self.loop.call_soon_threadsafe(servers[0].stop)
            thread.join(30)
            assert not thread.is_alive(), "the service did not stop"
            self.loop.close()
