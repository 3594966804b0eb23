"""An API process's end of the wire: requests out, vectors back, and coming back after a loss.

When the engine process goes, everyone who waits is told so and the API process is not ready; the
wire comes back by itself with the next engine process. All of it runs on the event loop.
"""

import asyncio
import logging
import random
import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from trivec.core.errors import Draining, Overloaded
from trivec.core.retry import spread_retry_s
from trivec.core.types import Reply
from trivec.ipc.frames import Kind, Message, WireBroken
from trivec.ipc.messages import (
    Ask,
    Hello,
    read_hello,
    read_pages,
    read_refusal,
    read_reply,
    write_ask,
)
from trivec.ipc.wire import ASKS_MAX, PAGES_EVERY_S, Wire, WireBounds

RETURN_S = 5.0  # after which a client should find the engine process started again
AWAY = "The engine process is away and is being started again. Please try again."
STOPPING = "The server is stopping. Please try again."

_log = logging.getLogger("trivec.ipc")


class EngineLink:
    """The connection of this process, and who waits on it. `start` it, then `stop` it."""

    def __init__(
        self, path: Path, name: str, *, hello: Hello, bounds: WireBounds, page: Callable[[], bytes]
    ) -> None:
        self.others: Mapping[str, bytes] = {}  # the other processes' metrics, by their names
        self._path = path
        self._name = name
        self._hello = hello
        self._bounds = bounds
        self._page = page
        self._wire: Wire | None = None  # None: the engine process has not said hello
        self._call: Wire | None = None  # the same, or the one on which it has not yet
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._number = 0
        self._refusal = AWAY  # what those who ask without a wire are told
        self._has_called = asyncio.Event()  # the first hello came
        self._is_lost = asyncio.Event()
        self._for_good: asyncio.Future[str] | None = None
        self._is_serving = False
        self._when_all_serve: Callable[[], None] | None = None
        self._tasks: tuple[asyncio.Task[None], ...] = ()

    @property
    def troubles(self) -> tuple[str, ...]:
        """Why this process is not ready, as far as the wire goes."""
        return () if self._wire is not None else ("the engine process is away",)

    def start(self) -> None:
        """Call the engine process, and again whenever it is lost."""
        self._for_good = asyncio.get_running_loop().create_future()
        self._tasks = (
            asyncio.create_task(self._call_for_ever(), name="engine-link"),
            asyncio.create_task(self._page_for_ever(), name="pages"),
        )

    async def lost(self) -> str:
        """Wait until this process must be started again: the engine serves other models now."""
        assert self._for_good is not None
        return await asyncio.shield(self._for_good)

    async def stop(self, within_s: float) -> None:
        """Ask for nothing more; wait *within_s* for what was asked, and refuse the rest."""
        self._refusal = STOPPING
        for task in self._tasks:
            task.cancel()
        if self._waiting:
            await asyncio.wait(list(self._waiting.values()), timeout=within_s)
        self._wire = None
        self._dismiss(STOPPING)
        if self._call is not None:
            self._call.close()

    def serving(self, when_all_serve: Callable[[], None]) -> None:
        """Clients may come; *when_all_serve* is called once when they may come to all processes."""
        self._is_serving, self._when_all_serve = True, when_all_serve
        self._tell_serving()

    async def ask(self, ask: Ask) -> Reply:
        """Send *ask* and wait for its vectors; a call that is cancelled takes it back."""
        await self._has_called.wait()
        wire = self._open_wire()
        if len(self._waiting) >= ASKS_MAX:
            raise Overloaded(
                f"{ASKS_MAX} requests are under way here, the most there may be. Please try again.",
                retry_after_s=spread_retry_s(0, random.random()),  # noqa: S311
            )
        self._number = (self._number + 1) % 2**32
        number = self._number
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            await wire.send(Kind.ASK, number, write_ask(ask))
            return await future
        except asyncio.CancelledError:
            wire.tell(Kind.CANCEL, number)
            raise
        finally:
            self._waiting.pop(number, None)
            if not future.cancel() and not future.cancelled():
                future.exception()  # heard, also when the call was cancelled at the same moment

    def check_open(self) -> None:
        """Raise `Draining` while nobody could answer."""
        if self._has_called.is_set():
            self._open_wire()

    def _open_wire(self) -> Wire:
        if self._wire is None:
            raise Draining(self._refusal, retry_after_s=RETURN_S)
        return self._wire

    async def _call_for_ever(self) -> None:
        """Nobody polls: the socket's owner keeps it open, so a call waits for who answers it."""
        while True:
            self._is_lost.clear()
            self._call = Wire(self._bounds.downwards(), take=self._take, lost=self._lose)
            try:
                await call(self._path, self._name, self._call)
            except OSError as fault:
                self._give_up(f"the engine process cannot be called: {fault}")
                return
            await self._is_lost.wait()

    def _lose(self, wire: Wire, reason: str) -> None:
        if self._wire is not None:
            self._wire = None
            _log.warning("the engine process is gone: %s", reason)
        self.others = {}  # they stand still from now on, and a counter must not go backwards
        self._dismiss(self._refusal)
        self._is_lost.set()

    def _dismiss(self, message: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Draining(message, retry_after_s=RETURN_S))

    def _take(self, wire: Wire, message: Message) -> None:
        match message.kind:
            case Kind.HELLO:
                self._hear_hello(wire, read_hello(message.body))
            case Kind.REPLY:
                future = self._waiting.get(message.number)
                if future is not None and not future.done():  # else it was taken back
                    future.set_result(read_reply(message.body))
            case Kind.REFUSAL:
                future = self._waiting.get(message.number)
                if future is not None and not future.done():
                    future.set_exception(read_refusal(message.body))
            case Kind.ALL_SERVING:
                if self._when_all_serve is not None:
                    tell, self._when_all_serve = self._when_all_serve, None
                    tell()
            case Kind.PAGES:
                self.others = read_pages(message.body)
            case kind:
                raise WireBroken(f"{kind.name} comes from an API process only")

    def _hear_hello(self, wire: Wire, hello: Hello) -> None:
        if _essence(hello) != _essence(self._hello):
            self._give_up("the engine process serves other models now")
            return
        self._wire = wire
        self._has_called.set()
        self._tell_serving()

    def _give_up(self, reason: str) -> None:
        assert self._for_good is not None
        if not self._for_good.done():
            self._for_good.set_result(reason)

    def _tell_serving(self) -> None:
        """To this engine process and to every one after it, which have not heard it."""
        if self._wire is not None and self._is_serving:
            self._wire.tell(Kind.SERVING)

    async def _page_for_ever(self) -> None:
        while True:
            if self._wire is not None and self._wire.has_room:
                self._wire.tell(Kind.PAGE, body=self._page())
            await asyncio.sleep(PAGES_EVERY_S)


