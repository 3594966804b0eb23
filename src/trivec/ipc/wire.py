"""One connection between two processes: messages both ways, on the event loop."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from trivec.ipc.frames import FrameReader, Kind, Message, WireBroken, frames_of, void

# Beyond it, whoever has more to send waits; each frame may pass it once, by its own length.
UNSENT_BYTES_MAX = 1024 * 1024
# Open requests of one API process. Far more than its connections send at a time, and half of the
# messages that a reader keeps in parts: those taken back have room there, too.
ASKS_MAX = 4096
PAGES_EVERY_S = 2.0  # between two looks at each other's metrics


@dataclass(frozen=True, slots=True)
class WireBounds:
    """The largest messages that can be, from the limits of a request and of an answer."""

    ask_bytes_max: int
    reply_bytes_max: int
    # Of a hello, a refusal, or pages of metrics: a page of 500 series has some 60 KB, and 256
    # processes are more than one port carries.
    words_bytes_max: int = 16 * 1024 * 1024

    def upwards(self) -> Mapping[Kind, int]:
        """What the engine process reads."""
        words = self.words_bytes_max
        return {
            Kind.HELLO: words,
            Kind.ASK: self.ask_bytes_max,
            Kind.CANCEL: 0,
            Kind.SERVING: 0,
            Kind.PAGE: words,
        }

    def downwards(self) -> Mapping[Kind, int]:
        """What an API process reads."""
        words = self.words_bytes_max
        return {
            Kind.HELLO: words,
            Kind.REPLY: self.reply_bytes_max,
            Kind.REFUSAL: words,
            Kind.ALL_SERVING: 0,
            Kind.PAGES: words,
        }


class Wire(asyncio.Protocol):
    """Hands every message to *take*; says *lost*, once and with the reason, when it ends.

    *take* may raise `WireBroken` for a message that cannot be.
    """

    def __init__(
        self,
        bytes_max: Mapping[Kind, int],
        *,
        take: Callable[["Wire", Message], None],
        lost: Callable[["Wire", str], None],
    ) -> None:
        self._reader = FrameReader(bytes_max)
        self._take = take
        self._lost = lost
        self._transport: asyncio.Transport | None = None
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._turn = asyncio.Lock()  # first come, first served: each writes one frame, then waits
        self._reason = "the other process ended the connection"

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def has_room(self) -> bool:
        """Whether what was written is being read."""
        return self._has_room.is_set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=UNSENT_BYTES_MAX)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._reader.feed(data):
                if self.is_open:
                    self._take(self, message)
        except WireBroken as broken:
            self.cut(str(broken))

    def pause_writing(self) -> None:
        self._has_room.clear()

    def resume_writing(self) -> None:
        self._has_room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._has_room.set()  # whoever waits finds the wire closed
        self._lost(self, self._reason if exc is None else repr(exc))

    async def send(self, kind: Kind, number: int, pieces: Sequence[memoryview]) -> None:
        """Send a message frame by frame, as the other side takes them; others go in between.

        A call that is cancelled takes back what it has sent.
        """
        try:
            for frame in frames_of(kind, number, pieces):
                async with self._turn:
                    await self._has_room.wait()
                    self._write(frame)
        except asyncio.CancelledError:
            self._write(void(kind, number))
            raise

    def tell(self, kind: Kind, number: int = 0, body: bytes = b"") -> None:
        """Send a small message at once. One to a wire that is lost is lost, too."""
        for frame in frames_of(kind, number, [memoryview(body)]):
            self._write(frame)

    def _write(self, frame: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    def close(self) -> None:
        """Send what is under way, then end."""
        if self._transport is not None:
            self._transport.close()

    def cut(self, reason: str) -> None:
        """End at once."""
        self._reason = reason
        if self._transport is not None:
            self._transport.abort()
