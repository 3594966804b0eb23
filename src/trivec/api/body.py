"""Request bodies: the byte budget that all requests share, and one body read within its bounds.

The budget bounds what the bodies, vectors and answers of all requests hold at one time. Each request
has a `MemoryHold`, which grows as its body arrives and before its vectors are computed, and is given
back when its answer has left. It lives on the event loop; it counts, and allocates nothing.

No client can take all of it. A request that holds little always fits: its part is kept free of
large ones. A body that is still arriving gives way to a request that needs half of it or less, so
that clients that send most of a body and stop are the first to be refused.
"""

import asyncio
import random
from collections.abc import Callable, Mapping
from contextlib import suppress

from starlette.types import Receive

from trivec.api.schemas import shown
from trivec.api.timeout import RequestTimeout
from trivec.core.errors import (
    AnswerTooLarge,
    BodyTooLarge,
    BodyTooSlow,
    MalformedBody,
    MediaTypeUnsupported,
    Overloaded,
)
from trivec.settings import MEBIBYTE, HttpLimits, Settings

DEFAULT_BYTES_MAX = 512 * MEBIBYTE
DEFAULT_SHARE = 4  # a fourth of the machine's memory, where that is less
BODIES_MIN = 8  # that fit in any budget; a body counts three times while it is read and parsed
GIVES_WAY_TO = 2  # times smaller
PARSED_BYTES_A_BYTE = 2  # texts of one or two bytes a character, and token ids in arrays
PIECE_BYTES = 64  # around each piece of a body, in CPython
SILENT_S_MAX = 2.0  # without a byte of a body that is only dropped


class ByteBudget:
    """How many bytes all requests of this process hold, and may."""

    def __init__(self, bytes_max: int = DEFAULT_BYTES_MAX, *, connections_max: int = 1024) -> None:
        kept_for_small = bytes_max * 3 // 8
        self.bytes_max = bytes_max
        self.large_bytes_max = bytes_max - kept_for_small  # all that large requests share
        self.small_bytes = kept_for_small // connections_max  # so that all can be small at once
        self.used_bytes = 0
        self.arriving: dict[MemoryHold, Callable[[Exception], None]] = {}  # to how each is refused

    def spent(self) -> Overloaded:
        """The refusal of what does not fit."""
        return Overloaded(
            f"The requests being served hold all of the {self.bytes_max:,} bytes that bodies and "
            "answers may take. Please try again shortly, with fewer inputs at a time.",
            retry_after_s=random.uniform(5, 10),  # noqa: S311 # so that not all come back at once
        )


