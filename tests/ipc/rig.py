"""An embedder behind a wire, both ends in one event loop, the socket a real one."""

import socket
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from trivec.core.clock import SystemClock
from trivec.core.ports import Embedder
from trivec.ipc.api_end import EngineLink, first_hello
from trivec.ipc.engine_end import EngineEnd
from trivec.ipc.messages import Hello, ModelHello
from trivec.ipc.remote import RemoteEmbedder
from trivec.ipc.wire import WireBounds
from trivec.tokenizer import Tokenizer

BOUNDS = WireBounds(ask_bytes_max=4_000_000, reply_bytes_max=64_000_000)


@dataclass(frozen=True, slots=True)
class Relayed:
    """What a test may look at or pull at."""

    embedder: RemoteEmbedder
    link: EngineLink
    end: EngineEnd
    listener: socket.socket
    path: Path


def unix_listener(folder: str) -> tuple[socket.socket, Path]:
    path = Path(folder) / "engine"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    listener.setblocking(False)
    return listener, path


def hello_of(embedder: Embedder, tokenizer_file: Path) -> Hello:
    model = ModelHello(embedder.card, str(tokenizer_file), None, None, None)
    return Hello("1", "fake", "cpu", "a test", 1, (model,))


def page() -> bytes:
    return b""


@asynccontextmanager
async def relayed(
    embedder: Embedder, folder: Path, *, api_process_count: int = 1
) -> AsyncIterator[Relayed]:
    """*embedder* served over a socket, and called from the other end of it."""
    file = folder / "tokenizer.json"
    end = EngineEnd(
        hello_of(embedder, file),
        [embedder],
        bounds=BOUNDS,
        api_process_count=api_process_count,
        page=page,
    )
    with tempfile.TemporaryDirectory() as short, ThreadPoolExecutor(2) as pool:
        listener, path = unix_listener(short)
        end.start(listener)
        hello = await first_hello(path, bounds=BOUNDS)
        link = EngineLink(path, "api-1", hello=hello, bounds=BOUNDS, page=page)
        link.start()
        card = hello.models[0].card
        tokenizer = Tokenizer(
            Path(hello.models[0].tokenizer_file),
            token_count_max=card.token_count_max,
            vocabulary_size=card.vocabulary_size,
            pool=pool,
        )
        remote = RemoteEmbedder(
            0, hello.models[0], tokenizer=tokenizer, link=link, clock=SystemClock()
        )
        try:
            yield Relayed(remote, link, end, listener, path)
        finally:
            await link.stop(0)
            await end.stop(5)
            listener.close()
