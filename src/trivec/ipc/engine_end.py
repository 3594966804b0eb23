"""The engine process's end of the wire: requests of every API process into the one line.

The line, its fairness and its deadlines are the embedders'; here a request only arrives, is
cancelled, and leaves. All of it runs on the event loop.
"""

import asyncio
import logging
import socket
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial

from trivec.core.errors import EngineFault, ServiceError
from trivec.core.ports import Embedder
from trivec.ipc.frames import Kind, Message, WireBroken
from trivec.ipc.messages import (
    Ask,
    Hello,
    read_ask,
    write_hello,
    write_pages,
    write_refusal,
    write_reply,
)
from trivec.ipc.wire import ASKS_MAX, PAGES_EVERY_S, Wire, WireBounds

ENGINE = "engine"

_log = logging.getLogger("trivec.ipc")


class EngineEnd:
    """Answers API processes on *listener*, a Unix socket, until `stop`."""

    def __init__(
        self,
        hello: Hello,
        embedders: Sequence[Embedder],
        *,
        bounds: WireBounds,
        api_process_count: int,
        page: Callable[[], bytes],
    ) -> None:
        assert len(embedders) == len(hello.models)
        self._hello = write_hello(hello)
        self._embedders = tuple(embedders)
        self._cards = tuple(model.card for model in hello.models)
        self._bounds = bounds
        self._api_process_count = api_process_count
        self._page = page
        self._visitors: dict[Wire, _Visitor] = {}
        self._is_empty = asyncio.Event()
        self._listener: socket.socket | None = None
        self._paging: asyncio.Task[None] | None = None
        self._welcoming: set[asyncio.Task[None]] = set()

    def start(self, listener: socket.socket) -> None:
        """Answer calls on *listener*, which stays its owner's and does not block."""
        # Not an asyncio server: closing that would remove the socket's name from its folder.
        asyncio.get_running_loop().add_reader(listener, self._accept, listener)
        self._listener = listener
        self._paging = asyncio.create_task(self._page_for_ever(), name="pages")

    async def stop(self, within_s: float) -> None:
        """Let go of every API process once it has read what is under way to it."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
        if self._paging is not None:
            self._paging.cancel()
        if self._welcoming:
            await asyncio.wait(self._welcoming)
        for wire in list(self._visitors):
            wire.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s if self._visitors else 0):
                await self._is_empty.wait()

    def _accept(self, listener: socket.socket) -> None:
        try:
            visitor, _ = listener.accept()
        except BlockingIOError:  # it went before we came
            return
        visitor.setblocking(False)
        task = asyncio.create_task(self._receive(visitor), name="welcome")
        self._welcoming.add(task)
        task.add_done_callback(self._welcoming.discard)

    async def _receive(self, visitor: socket.socket) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(self._welcome, visitor)

    def _welcome(self) -> Wire:
        wire = Wire(self._bounds.upwards(), take=self._take, lost=self._lost)
        self._visitors[wire] = _Visitor()
        self._is_empty.clear()
        return wire

    def _lost(self, wire: Wire, reason: str) -> None:
        visitor = self._visitors.pop(wire)
        for number in list(visitor.tasks):
            visitor.take_back(number)
        if not self._visitors:
            self._is_empty.set()
        if visitor.name:
            _log.warning("%s is gone: %s", visitor.name, reason)

    def _take(self, wire: Wire, message: Message) -> None:
        visitor = self._visitors[wire]
        match message.kind:
            case Kind.HELLO:
                visitor.name = bytes(message.body).decode("utf-8", "replace")
                wire.tell(Kind.HELLO, body=self._hello)
            case Kind.ASK:
                ask = read_ask(message.body, self._cards)
                if message.number in visitor.tasks or len(visitor.tasks) >= ASKS_MAX:
                    raise WireBroken(f"request {message.number} is open, or one too many")
                visitor.begin(message.number, self._answer(wire, message.number, ask))
            case Kind.CANCEL:
                visitor.take_back(message.number)
            case Kind.SERVING:
                visitor.is_serving = True
                self._tell_when_all_serve()
            case Kind.PAGE:
                visitor.page = bytes(message.body)
            case kind:
                raise WireBroken(f"{kind.name} comes from an engine process only")

    async def _answer(self, wire: Wire, number: int, ask: Ask) -> None:
        embedder = self._embedders[ask.model]
        try:
            reply = await embedder.embed(ask.sequences, ask.outputs, deadline_s=ask.deadline_s)
            await wire.send(Kind.REPLY, number, write_reply(reply))
        except ServiceError as refusal:
            wire.tell(Kind.REFUSAL, number, write_refusal(refusal))
        except Exception as mistake:  # the outermost loop of a request in this process
            _log.exception("request %d failed", number)
            wire.tell(Kind.REFUSAL, number, write_refusal(EngineFault(repr(mistake))))

    def _tell_when_all_serve(self) -> None:
        serving = {one.name for one in self._visitors.values() if one.is_serving}
        if len(serving) == self._api_process_count:
            for wire in self._visitors:
                wire.tell(Kind.ALL_SERVING)

    async def _page_for_ever(self) -> None:
        """Give every API process the others' metrics, so that any of them can show all."""
        while True:
            await asyncio.sleep(PAGES_EVERY_S)
            pages = {one.name: one.page for one in self._visitors.values() if one.page}
            pages[ENGINE] = self._page()
            for wire, visitor in self._visitors.items():
                if not wire.has_room:  # pages that nobody reads would pile up
                    continue
                others = {name: page for name, page in pages.items() if name != visitor.name}
                wire.tell(Kind.PAGES, body=write_pages(others))


class _Visitor:
    """What is known of one API process that called."""

    def __init__(self) -> None:
        self.name = ""
        self.is_serving = False
        self.page = b""
        self.tasks: dict[int, asyncio.Task[None]] = {}  # open requests, by their numbers
        self._leaving: set[asyncio.Task[None]] = set()  # taken back, and not yet out of the line

    def begin(self, number: int, answer: Coroutine[None, None, None]) -> None:
        """Open request *number*."""
        task = asyncio.create_task(answer, name=f"{self.name} {number}")
        self.tasks[number] = task
        task.add_done_callback(partial(self._end, number))

    def take_back(self, number: int) -> None:
        """Free its place at once: the next request may stand behind this in what was just read."""
        task = self.tasks.pop(number, None)
        if task is not None:
            self._leaving.add(task)
            task.cancel()

    def _end(self, number: int, task: asyncio.Task[None]) -> None:
        if self.tasks.get(number) is task:
            del self.tasks[number]
        self._leaving.discard(task)