class MemoryHold:
    """The bytes of one request."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.bytes = 0

    def add(self, byte_count: int) -> None:
        """Hold *byte_count* more. Raises `Overloaded` where larger arriving bodies leave no room."""
        budget, total = self._budget, self.bytes + byte_count
        limit = budget.bytes_max if total <= budget.small_bytes else budget.large_bytes_max
        while budget.used_bytes + byte_count > limit:
            largest = max(budget.arriving, key=lambda one: one.bytes, default=None)
            if largest is None or largest.bytes < GIVES_WAY_TO * total:
                raise budget.spent()
            budget.arriving.pop(largest)(budget.spent())
            largest.shrink(0)
        self.bytes = total
        budget.used_bytes += byte_count

    def add_answer(self, byte_count: int) -> None:
        """`add`, for what is about to be made. Raises `AnswerTooLarge` where it can never fit."""
        most = self._budget.large_bytes_max - self.bytes
        if byte_count > most:
            raise AnswerTooLarge(answer_bytes=byte_count, answer_bytes_max=most)
        self.add(byte_count)

    def shrink(self, byte_count: int) -> None:
        """Hold *byte_count* and no more, or what it holds where that is less."""
        freed = max(0, self.bytes - byte_count)
        self.bytes -= freed
        self._budget.used_bytes -= freed

    def arrives(self, refuse: Callable[[Exception], None]) -> None:
        """A body is being read: *refuse* is called if a smaller request needs its room."""
        self._budget.arriving[self] = refuse

    def has_arrived(self) -> None:
        """The body is read, or given up."""
        self._budget.arriving.pop(self, None)


def budget_bytes(settings: Settings, *, machine_bytes: int) -> int:
    """One API process's share of the setting, or of what a machine of *machine_bytes* can spare."""
    limits = settings.http
    whole = limits.memory_bytes_max or min(DEFAULT_BYTES_MAX, machine_bytes // DEFAULT_SHARE)
    return max(whole // settings.api_processes, BODIES_MIN * limits.body_bytes_max)


class RequestBody:
    """The body of one request, unread until `read`."""

    def __init__(
        self,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        limits: HttpLimits,
        memory: MemoryHold,
        timeout: RequestTimeout,
    ) -> None:
        self._headers = headers
        self._receive = receive
        self._limits = limits
        self._memory = memory
        self._timeout = timeout
        self._is_asked_for = False
        self._is_read = False  # to its end
        self.byte_count = 0  # of it that were read

    @property
    def waits_for_100(self) -> bool:
        """Whether the client sends its body only when told to, and has not been told."""
        return b"expect" in self._headers and not self._is_asked_for

    async def read(self, *, is_optional: bool = False) -> bytes:
        """All of it, of a request that says it is JSON; empty only where it *is_optional*.

        Raises `MediaTypeUnsupported`; `BodyTooLarge`, where a length is declared before anything is
        read; `BodyTooSlow`; `MalformedBody` if it breaks off; `Overloaded` where the byte budget does
        not hold it and what parsing makes of it.
        """
        limits, memory = self._limits, self._memory
        if not is_optional:
            self._check_is_json()
        declared = self._headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared[:20]) > limits.body_bytes_max:
            raise _too_many_bytes(limits)
        # Over a slow link every packet of an honest body is a piece, so pieces are bounded only
        # where no length bounds the body.
        pieces_max = limits.body_bytes_max if declared else limits.body_chunks_max
        pieces: list[bytes] = []
        self._is_asked_for = has_more = True
        try:
            async with asyncio.timeout(limits.body_s_max):
                while has_more:
                    message = await self._receive()
                    # A bad chunk looks like a client that left.
                    if message["type"] != "http.request":
                        raise MalformedBody(
                            "We could not parse the JSON body of your request (it broke off before "
                            "its end). Send one JSON object in UTF-8."
                        )
                    has_more = message.get("more_body", False)
                    if piece := message.get("body", b""):
                        pieces.append(piece)
                        self.byte_count += len(piece)
                        if has_more and len(pieces) == 1:
                            memory.arrives(self._timeout.end)
                        memory.add(len(piece) + PIECE_BYTES)
                    if self.byte_count > limits.body_bytes_max:
                        raise _too_many_bytes(limits)
                    if len(pieces) > pieces_max:
                        raise BodyTooLarge(
                            f"The request body came in more than {pieces_max} chunks. "
                            "Send it in larger ones, or with a Content-Length."
                        )
        except TimeoutError:
            raise BodyTooSlow(
                f"The request body did not arrive within {limits.body_s_max:g} seconds. "
                "Send it again, in smaller requests."
            ) from None
        finally:
            memory.has_arrived()
        self._is_read = True
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        memory.shrink(len(body))
        memory.add(PARSED_BYTES_A_BYTE * len(body))
        if is_optional and body:
            self._check_is_json()
        return body

    def _check_is_json(self) -> None:
        """Raise `MediaTypeUnsupported` unless the body says that it is plain JSON in UTF-8."""
        content_type = self._headers.get(b"content-type", b"").decode("latin-1") or "nothing"
        encoding = self._headers.get(b"content-encoding", b"").decode("latin-1")
        if encoding.strip().lower() not in ("", "identity"):
            raise MediaTypeUnsupported(
                f"Content-Encoding {shown(encoding)} is not supported. Send the body as it is."
            )
        kind, _, parameters = content_type.partition(";")
        charset = parameters.replace(" ", "").replace('"', "").lower().partition("charset=")[2]
        if kind.strip().lower() != "application/json" or charset not in ("", "utf-8", "utf8"):
            raise MediaTypeUnsupported(
                f"Content-Type {shown(content_type)} is not supported. "
                "Send Content-Type: application/json, in UTF-8."
            )

    async def drop_rest(self, *, seconds_max: float) -> None:
        """Read and drop what is left once the request has been answered.

        Closing a connection with bytes unread resets it, and the client loses the answer that it
        has not read yet: most clients send all of a body before they look. Bounded in bytes, in
        seconds, and in seconds without a byte; after that the connection is cut.
        """
        declares_none = self._headers.get(b"content-length", b"0") == b"0"
        has_body = not declares_none or b"transfer-encoding" in self._headers
        if self._is_read or not has_body or self.waits_for_100:
            return
        dropped = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds_max):
                while dropped < self._limits.refused_body_bytes_max:
                    async with asyncio.timeout(SILENT_S_MAX):
                        message = await self._receive()
                    dropped += len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return


def _too_many_bytes(limits: HttpLimits) -> BodyTooLarge:
    return BodyTooLarge(
        f"The request body has more than {limits.body_bytes_max:,} bytes. "
        "Split the input over several requests."
    )
