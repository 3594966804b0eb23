"""An embedder behind a socket, both ends in one event loop, the socket a real one."""

import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from trivec.core.ports import Embedder
from trivec.ipc.client import EngineClient, RemoteEmbedder
from trivec.ipc.folder import Served, ServedModel, SharedFolder
from trivec.ipc.server import EngineServer
from trivec.tokenizer import Tokenizer


def served(embedder: Embedder, tokenizer_file: Path) -> Served:
    model = ServedModel(embedder.card, str(tokenizer_file), None)
    return Served("1", "fake", "cpu", "a test", 1, (model,))


@dataclass(slots=True)
class Several:
    """An engine process and the API process "api-1", as far as the socket goes."""

    engine: Embedder
    folder: SharedFolder
    tokenizer: Tokenizer
    server: EngineServer
    client: EngineClient
    embedder: RemoteEmbedder

    def start_engine_process(self, served: Served) -> None:
        """The next one, when the one before has stopped."""
        self.folder.write_served(served)
        self.server = EngineServer([self.engine])
        self.server.start(self.folder.endpoint)

    def remote(self, client: EngineClient) -> RemoteEmbedder:
        return RemoteEmbedder(0, self.engine.card, self.tokenizer, client)

    @asynccontextmanager
    async def connected(self, name: str) -> AsyncIterator[EngineClient]:
        """Another API process."""
        what = self.folder.read_served()
        client = EngineClient(self.folder, name, served=what, metrics=name.encode)
        client.start()
        yield client
        await client.stop(0)


@asynccontextmanager
async def several(embedder: Embedder, tokenizer_file: Path) -> AsyncIterator[Several]:
    """*embedder* served over a socket, and called from the other end of it."""
    with tempfile.TemporaryDirectory() as short, ThreadPoolExecutor(2) as pool:
        folder = SharedFolder(Path(short))
        what = served(embedder, tokenizer_file)
        client = EngineClient(folder, "api-1", served=what, metrics=lambda: b"api-1")
        tokenizer = Tokenizer(
            tokenizer_file,
            token_count_max=embedder.card.token_count_max,
            vocabulary_size=embedder.card.vocabulary_size,
            pool=pool,
            include_prompt=embedder.card.include_prompt,
        )
        remote = RemoteEmbedder(0, embedder.card, tokenizer, client)
        folder.write_served(what)
        server = EngineServer([embedder])
        server.start(folder.endpoint)
        client.start()
        both = Several(embedder, folder, tokenizer, server, client, remote)
        try:
            yield both
        finally:
            await client.stop(0)
            await both.server.stop(5)
