"""Frames: how messages are cut up for the wire and put together again, each piece bounded.

A message is one or more frames of one kind and number, the last of them marked. Those of different
numbers may alternate, so that a large answer does not hold up a small one. Pure; no socket.
"""

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

FRAME_BYTES_MAX = 256 * 1024  # of a frame's body
PARTS_MAX = 8192  # messages under way at a time

_HEADER = struct.Struct("<BBxxII")  # kind, end, number, bytes of the body


class Kind(IntEnum):
    """What a message is. Numbers belong to requests; all else has number 0."""

    HELLO = 1  # both ways, first: who calls, and what is served
    ASK = 2  # from here on up to the engine: a request
    CANCEL = 3
    SERVING = 4  # the API process is ready for clients
    PAGE = 5  # its metrics
    REPLY = 6  # from here on down: vectors
    REFUSAL = 7
    ALL_SERVING = 8  # every API process is ready
    PAGES = 9  # the metrics of all the others


class End(IntEnum):
    """Whether a frame ends its message."""

    NO = 0
    WHOLE = 1
    VOID = 2  # whoever sent it has broken off: what came of it is forgotten


class WireBroken(Exception):
    """The other side sent what it never should: the connection is of no use any more."""


@dataclass(frozen=True, slots=True)
class Message:
    """A whole message."""

    kind: Kind
    number: int
    body: bytes | bytearray


def header(kind: Kind, number: int, body_bytes: int, end: End) -> bytes:
    """What goes before a frame's body."""
    assert 0 <= body_bytes <= FRAME_BYTES_MAX
    return _HEADER.pack(kind, end, number, body_bytes)


def void(kind: Kind, number: int) -> bytes:
    """The frame that takes back the frames of a message that was not finished."""
    return header(kind, number, 0, End.VOID)


def frames_of(kind: Kind, number: int, pieces: Sequence[memoryview]) -> Iterator[bytes]:
    """The frames of a message whose body is *pieces* end to end: at least one."""
    chunks = [
        piece[at : at + FRAME_BYTES_MAX]
        for piece in pieces
        for at in range(0, len(piece), FRAME_BYTES_MAX)
    ] or [memoryview(b"")]
    for chunk in chunks[:-1]:
        yield header(kind, number, len(chunk), End.NO) + chunk
    yield header(kind, number, len(chunks[-1]), End.WHOLE) + chunks[-1]


_ENDS = frozenset(End)


class FrameReader:
    """Bytes in, whole messages out. *bytes_max* bounds a message of each kind that may come."""

    def __init__(self, bytes_max: Mapping[Kind, int]) -> None:
        self._bytes_max = bytes_max
        self._unread = bytearray()
        self._parts: dict[tuple[Kind, int], bytearray] = {}

    def feed(self, piece: bytes) -> list[Message]:
        """The messages that *piece* completes. Raises `WireBroken`; after that, feed no more."""
        self._unread += piece
        found: list[Message] = []
        at = 0
        while len(self._unread) - at >= _HEADER.size:
            word, end, number, size = _HEADER.unpack_from(self._unread, at)
            kind = self._kind(word, size)
            if end not in _ENDS:
                raise WireBroken(f"a frame that ends in way {end}")
            body_at = at + _HEADER.size
            if len(self._unread) < body_at + size:
                break
            at = body_at + size
            message = self._add(kind, number, self._unread[body_at:at], End(end))
            if message is not None:
                found.append(message)
        del self._unread[:at]
        return found

    def _kind(self, word: int, size: int) -> Kind:
        if word not in self._bytes_max:
            raise WireBroken(f"a frame of kind {word} is not expected here")
        if size > FRAME_BYTES_MAX:
            raise WireBroken(f"a frame of {size} bytes; at most {FRAME_BYTES_MAX} are read")
        return Kind(word)

    def _add(self, kind: Kind, number: int, body: bytearray, end: End) -> Message | None:
        place = (kind, number)
        part = self._parts.pop(place, None)
        if end is End.VOID:
            return None
        whole = body if part is None else part
        if part is not None:
            part += body
        if len(whole) > self._bytes_max[kind]:
            raise WireBroken(
                f"{kind.name} of more than {self._bytes_max[kind]} bytes, the most there can be"
            )
        if end is End.WHOLE:
            return Message(kind, number, whole)
        if len(self._parts) >= PARTS_MAX:
            raise WireBroken(f"more than {PARTS_MAX} messages have begun and not ended")
        self._parts[place] = whole
        return None