async def call(path: Path, name: str, wire: Wire) -> None:
    """Connect *wire* to the engine process behind *path*, which will say hello when it can."""
    loop = asyncio.get_running_loop()
    with ExitStack() as unless_connected:
        caller = socket.socket(socket.AF_UNIX)
        unless_connected.callback(caller.close)
        caller.setblocking(False)
        await loop.sock_connect(caller, str(path))
        await loop.create_unix_connection(lambda: wire, sock=caller)
        unless_connected.pop_all()
    wire.tell(Kind.HELLO, body=name.encode())


async def first_hello(path: Path, *, bounds: WireBounds) -> Hello:
    """What the engine process behind *path* serves; waits until it has loaded it."""
    while True:
        heard: asyncio.Future[Hello | None] = asyncio.get_running_loop().create_future()
        wire = Wire(bounds.downwards(), take=partial(_hear, heard), lost=partial(_miss, heard))
        await call(path, "", wire)  # nameless: nobody needs to hear that this one goes again
        hello = await heard
        wire.close()
        if hello is not None:  # else it ended while it was loading; the next one will tell
            return hello


def _hear(heard: "asyncio.Future[Hello | None]", _: Wire, message: Message) -> None:
    if message.kind is Kind.HELLO and not heard.done():
        heard.set_result(read_hello(message.body))


def _miss(heard: "asyncio.Future[Hello | None]", _: Wire, reason: str) -> None:
    if not heard.done():
        heard.set_result(None)


def _essence(hello: Hello) -> object:
    """*hello* without what may differ between two starts with the same models."""
    models = [(replace(one.card, notes={}), one.tokenizer_file) for one in hello.models]
    return hello.version, models
