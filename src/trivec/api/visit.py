"""One request while it is in the house: what it said, and what became known of it on the way.

Written by the rooms it passes, read once at the end by the outermost middleware. It holds counts,
names and times; never text, vectors or a plain key.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from starlette.types import Receive, Scope

from trivec.accounts import Caller, RateLimitState, Reservation
from trivec.api.memory import Held

VISIT = "trivec.visit"  # where a visit lies in the ASGI scope
CLIENT_REQUEST_ID_CHARS_MAX = 512
TRACEPARENT_CHARS_MAX = 128


class Watching(Protocol):
    """What can end a request, and notice that its client leaves: its `Patience`."""

    def watch(self) -> None: ...
    def end(self, reason: Exception) -> None: ...


METHODS = frozenset(
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"]
)


@dataclass(slots=True)
class Timings:
    """Seconds spent in each part of the walk, as `server-timing` and the log show them."""

    tokenize_s: float = 0.0
    queue_s: float = 0.0
    compute_s: float = 0.0
    encode_s: float = 0.0


@dataclass(slots=True)
class Visit:
    """A request on its way through; lives on the event loop, in one task."""

    method: str
    headers: Mapping[bytes, bytes]  # lower-case names; the first of several wins
    query: bytes
    receive: Receive
    started_s: float
    deadline_s: float  # on the same clock as `started_s`
    request_id: str
    held: Held
    path_params: Mapping[str, str] = field(default_factory=dict)
    route: str = "other"
    caller: Caller | None = None
    booking: Reservation | None = None
    allowance: RateLimitState | None = None
    user: str | None = None  # the client's word for its user, on its way to be hashed
    code: str | None = None  # of the error it is answered with
    message: str | None = None  # likewise, where the client is at fault
    model: str | None = None  # a served id, never what the client merely claimed
    input_count: int = 0
    token_count: int = 0
    request_bytes: int = 0
    is_reading_body: bool = False
    is_body_read: bool = False  # to its end
    patience: Watching | None = None  # where the route bounds the request's time
    status: int | None = None  # of the answer that has begun to leave
    answer_bytes: int = 0  # of body, that have left
    timings: Timings = field(default_factory=Timings)

    def tokens_served(self, status: int) -> int:
        """The tokens that an answer of *status* is billed: those of a failure are our loss."""
        return self.token_count if status < 400 else 0

    def watch(self) -> None:
        """From here on the request only waits: notice when its client leaves."""
        assert self.patience is not None, "a route that watches its client bounds its time"
        self.patience.watch()

    def header(self, name: bytes) -> str | None:
        """The header's text, or None where it was not sent."""
        value = self.headers.get(name)
        return None if value is None else value.decode("latin-1")

    @property
    def declared_bytes(self) -> int:
        """What `Content-Length` says; 0 where it says nothing that makes sense."""
        declared = self.headers.get(b"content-length", b"")
        return int(declared[:20]) if declared.isdigit() else 0

    @property
    def declares_body(self) -> bool:
        """Whether the head says that a body follows."""
        declared = self.headers.get(b"content-length", b"0")
        return declared != b"0" or b"transfer-encoding" in self.headers

    @property
    def waits_to_send(self) -> bool:
        """Whether the client sends its body only when told to, and has not been."""
        return b"expect" in self.headers and not self.request_bytes and not self.is_reading_body

    @property
    def client_request_id(self) -> str | None:
        """The client's own id, if it is fit for a log: short, printable ASCII."""
        return _sane(self.header(b"x-client-request-id"), CLIENT_REQUEST_ID_CHARS_MAX)

    @property
    def traceparent(self) -> str | None:
        """The client's W3C trace context, if it is fit for a log."""
        return _sane(self.header(b"traceparent"), TRACEPARENT_CHARS_MAX)


def open_visit(
    scope: Scope, receive: Receive, held: Held, *, now_s: float, request_s_max: float
) -> Visit:
    """The visit of a request that has just arrived."""
    headers: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name, value)
    patience_s = _client_patience_s(headers.get(b"x-stainless-read-timeout"))
    return Visit(
        method=known_method(scope["method"]),
        headers=headers,
        query=scope["query_string"],
        receive=receive,
        started_s=now_s,
        deadline_s=now_s + min(request_s_max, patience_s),
        request_id=f"req_{os.urandom(16).hex()}",
        held=held,
    )


def known_method(method: str) -> str:
    """*method*, or "other" where it is none of HTTP's: a client may send any word of any length."""
    return method if method in METHODS else "other"


def _client_patience_s(value: bytes | None) -> float:
    """How long the client says it waits; without end where it says nothing that makes sense."""
    try:
        patience_s = float(value) if value is not None else 0.0
    except ValueError:
        return float("inf")
    return patience_s if patience_s > 0 else float("inf")  # NaN compares false too


def _sane(text: str | None, chars_max: int) -> str | None:
    if text is None or not 0 < len(text) <= chars_max:
        return None
    return text if text.isascii() and text.isprintable() else None
