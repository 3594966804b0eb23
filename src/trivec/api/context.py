"""Request context: what is known of one HTTP request, from its head to its line in the log.

It holds counts, names and times; never text, vectors or a plain key.
"""

import asyncio
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from starlette.types import Receive, Scope

from trivec.accounts import Accounts, Caller, RateLimitState, Reservation
from trivec.api.body import ByteBudget, MemoryHold, RequestBody
from trivec.api.schemas import shown
from trivec.api.timeout import RequestTimeout
from trivec.core.errors import BusyError, ModelUnknown
from trivec.core.health import Health
from trivec.core.ports import Clock, Embedder, Observer
from trivec.core.types import ModelCard
from trivec.settings import HttpLimits

CONTEXT = "trivec.context"  # where the context lies in the ASGI scope
TOKENS_MIN = 2  # of any text: the special tokens around it
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")


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
    # Large requests to tokenize run one at a time: their threads are those of embeddings.
    large_tokenize: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    large_tokenize_count: int = 0

    def check_admission(self) -> None:
        """Raise `Overloaded` where no model takes even the smallest request there is."""
        refusal: BusyError | None = None
        for embedder in self.embedders.values():
            try:
                embedder.check_admission(TOKENS_MIN)
            except BusyError as busy:
                refusal = busy
            else:
                return
        if refusal is not None:
            raise refusal

    def cards_for(self, caller: Caller) -> list[ModelCard]:
        """The cards of the models that *caller* may use, in the order they were configured."""
        cards = {one.card.id: one.card for one in self.embedders.values()}
        return [card for card in cards.values() if caller.may_use(card.names)]


class RequestContext:
    """One request; lives on the event loop, in one task."""

    def __init__(self, scope: Scope, receive: Receive, app: AppState) -> None:
        """Of a request that has just arrived."""
        self.app = app
        # A client may send any word for a method.
        self.method: str = scope["method"] if scope["method"] in METHODS else "other"
        # By lower-case name; the first of several wins.
        self.headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))
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
        self.timeout = RequestTimeout(receive, request_s_max=request_s_max)
        self.memory = MemoryHold(app.memory)
        self.body = RequestBody(self.headers, receive, app.limits, self.memory, self.timeout)

        self.caller: Caller | None = None
        self.reservation: Reservation | None = None
        self.rate_limits: RateLimitState | None = None
        self.user: str | None = None  # the client's word for its user, on its way to be hashed
        self.error_code: str | None = None
        self.error_message: str | None = None  # where the client is at fault
        self.model: str | None = None  # a served id, never what the client merely claimed
        self.input_count = self.token_count = 0
        self.status: int | None = None  # of the answer that has begun to leave
        self.answer_bytes = 0  # of body, that have left
        self.tokenize_s = self.queue_s = self.compute_s = self.encode_s = 0.0

    def header_for_log(self, name: bytes, *, chars_max: int) -> str | None:
        """The header's text if it is fit for a log: short, printable ASCII."""
        text = self.headers.get(name, b"").decode("latin-1")
        is_fit = 0 < len(text) <= chars_max and text.isascii() and text.isprintable()
        return text if is_fit else None

    @property
    def known_caller(self) -> Caller:
        """The caller, on a route that asks for a key."""
        assert self.caller is not None, "the route is open"
        return self.caller

    def find_embedder(self, name: str) -> Embedder:
        """The model called *name*, case and all. Raises `ModelUnknown`, `ModelDenied`."""
        embedder = self.app.embedders.get(name)
        if embedder is None:
            served = tuple(card.id for card in self.app.cards_for(self.known_caller))
            raise ModelUnknown(model=shown(name), served=served)
        self.model = embedder.card.id
        self.known_caller.require_model(embedder.card.names)
        return embedder
