"""Request context: one HTTP request, from its head to its line in the log; its body and its time.

It holds counts, names and times; never text, vectors or a plain key.

Nearly every request is answered long before its deadline, or its client's presence, matters; timers
and a task that waits for `http.disconnect` would be a tenth of what it costs the event loop
(decision 0006). So all requests share one timer, and no task starts before `WATCH_AFTER_S`.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPMethod, HTTPStatus
from typing import Self, cast

from starlette.types import Receive, Scope

from trivec.accounts import ANONYMOUS, Accounts, Key, RateLimitState, RequestMeta, Reservation
from trivec.api.memory import ByteBudget, MemoryReservation
from trivec.api.schemas import Chunk, Truncate, shown
from trivec.core.clock import EARLY_S, Deadlines
from trivec.core.errors import (
    AnswerTooLarge,
    BodyTooLarge,
    BodyTooSlow,
    BusyError,
    DeadlineExceeded,
    MalformedBody,
    MediaTypeUnsupported,
    ModelDenied,
    ModelUnknown,
    RequestTooLarge,
)
from trivec.core.health import Health
from trivec.core.ports import Clock, Embedder, Observer
from trivec.core.types import ModelCard
from trivec.jobs.batches import Batches
from trivec.settings import HttpLimits

CONTEXT = "trivec.context"  # where the context lies in the ASGI scope
PARSED_BYTES_A_BYTE = 2  # texts of one or two bytes a character, and token ids in arrays
PIECE_BYTES = 64  # around each piece of a body, in CPython
SILENT_S_MAX = 2.0  # without a byte of a body that is only dropped
TOKENS_MIN = 2  # of any text: the special tokens around it
METHODS = frozenset(HTTPMethod)
WATCH_AFTER_S = 0.05  # a client that leaves earlier is noticed then; what was answered is billed


@dataclass(slots=True)
class AppState:
    """What all requests of one app share."""

    embedders: Mapping[str, Embedder]  # by id and by alias; empty while loading
    accounts: Accounts
    observer: Observer
    clock: Clock
    limits: HttpLimits
    health: Callable[[], Health]
    metrics: Callable[[], bytes] | None
    memory: ByteBudget
    batches: Batches | None = None  # None: the face is not served
    # Large requests to tokenize run one at a time: their threads are those of embeddings.
    large_tokenize: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    large_tokenize_count: int = 0
    # What calls a request's timeout when something of it is due.
    deadlines: "Deadlines[RequestTimeout]" = field(
        default_factory=lambda: Deadlines(RequestTimeout.look)
    )

    def check_admission(self) -> None:
        """Raise `Overloaded` where no model takes even the smallest request there is."""
        *others, last = self.embedders.values()
        for embedder in others:
            with suppress(BusyError):
                embedder.check_admission(TOKENS_MIN)
                return
        last.check_admission(TOKENS_MIN)

    def cards_for(self, caller: Key) -> list[ModelCard]:
        """The cards of the models that *caller* may use, in the order they were configured."""
        cards = {one.card.id: one.card for one in self.embedders.values()}
        return [card for card in cards.values() if caller.may_use(card.names)]


class RequestContext:
    """One request; lives on the event loop, in one task."""

    def __init__(self, scope: Scope, receive: Receive, app: AppState) -> None:
        self.app = app
        # A client may send any word for a method.
        self.method: str = scope["method"] if scope["method"] in METHODS else "other"
        # By lower-case name; the first of several wins.
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
        self.query_string: bytes = scope["query_string"]
        self.path_params: dict[str, str] = {}  # of the route that was found
        self.prefix = ""  # of that route, where its API has several
        self.request_id = f"req_{os.urandom(16).hex()}"
        request_s_max = app.limits.request_s_max
        try:  # OpenAI's clients say how long they wait
            client_s = float(self.headers.get(b"x-stainless-read-timeout", b"0"))
        except ValueError:
            client_s = 0.0
        if 0 < client_s < request_s_max:  # NaN compares false
            request_s_max = client_s
        self.started_s = app.clock.now_s()
        self.deadline_s = self.started_s + request_s_max
        self._receive = receive
        self.timeout = RequestTimeout(
            app.deadlines, receive, request_s_max=request_s_max, body_s_max=app.limits.body_s_max
        )
        self.memory = MemoryReservation(app.memory)

        self.caller: Key | None = None
        self.background = False  # a line of a batch job: outside rate limits, and never urgent
        self.rate_limits: RateLimitState | None = None
        self.user: str | None = None  # the client's word for its user, on its way to be hashed
        self.error_code: str | None = None
        self.error_message: str | None = None  # where the client is at fault
        self.model: str | None = None  # a served id, never what the client merely claimed
        self.input_count = self.token_count = 0
        self.token_encoding: str | None = None  # of the ids in it that were decoded
        self.chunks: list[Chunk] = []  # of its texts, where it asked to have them cut
        self.request_bytes = 0  # of body, that were read
        self.is_body_asked_for = self.is_body_read = False  # read: to its end
        self.status: int | None = None  # of the response that has begun to leave
        self.response_bytes = 0  # of body, that have left
        self.tokenize_s = self.queue_s = self.compute_s = self.encode_s = 0.0

    @property
    def has_body(self) -> bool:
        """Whether the request's head announces a body."""
        has_length = self.headers.get(b"content-length", b"0") != b"0"
        return has_length or b"transfer-encoding" in self.headers

    @property
    def content_type(self) -> str:
        return self.headers.get(b"content-type", b"").decode("latin-1")

    @property
    def waits_for_100(self) -> bool:
        """Whether the client sends its body only when told to, and has not been told."""
        return b"expect" in self.headers and not self.is_body_asked_for

    @property
    def known_caller(self) -> Key:
        """The caller, on a route that asks for a key."""
        assert self.caller is not None, "the route is open"
        return self.caller

    @property
    def truncate(self) -> Truncate:
        """Which side is cut of a text that is too long, where the request does not say."""
        return cast("Truncate", self.known_caller.truncate or self.app.limits.truncate)

    @cached_property
    def reservation(self) -> Reservation:
        """What this request holds of its key's rate limits; made once its model is known."""
        meta = RequestMeta(self.request_id, self.model)
        caller = ANONYMOUS if self.background else self.known_caller
        return Reservation(self.app.accounts, caller, meta)

    def find_embedder(self, name: str) -> Embedder:
        """The model called *name*, case and all. Raises `ModelUnknown`, `ModelDenied`."""
        embedder = self.app.embedders.get(name)
        if embedder is None:
            served = tuple(card.id for card in self.app.cards_for(self.known_caller))
            raise ModelUnknown(model=shown(name), served=served)
        self.model = embedder.card.id
        if not self.known_caller.may_use(embedder.card.names):
            raise ModelDenied(model=embedder.card.id)
        return embedder

    async def admit(
        self, token_count: int, *, response_bytes: int, vector_bytes: int, reserved_bytes: int = 0
    ) -> None:
        """Reserve what is now known that this request takes: its tokens, and its memory.

        *reserved_bytes* of that memory are reserved already. `RequestTooLarge`,
        `AnswerTooLarge`, `Overloaded`, `RateLimitExceeded`.
        """
        limits = self.app.limits
        if token_count > limits.request_tokens_max:
            raise RequestTooLarge(
                token_count=token_count, token_count_max=limits.request_tokens_max
            )
        if response_bytes > limits.answer_bytes_max:
            raise AnswerTooLarge(
                answer_bytes=response_bytes, answer_bytes_max=limits.answer_bytes_max
            )
        self.memory.add(response_bytes + vector_bytes - reserved_bytes, is_response=True)
        await self.reservation.reserve_tokens(token_count)

    async def pieces(self) -> AsyncGenerator[bytes]:
        """The body as it arrives, of any length: its reader bounds that, and the time of it all.

        Raises `MalformedBody` if it breaks off, `BodyTooSlow` after `body_s_max` without a byte.
        """
        self.is_body_asked_for = has_more = True
        while has_more:
            try:
                async with asyncio.timeout(self.app.limits.body_s_max):
                    message = await self._receive()
            except TimeoutError:
                raise BodyTooSlow("The request body has stopped arriving. Send it again.") from None
            if message["type"] != "http.request":
                raise MalformedBody("The body of your request broke off before its end.")
            has_more = message.get("more_body", False)
            piece = message.get("body", b"")
            self.request_bytes += len(piece)
            self.is_body_read = not has_more
            yield piece

    async def read_body(self, *, is_optional: bool = False) -> bytes:
        """The whole body, which must be declared as JSON; empty only where it *is_optional*.

        Raises `MediaTypeUnsupported`; `BodyTooLarge`, where a length is declared before anything is
        read; `BodyTooSlow`; `MalformedBody` if it breaks off; `Overloaded` where the byte budget does
        not hold it and what parsing makes of it.
        """
        limits, memory = self.app.limits, self.memory
        is_plain = self.headers.get(b"content-type") == b"application/json"
        if not (is_plain and b"content-encoding" not in self.headers) and (
            self.has_body or not is_optional
        ):
            self._require_json()
        declared = self.headers.get(b"content-length", b"")
        declared_bytes = int(declared[:20]) if declared.isdigit() else 0
        # Over a slow link every packet of an honest body is a piece, so pieces are bounded only
        # where no length bounds the body.
        pieces_max = limits.body_bytes_max if declared else limits.body_chunks_max
        pieces: list[bytes] = []
        has_more = True
        self.timeout.is_reading = True
        try:
            while True:
                if max(declared_bytes, self.request_bytes) > limits.body_bytes_max:
                    raise BodyTooLarge(
                        f"The request body has more than {limits.body_bytes_max:,} bytes. "
                        "Split the input over several requests."
                    )
                if len(pieces) > pieces_max:
                    raise BodyTooLarge(
                        f"The request body came in more than {pieces_max} chunks. "
                        "Send it in larger ones, or with a Content-Length."
                    )
                if not has_more:
                    break
                self.is_body_asked_for = True
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
                    self.request_bytes += len(piece)
                    if has_more and len(pieces) == 1:
                        self.app.memory.arriving[memory] = self.timeout.end
                    memory.add(len(piece) + PIECE_BYTES)
        finally:
            self.timeout.is_reading = False
            self.app.memory.arriving.pop(memory, None)
        self.is_body_read = True
        body = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        memory.shrink(len(body))
        memory.add(PARSED_BYTES_A_BYTE * len(body))
        return body

    def _require_json(self) -> None:
        """Raise `MediaTypeUnsupported` unless the body says that it is plain JSON in UTF-8."""
        content_type = self.content_type or "(none)"
        encoding = self.headers.get(b"content-encoding", b"").decode("latin-1")
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

    async def drop_body(self) -> None:
        """Read and drop what is left of the body of a request that has been answered.

        Closing a connection with bytes unread resets it, and the client loses the response that it
        has not read yet: most clients send all of a body before they look. Bounded in bytes, in
        seconds, and in seconds without a byte; after that the connection is cut.
        """
        if not self.has_body or self.waits_for_100:
            return
        limits, dropped = self.app.limits, 0
        is_slow = self.status == HTTPStatus.REQUEST_TIMEOUT
        with suppress(TimeoutError):
            async with asyncio.timeout(SILENT_S_MAX if is_slow else limits.refused_body_s_max):
                while dropped < limits.refused_body_bytes_max:
                    async with asyncio.timeout(SILENT_S_MAX):
                        message = await self._receive()
                    dropped += len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return


