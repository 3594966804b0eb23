"""What the processes say to each other: MessagePack, a frame a message, arrays as their bytes.

Only processes of our own user can reach the socket, so messages have no limits of their own: HTTP's
limits bound a request, and a request bounds its answer.
"""

from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from trivec.core import errors
from trivec.core.types import Output, Reply, Sequences, SparseVector, Vectors

ARRAY = 1  # MessagePack's extension type of an array


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of an API process on a connection."""


class EmbedRequest(msgspec.Struct, frozen=True, tag=True):
    """From an API process. The answer is `Embedded` or `Refused`."""

    id: int  # unique among its open requests
    model: int  # index in `Served.models`
    outputs: Output
    token_ids: np.ndarray  # int32 [tokens]
    cu_seqlens: np.ndarray  # int32 [sequences + 1]
    token_types: np.ndarray | None  # int32 [tokens]
    timeout_s: float | None  # counts from when the engine process reads it
    skip: np.ndarray | None = None  # int32 [sequences]
    chunks: tuple[np.ndarray, ...] | None = None  # of each sequence int32 [chunks + 1]
    continues: bool = False  # what was admitted before
    background: bool = False

    def sequences(self) -> Sequences:
        return Sequences(
            self.token_ids,
            self.cu_seqlens,
            token_types=self.token_types,
            skip=self.skip,
            chunks=self.chunks,
        )


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """From an API process: nobody waits for this request any more."""

    id: int


class Embedded(msgspec.Struct, frozen=True, tag=True):
    """From the engine process: the vectors of a request."""

    id: int
    rows: dict[Output, Any]  # as in `Vectors`
    queue_s: float
    compute_s: float

    def reply(self) -> Reply:
        def row(plain: Any) -> Any:
            return SparseVector(**plain) if isinstance(plain, dict) else plain

        rows = {
            output: rows if isinstance(rows, np.ndarray) else tuple(map(row, rows))
            for output, rows in self.rows.items()
        }
        return Reply(Vectors(rows), self.queue_s, self.compute_s)


class Refused(msgspec.Struct, frozen=True, tag=True):
    """From the engine process: the `ServiceError` that a request ended with."""

    id: int
    error: str
    message: str
    retry_after_s: float

    @classmethod
    def of(cls, request_id: int, error: errors.ServiceError) -> "Refused":
        retry_after_s = error.retry_after_s if isinstance(error, errors.BusyError) else 0.0
        return cls(request_id, type(error).__name__, str(error), retry_after_s)

    def exception(self) -> errors.ServiceError:
        """The same error again; what is no `BusyError` is an `EngineFault`."""
        kind: type[errors.ServiceError] = getattr(errors, self.error)
        if issubclass(kind, errors.BusyError):
            return kind(self.message, retry_after_s=self.retry_after_s)
        return errors.EngineFault(self.message)


Message: TypeAlias = Hello | EmbedRequest | Cancel | Embedded | Refused


def _from_array(value: Any) -> msgspec.msgpack.Ext:
    numbers = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data
    return msgspec.msgpack.Ext(
        ARRAY, msgspec.msgpack.encode((value.dtype.str, value.shape, numbers))
    )


def _to_array(code: int, body: memoryview) -> NDArray[Any]:
    dtype, shape, numbers = _array.decode(body)
    # Numbers begin anywhere in a frame; a copy is aligned, which kernels may count on.
    return np.frombuffer(numbers, dtype).reshape(shape).copy()


_array = msgspec.msgpack.Decoder(tuple[str, tuple[int, ...], memoryview])
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message, ext_hook=_to_array)
encode = msgspec.msgpack.Encoder(enc_hook=_from_array).encode
decode = _decoder.decode  # raises what msgspec and numpy raise
