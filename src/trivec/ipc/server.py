"""The engine process's side: a request arrives, is cancelled or answered; the engines do the rest."""

import asyncio
import logging
from collections.abc import Sequence

import zmq
import zmq.asyncio

from trivec.core.errors import EngineFault, ServiceError
from trivec.core.ports import Embedder
from trivec.ipc.messages import (
    Cancel,
    Embedded,
    EmbedRequest,
    Hello,
    Message,
    Refused,
    decode,
    encode,
)

_log = logging.getLogger("trivec.ipc")


class EngineServer:
    """Answers API processes at *endpoint*, on the event loop, from `start` to `stop`.

    Their requests name *embedders* by index.
    """

    def __init__(self, embedders: Sequence[Embedder]) -> None:
        self._embedders = embedders
        # The open requests of each API process, by its name and by their ids.
        self._open: dict[bytes, dict[int, asyncio.Task[None]]] = {}
        self._receiving: asyncio.Task[None] | None = None
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.ROUTER_HANDOVER, 1)  # to the next API process of the same name
        self._socket.set(zmq.SNDHWM, 0)  # only what was asked for is ever sent
        self._socket.set(zmq.RCVHWM, 0)

    def start(self, endpoint: str) -> None:
        self._socket.bind(endpoint)
        self._receiving = asyncio.create_task(self._receive_forever(), name="ipc")

    async def lost(self) -> str:
        """Wait until no request is read any more, which only a bug of ours brings about; why."""
        assert self._receiving is not None
        await asyncio.wait([self._receiving])
        return f"the connection to API processes failed: {self._receiving.exception()!r}"

    async def stop(self, within_s: float) -> None:
        """Cancel what is open, and wait at most *within_s* for what was sent to be read."""
        if self._receiving is not None:
            self._receiving.cancel()
        for peer in self._open:
            self._cancel_all(peer)
        self._socket.close(linger=round(within_s * 1000))
        await asyncio.to_thread(self._context.term)

    async def _receive_forever(self) -> None:
        while True:
            peer, frame = await self._socket.recv_multipart(copy=False)
            try:
                self._receive(peer.bytes, decode(frame.buffer))
            except Exception:  # the outermost loop of the messages of all processes
                _log.exception("a message of %r is ignored", peer.bytes)

    def _receive(self, peer: bytes, message: Message) -> None:
        match message:
            case Hello():  # whoever had this name is gone
                self._cancel_all(peer)
                self._open[peer] = {}
            case EmbedRequest(id=request_id) if request_id not in self._open.setdefault(peer, {}):
                requests = self._open[peer]
                requests[request_id] = task = asyncio.create_task(self._answer(peer, message))
                task.add_done_callback(lambda _: requests.pop(request_id))
            case Cancel(id=request_id):
                if running := self._open.get(peer, {}).get(request_id):
                    running.cancel()
            case _:
                raise TypeError(f"a {type(message).__name__} comes from the engine process only")

    def _cancel_all(self, peer: bytes) -> None:
        for task in self._open.get(peer, {}).values():
            task.cancel()

    async def _answer(self, peer: bytes, request: EmbedRequest) -> None:
        answer: Message
        try:
            reply = await self._embedders[request.model].embed(
                request.sequences(),
                request.outputs,
                timeout_s=request.timeout_s,
                continues=request.continues,
                background=request.background,
            )
            rows = dict(reply.vectors.rows)
            answer = Embedded(request.id, rows, reply.queue_s, reply.compute_s)
        except ServiceError as error:
            answer = Refused.of(request.id, error)
        except Exception as mistake:  # the outermost loop of a request in this process
            _log.exception("request %d of %r failed", request.id, peer)
            answer = Refused.of(request.id, EngineFault(repr(mistake)))
        # To the socket's own thread; a message to a process that is gone is dropped.
        await self._socket.send_multipart([peer, encode(answer)], copy=False)