class ClientDisconnected(Exception):
    """The client left, or stopped reading, before its response was out: nothing more is sent."""


class RequestTimeout:
    """Context manager around a request's handler, in the request's own task.

    It cancels the block when a deadline is passed or the client has left, and raises
    `DeadlineExceeded`, `BodyTooSlow` or `ClientDisconnected` in the cancellation's place, as
    `asyncio.timeout` does. Finding the key and writing the ledger row come before and after, with
    bounds of their own.
    """

    def __init__(
        self,
        deadlines: "Deadlines[RequestTimeout]",
        receive: Receive,
        *,
        request_s_max: float,
        body_s_max: float,
    ) -> None:
        """*body_s_max*: seconds from entering the block in which a body that it reads must be here."""
        self.is_reading = False  # a body
        self._deadlines = deadlines
        self._receive = receive
        self._request_s_max, self._body_s_max = request_s_max, body_s_max
        self._loop = asyncio.get_running_loop()
        self._due_s = self._loop.time() + request_s_max
        self._reason: Exception | None = None
        self._is_watching = False
        self._watcher: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelling = task, task.cancelling()
        self._body_due_s = self._loop.time() + self._body_s_max
        self._deadlines.set(self, min(self._body_due_s, self._due_s))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._deadlines.set(self, None)
        if self._watcher is not None:
            self._watcher.cancel()
        reason = self._reason
        # A cycle would keep the request's body until the garbage collector runs, which is seldom.
        self._watcher = self._reason = None
        if reason is None:
            return
        is_ours = self._task.uncancel() <= self._cancelling
        if is_ours and kind is asyncio.CancelledError:
            try:
                raise reason from None
            finally:
                del reason

    def watch_client(self) -> None:
        """From here on notice when the client leaves. Not before the request's body is read."""
        if not self._is_watching:
            self._is_watching = True
            self._deadlines.set(self, min(self._loop.time() + WATCH_AFTER_S, self._due_s))

    def extend(self, seconds: float) -> None:
        """Leave the request so much more time, for a body that has a deadline of its own."""
        self._due_s += seconds

    def end(self, reason: Exception) -> None:
        """Cancel the block and raise *reason* in its place; of several reasons the first."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    def look(self) -> None:
        """Called when something is due, or was."""
        now_s = self._loop.time() + EARLY_S
        if now_s >= self._due_s:
            self.end(
                DeadlineExceeded(
                    f"The request was not done within {self._request_s_max:g} seconds. "
                    "Please try again, with fewer inputs at a time.",
                    retry_after_s=1.0,
                )
            )
        elif self.is_reading and now_s >= self._body_due_s:
            self.end(
                BodyTooSlow(
                    f"The request body did not arrive within {self._body_s_max:g} seconds. "
                    "Send it again, in smaller requests."
                )
            )
        else:
            if self._is_watching and self._watcher is None:
                self._watcher = self._loop.create_task(self._watch(), name="client-watch")
            self._deadlines.set(self, self._due_s)

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass  # the body is read: what still comes is dropped
        self.end(ClientDisconnected())
