"""What messages hold: requests, vectors, refusals, and who is who. Pure functions of bytes.

Numbers travel as they lie in memory, little-endian; words as JSON. Whatever is read is checked
against itself and against its bounds, and is a `WireBroken` where it does not fit.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from trivec.core.errors import (
    BusyError,
    DeadlineExceeded,
    Draining,
    EngineFault,
    Loading,
    Overloaded,
    ServiceError,
)
from trivec.core.types import ModelCard, Output, Reply, Sequences, SparseVector, Vectors
from trivec.ipc.frames import WireBroken

_ASK = struct.Struct("<HHII4xd")  # model, outputs, sequences, tokens, deadline in seconds
_REPLY = struct.Struct("<IIIIdd")  # sequences, dense width, multi width, kinds, queue, compute

BUSY: Mapping[str, type[BusyError]] = {
    one.__name__: one for one in (Overloaded, Draining, Loading, DeadlineExceeded)
}

T = TypeVar("T")


class ModelHello(msgspec.Struct, frozen=True):
    """One served model, as an API process must know it."""

    card: ModelCard
    tokenizer_file: str
    cosine_min: float | None
    cosine_mean: float | None
    certificate: str | None  # its summary


class Hello(msgspec.Struct, frozen=True):
    """What the engine process says to whoever calls."""

    version: str
    backend: str
    device: str
    reason: str
    slot_count: int
    models: tuple[ModelHello, ...]


class Refusal(msgspec.Struct, frozen=True):
    """Why a request got no vectors."""

    error: str
    message: str
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Ask:
    """A request on its way to the engine."""

    model: int  # its index in the hello
    sequences: Sequences
    outputs: Output
    deadline_s: float | None


def write_hello(hello: Hello) -> bytes:
    return msgspec.json.encode(hello, enc_hook=_plain)


def read_hello(body: bytes | bytearray) -> Hello:
    return _read_words(body, Hello)


def write_ask(ask: Ask) -> list[memoryview]:
    sequences = ask.sequences
    deadline_s = math.inf if ask.deadline_s is None else ask.deadline_s
    counts = (len(sequences), sequences.token_count)
    head = _ASK.pack(ask.model, ask.outputs, *counts, deadline_s)
    return [memoryview(head), _raw(sequences.cu_seqlens), _raw(sequences.token_ids)]


def read_ask(body: bytes | bytearray, cards: Sequence[ModelCard]) -> Ask:
    """The request, fit to run: a bad index may cost a device, so it is stopped here."""
    if len(body) < _ASK.size:
        raise WireBroken("a request is cut short")
    model, flags, sequence_count, token_count, deadline_s = _ASK.unpack_from(body)
    if model >= len(cards):
        raise WireBroken(f"a request for model {model} of {len(cards)}")
    card, outputs = cards[model], Output(flags)
    if not outputs or outputs & ~card.outputs:
        raise WireBroken(f"a request for outputs {flags}, which {card.id} does not have")
    cursor = _Cursor(body, _ASK.size)
    starts = cursor.take(np.int32, sequence_count + 1)
    token_ids = cursor.take(np.int32, token_count)
    cursor.finish()
    if starts[0] != 0 or starts[-1] != token_count or not sequence_count:
        raise WireBroken("a request's sequences do not span its tokens")
    lengths = np.diff(starts)
    if lengths.min() < 1 or lengths.max() > card.token_count_max:
        raise WireBroken(f"a sequence is empty or beyond {card.token_count_max} tokens")
    if token_ids.min() < 0 or token_ids.max() >= card.vocabulary_size:
        raise WireBroken(f"a token id is outside the vocabulary of {card.vocabulary_size}")
    sequences = Sequences(token_ids, starts)
    return Ask(model, sequences, outputs, None if math.isinf(deadline_s) else deadline_s)


def write_reply(reply: Reply) -> list[memoryview]:
    """Dense rows; then, for a request that asked for them, sparse terms and rows for each token."""
    vectors = reply.vectors
    sparse = [one for one in vectors.sparse if one is not None]
    multi = [one for one in vectors.multi if one is not None]
    assert len(sparse) in (0, len(vectors)), "all sequences of a request ask for the same"
    assert len(multi) in (0, len(vectors)), "all sequences of a request ask for the same"
    kinds = Output.DENSE | (Output.SPARSE if sparse else 0) | (Output.MULTI if multi else 0)
    widths = (vectors.dense.shape[1], multi[0].shape[1] if multi else 0)
    head = _REPLY.pack(len(vectors), *widths, kinds, reply.queue_s, reply.compute_s)
    pieces = [memoryview(head), _raw(vectors.dense)]
    if sparse:
        pieces.append(_raw(np.array([len(one.token_ids) for one in sparse], np.int32)))
        pieces.append(_raw(np.concatenate([one.token_ids for one in sparse])))
        pieces.append(_raw(np.concatenate([one.weights for one in sparse])))
    if multi:
        pieces.append(_raw(np.array([len(one) for one in multi], np.int32)))
        pieces += [_raw(one) for one in multi]
    return pieces


def read_reply(body: bytes | bytearray) -> Reply:
    """The vectors, views of *body*."""
    if len(body) < _REPLY.size:
        raise WireBroken("a reply is cut short")
    count, width, multi_width, kinds, queue_s, compute_s = _REPLY.unpack_from(body)
    cursor = _Cursor(body, _REPLY.size)
    dense = cursor.take(np.float32, count * width).reshape(count, width)
    sparse: tuple[SparseVector | None, ...] = (None,) * count
    multi: tuple[NDArray[np.float32] | None, ...] = (None,) * count
    if Output.SPARSE & kinds:
        bounds = cursor.take_bounds(count)
        token_ids = np.split(cursor.take(np.int32, int(bounds[-1])), bounds[:-1])
        weights = np.split(cursor.take(np.float32, int(bounds[-1])), bounds[:-1])
        sparse = tuple(map(SparseVector, token_ids, weights))
    if Output.MULTI & kinds:
        bounds = cursor.take_bounds(count)
        rows = cursor.take(np.float32, int(bounds[-1]) * multi_width)
        multi = tuple(np.split(rows.reshape(int(bounds[-1]), multi_width), bounds[:-1]))
    cursor.finish()
    return Reply(Vectors.of(dense, sparse, multi), queue_s, compute_s)


def write_refusal(error: ServiceError) -> bytes:
    retry_after_s = error.retry_after_s if isinstance(error, BusyError) else 0.0
    return msgspec.json.encode(Refusal(type(error).__name__, str(error), retry_after_s))


def read_refusal(body: bytes | bytearray) -> ServiceError:
    """The same error again; whatever is not a `BusyError` is our own mistake."""
    refusal = _read_words(body, Refusal)
    busy = BUSY.get(refusal.error)
    if busy is not None:
        return busy(refusal.message, retry_after_s=refusal.retry_after_s)
    return EngineFault(refusal.message)


def write_pages(pages: Mapping[str, bytes]) -> bytes:
    return msgspec.msgpack.encode(pages)


def read_pages(body: bytes | bytearray) -> dict[str, bytes]:
    try:
        return msgspec.msgpack.decode(body, type=dict[str, bytes])
    except (msgspec.MsgspecError, UnicodeDecodeError) as fault:
        raise WireBroken(f"pages that cannot be read: {fault}") from fault


class _Cursor:
    """Takes arrays off a body, one after another."""

    def __init__(self, body: bytes | bytearray, at: int) -> None:
        self._body = body
        self._at = at

    def take(self, dtype: type[np.generic], count: int) -> NDArray:  # type: ignore[type-arg]
        size = count * np.dtype(dtype).itemsize
        if size > len(self._body) - self._at:
            raise WireBroken(f"a message ends {size} bytes before an array of {count} does")
        array = np.frombuffer(self._body, dtype, count, self._at)
        self._at += size
        return array

    def take_bounds(self, count: int) -> NDArray[np.int64]:
        """Where each of *count* parts ends, from their sizes: `[count]`."""
        sizes = self.take(np.int32, count)
        if not count or sizes.min() < 0:
            raise WireBroken("a message's parts have no size")
        return np.cumsum(sizes, dtype=np.int64)

    def finish(self) -> None:
        if self._at != len(self._body):
            raise WireBroken(f"{len(self._body) - self._at} bytes are left over in a message")


def _raw(array: NDArray[np.generic]) -> memoryview:
    """The bytes of *array*, where they lie."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _read_words(body: bytes | bytearray, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind, dec_hook=_of_plain)
    except (msgspec.MsgspecError, UnicodeDecodeError) as fault:
        raise WireBroken(f"a {kind.__name__} that cannot be read: {fault}") from fault


def _plain(value: object) -> object:
    if isinstance(value, Mapping):  # a read-only one
        return dict(value)
    raise NotImplementedError(type(value))


def _of_plain(kind: type, value: object) -> object:
    return kind(value)
