"""An API process's side: requests to the engine process, and coming back when it is started again.

While the engine process is gone this one is not ready, and refuses with `Draining`.
"""

import asyncio
import logging
import time
from collections.abc import Callable

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from trivec.core.errors import Draining, EngineFault
from trivec.core.ports import TextTokenizer
from trivec.core.types import ModelCard, Output, Reply, Sequences
from trivec.ipc.folder import Served, SharedFolder
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

RETURN_S = 5.0  # after which a client should find the engine process started again
AWAY = "The engine process is away. Please try again."

_log = logging.getLogger("trivec.ipc")


class EngineClient:
    """The connection of API process *name*, on the event loop, from `start` to `stop`.

    *served* is what this process was made for: when the engine process runs something else, `lost`
    ends, and this process must be started again, too.
    """

    def __init__(
        self, folder: SharedFolder, name: str, *, served: Served, metrics: Callable[[], bytes]
    ) -> None:
        self._folder = folder
        self._name = name
        self._metrics = metrics
        self._served = served
        self._is_connected = False
        self._was_connected = asyncio.Event()
        self._is_lost = asyncio.Event()
        self._lost_reason = ""
        self._open: dict[int, asyncio.Future[Reply]] = {}
        self._last_id = time.time_ns()  # so that no answer to a former process of the name fits
        self._tasks: list[asyncio.Task[None]] = []
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set(zmq.IDENTITY, name.encode())
        self._socket.set(zmq.IMMEDIATE, 1)  # nothing waits for an engine process yet to come
        self._socket.set(zmq.SNDHWM, 0)  # HTTP's limits bound what is open
        self._socket.set(zmq.RCVHWM, 0)

    @property
    def problems(self) -> tuple[str, ...]:
        """Why this process is not ready, as far as the engine process goes."""
        return () if self._is_connected else ("the engine process is away",)

    def start(self) -> None:
        """Connect, and again whenever the engine process was lost."""
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        monitor = self._socket.get_monitor_socket(events)
        self._socket.connect(self._folder.endpoint)
        metrics = self._folder.write_metrics_forever(self._name, self._metrics)
        for work in (self._watch(monitor), self._receive_forever(), metrics):
            task = asyncio.create_task(work, name="ipc")
            task.add_done_callback(self._task_ended)
            self._tasks.append(task)

    def _task_ended(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled():
            self._lose(f"the connection to the engine process failed: {task.exception()!r}")

    def _lose(self, reason: str) -> None:
        self._lost_reason = self._lost_reason or reason
        self._is_lost.set()

    async def lost(self) -> str:
        """Wait until this process is of no use any more; why."""
        await self._is_lost.wait()
        return self._lost_reason

    async def stop(self, within_s: float) -> None:
        """Wait *within_s* for what is open, then cancel the rest."""
        self._is_connected = False
        if self._open:
            await asyncio.wait(list(self._open.values()), timeout=within_s)
        for task in self._tasks:
            task.cancel()
        for request_id in self._open:
            self._send(Cancel(request_id))
        self._refuse_all()
        if self._socket.closed:  # another `stop` was faster
            return
        self._socket.disable_monitor()
        await asyncio.to_thread(self._context.destroy, linger=100)

    def check_connected(self) -> None:
        """Raise `Draining` while nobody could answer."""
        if self._was_connected.is_set() and not self._is_connected:
            raise Draining(AWAY, retry_after_s=RETURN_S)

    async def embed(
        self,
        model: int,
        sequences: Sequences,
        outputs: Output,
        timeout_s: float | None,
        *,
        continues: bool = False,
        background: bool = False,
    ) -> Reply:
        """Let the engine process embed *sequences*; cancelling the call cancels it there."""
        await self._was_connected.wait()
        self.check_connected()
        self._last_id = request_id = self._last_id + 1
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._open[request_id] = future
        try:
            self._send(
                EmbedRequest(
                    request_id,
                    model,
                    outputs,
                    sequences.token_ids,
                    sequences.cu_seqlens,
                    sequences.token_types,
                    timeout_s,
                    sequences.skip,
                    sequences.chunks,
                    continues,
                    background,
                )
            )
            return await future
        except asyncio.CancelledError:
            self._send(Cancel(request_id))
            raise
        finally:
            del self._open[request_id]
            if future.done() and not future.cancelled():
                future.exception()  # heard, also when the call was cancelled at the same moment

    def _send(self, message: Message) -> None:
        """Hand *message* to the socket's own thread. Without an engine process it is dropped."""
        sent = self._socket.send(encode(message), zmq.DONTWAIT, copy=False)
        asyncio.ensure_future(sent).add_done_callback(lambda one: one.exception())

    async def _watch(self, monitor: zmq.asyncio.Socket) -> None:
        while True:
            happened = await recv_monitor_message(monitor)
            if happened["event"] != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                if self._is_connected:
                    _log.warning("the engine process is gone")
                self._is_connected = False
                self._refuse_all()
                continue
            served = await asyncio.to_thread(self._folder.read_served)
            if served.is_same_service(self._served):
                self._send(Hello())
                self._is_connected = True
                self._was_connected.set()
            else:
                self._lose("the engine process serves other models now")

    def _refuse_all(self) -> None:
        for future in self._open.values():
            if not future.done():
                future.set_exception(Draining(AWAY, retry_after_s=RETURN_S))

    async def _receive_forever(self) -> None:
        while True:
            frame = await self._socket.recv(copy=False)
            try:
                self._receive(decode(frame.buffer))
            except Exception:  # the outermost loop of all its messages
                _log.exception("a message of the engine process is ignored")

    def _receive(self, message: Message) -> None:
        if not isinstance(message, Embedded | Refused):
            raise TypeError(f"a {type(message).__name__} comes from an API process only")
        future = self._open.get(message.id)
        if future is None or future.done():  # cancelled meanwhile
            return
        if isinstance(message, Refused):
            future.set_exception(message.exception())
            return
        try:
            future.set_result(message.reply())
        except Exception as fault:  # rows of no form of ours: nobody may wait for others
            future.set_exception(EngineFault(f"an answer that cannot be read: {fault!r}"))


class RemoteEmbedder:
    """`core.ports.Embedder` for a model of the engine process: texts become tokens here."""

    def __init__(
        self, index: int, card: ModelCard, tokenizer: TextTokenizer, client: EngineClient
    ) -> None:
        self.card = card
        self.tokenizer = tokenizer
        self._index = index
        self._client = client

    async def embed(
        self,
        sequences: Sequences,
        outputs: Output,
        *,
        timeout_s: float | None = None,
        continues: bool = False,
        background: bool = False,
    ) -> Reply:
        """See `core.ports.Embedder`. *timeout_s* counts from when the engine process reads it."""
        return await self._client.embed(
            self._index,
            sequences,
            outputs,
            timeout_s,
            continues=continues,
            background=background,
        )

    def check_admission(self, token_count: int) -> None:
        """Refuse while the engine process is away; how full its queue is, only `embed` hears."""
        self._client.check_connected()
