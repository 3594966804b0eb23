"""A whole HTTP room around a model that needs no files: for every suite of `tests/api`.

`StandIn` is an `Embedder` whose token ids are bytes and whose vectors are `FakeBackend`'s, with
hooks to hold, break and watch it. `House` puts real accounts, in memory, and the real app around it.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Self, cast

import httpx
import numpy as np
from starlette.types import ASGIApp
from tests.hand_clock import HandClock, HandLoop
from tests.support.memory_store import MemoryStore

from trivec.accounts import Accounts, KeyPlan, RateLimits, Scope
from trivec.accounts.stores.engines import memory_engines
from trivec.accounts.stores.sql import SqlStore
from trivec.api import AppState, ByteBudget, answer_line, build_app
from trivec.api.app import FACES
from trivec.api.openapi import Operation
from trivec.backends.fake import FakeBackend
from trivec.core.errors import FieldInvalid, Overloaded, TextTooLong, TokenIdUnknown
from trivec.core.events import Event, RequestServed
from trivec.core.health import Health
from trivec.core.ports import Embedder, Texts, TokenLists
from trivec.core.types import (
    Batch,
    Int32Array,
    LongText,
    ModelCard,
    Output,
    Reply,
    Sequences,
    TextToken,
    Truncated,
)
from trivec.jobs.batches import Batches, JobRunner
from trivec.jobs.files import Files
from trivec.jobs.records import JobStore
from trivec.server.granian_server import GranianServer
from trivec.server.machine import listen
from trivec.settings import BatchLimits, HttpLimits

MODEL = "baai/bge-m3"
ALIAS = "BAAI/bge-m3"
PLAIN_MODEL = "all-minilm-l6-v2"  # dense only, dimensions selectable: the opposite in everything
RERANKER = "baai/bge-reranker-v2-m3"  # scores only
CLASSIFIER = "emotions"  # scores of several labels
OPENING, CLOSING = 0, 2
FIRST_BYTE_ID = 4
READY = Health("ready", alive=True, ready=True, reason="ok")

ALL_OUTPUTS = Output.DENSE | Output.SPARSE | Output.MULTI
CARD = ModelCard(
    id=MODEL,
    token_count_max=64,
    vocabulary_size=1000,
    dimensions=8,
    outputs=ALL_OUTPUTS,
    precision="fp32",
    created=1_700_000_000,
    owned_by="BAAI",
    aliases=(ALIAS,),
)
PLAIN_CARD = replace(
    CARD, id=PLAIN_MODEL, outputs=Output.DENSE, dimensions_selectable=True, aliases=()
)
RERANKER_CARD = replace(CARD, id=RERANKER, outputs=Output.SCORE, labels=1, aliases=())
CLASSIFIER_CARD = replace(RERANKER_CARD, id=CLASSIFIER, labels=3)


def metrics_page() -> bytes:
    return b"trivec_up 1\n"


class StandIn:
    """An `Embedder`: one token a byte of UTF-8, between two special ones."""

    def __init__(self, card: ModelCard = CARD) -> None:
        self.card = card
        self.fault: BaseException | None = None  # raised by `embed`
        self.room_tokens = float("inf")  # a request of more is refused
        self.gate = threading.Event()  # holds `embed` while it is cleared
        self.gate.set()
        self.entered = threading.Event()
        self.left = threading.Event()  # an `embed` was cancelled
        self.embedded: list[tuple[Sequences, Output, float | None]] = []
        self._backend = FakeBackend(
            dimensions=card.dimensions, outputs=card.outputs, labels=max(1, card.labels)
        )

    @property
    def tokenizer(self) -> Self:
        """Itself, so that a test may replace a method of it."""
        return self

    async def tokenize(
        self,
        inputs: Texts | TokenLists,
        *,
        long_text: LongText,
        trusted: bool = False,
        prompt: str = "",
        token_count_max: int | None = None,
    ) -> Sequences:
        ids = [self._ids(prompt + one if isinstance(one, str) else one) for one in inputs]
        truncated: dict[int, Truncated] = {}
        count_max = min(token_count_max or self.card.token_count_max, self.card.token_count_max)
        for i, one in enumerate(ids):
            if len(one) <= count_max or long_text is LongText.KEEP:
                continue
            if long_text is LongText.REFUSE:
                raise TextTooLong(token_count=len(one), token_count_max=count_max, index=i)
            if count_max <= 2 + len(prompt):
                at_fault = "prompt" if count_max == self.card.token_count_max else "token_count_max"
                raise FieldInvalid("None is left for the text itself.", param=at_fault)
            truncated[i] = Truncated(len(one), count_max)
            kept = one[1:-1]
            room = count_max - 2
            kept = kept[-room:] if long_text is LongText.CUT_START else kept[:room]
            ids[i] = [OPENING, *kept, CLOSING]
        return Sequences.pack(ids, truncated)

    async def tokenize_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        long_text: LongText,
        document_tokens_max: int | None = None,
    ) -> Sequences:
        ids, truncated = [], {}
        for i, (query, document) in enumerate(pairs):
            before, after = self._ids(query), self._ids(document)[1:]
            count, count_max = len(before) + len(after), self.card.token_count_max
            if document_tokens_max is not None:
                count_max = min(count_max, len(before) + document_tokens_max - 1)
            if count > count_max:
                room = count_max - len(before) - 1
                if long_text is LongText.REFUSE or room < 1:
                    index = None if room < 1 else i
                    raise TextTooLong(token_count=count, token_count_max=count_max, index=index)
                truncated[i] = Truncated(count, count_max)
                after = [*after[:room], CLOSING]
            ids.append([*before, *after])
        return Sequences.pack(ids, truncated)

    def _ids(self, one: "str | Int32Array") -> list[int]:
        if isinstance(one, str):
            return [OPENING, *(byte + FIRST_BYTE_ID for byte in one.encode()), CLOSING]
        ids = cast("list[int]", one.tolist())
        is_whole = len(ids) > 1 and ids[0] == OPENING and ids[-1] == CLOSING
        return ids if is_whole else [OPENING, *ids, CLOSING]

    async def embed(
        self,
        sequences: Sequences,
        outputs: Output,
        *,
        timeout_s: float | None = None,
        continues: bool = False,
        background: bool = False,
    ) -> Reply:
        if not (continues or background):
            self.check_admission(sequences.token_count)
        self.embedded.append((sequences, outputs, timeout_s))
        self.entered.set()
        try:
            if not self.gate.is_set():  # it belongs to another thread
                await asyncio.to_thread(self.gate.wait)
        except asyncio.CancelledError:
            self.left.set()
            raise
        if self.fault is not None:
            raise self.fault
        flags = np.full(len(sequences), int(outputs), np.uint8)
        batch = Batch(sequences.token_ids, sequences.cu_seqlens, flags, chunks=sequences.chunks)
        return Reply(self._backend.run(batch, slot=0), queue_s=0.002, compute_s=0.003)

    def check_admission(self, token_count: int) -> None:
        if token_count > self.room_tokens:
            raise Overloaded("The queue is full.", retry_after_s=1.5)

    def token_strings(self, token_ids: Int32Array) -> list[str]:
        return [f"‹{token_id}›" for token_id in token_ids.tolist()]

    async def tokenize_chunks(
        self, texts: Texts, *, prompt: str = "", chunk_size: int | None = None
    ) -> Sequences:
        """Of ASCII, where a character is a token."""
        given = ["".join(texts)] if chunk_size is None else texts
        whole = await self.tokenize(given, long_text=LongText.REFUSE, prompt=prompt)
        lead = 1 + len(prompt)
        if chunk_size is None:
            bounds = [np.cumsum([lead, *map(len, texts)], dtype=np.int32)]
        else:
            ends = [lead + len(text) for text in texts]
            bounds = [np.array([*range(lead, end, chunk_size), end], np.int32) for end in ends]
        return replace(whole, chunks=tuple(bounds))

    async def find_tokens(self, texts: Texts, *, special_tokens: bool) -> list[list[TextToken]]:
        found = []
        for text in texts:
            own = [
                TextToken(ord(c) + FIRST_BYTE_ID, c, False, i, i + 1) for i, c in enumerate(text)
            ]
            opening, closing = (TextToken(i, f"‹{i}›", True, 0, 0) for i in (OPENING, CLOSING))
            found.append([opening, *own, closing] if special_tokens else own)
        return found

    async def decode(self, lists: TokenLists, *, special_tokens: bool) -> list[str]:
        size = self.card.vocabulary_size
        for i, ids in enumerate(lists):
            if ids.max() >= size:
                param = f"input[{i}]"
                raise TokenIdUnknown(token_id=int(ids.max()), vocabulary_size=size, param=param)
        return [
            "".join(
                chr(token_id - FIRST_BYTE_ID) if token_id >= FIRST_BYTE_ID else f"‹{token_id}›"
                for token_id in ids.tolist()
                if special_tokens or token_id >= FIRST_BYTE_ID
            )
            for ids in lists
        ]


class Heard:
    """An `Observer` that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._more = threading.Condition()

    def observe(self, event: Event) -> None:
        with self._more:
            self.events.append(event)
            self._more.notify_all()

    def wait(self, count: int, *, within_s: float) -> bool:
        """Block until *count* requests were served; False when they were not."""
        with self._more:
            return self._more.wait_for(lambda: len(self.served) >= count, timeout=within_s)

    @property
    def served(self) -> list[RequestServed]:
        return [event for event in self.events if isinstance(event, RequestServed)]


@dataclass
class House:
    """The app and all that tests may look at behind it."""

    model: StandIn = field(default_factory=StandIn)
    plain_model: StandIn = field(default_factory=lambda: StandIn(PLAIN_CARD))
    reranker: StandIn = field(default_factory=lambda: StandIn(RERANKER_CARD))
    classifier: StandIn = field(default_factory=lambda: StandIn(CLASSIFIER_CARD))
    # A suite sends thousands of bad requests with one key.
    limits: HttpLimits = field(
        default_factory=lambda: HttpLimits(unpaid_requests_per_minute=1_000_000)
    )
    store: MemoryStore = field(default_factory=MemoryStore)
    heard: Heard = field(default_factory=Heard)
    health: Health = READY
    no_auth: bool = False
    has_rerankers: bool = False
    faces: tuple[str, ...] = tuple(FACES)
    is_loading: bool = False
    memory: ByteBudget = field(default_factory=ByteBudget)
    clock: HandClock = field(default_factory=HandClock)
    files_url: str = "memory://files"  # for files of batches: any URL of fsspec
    batch_limits: BatchLimits = field(default_factory=BatchLimits)

    def __post_init__(self) -> None:
        self.accounts = Accounts(
            self.store, clock=self.clock, secret=b"s" * 32, no_auth=self.no_auth
        )
        self.accounts.start()
        store = SqlStore(memory_engines(), upgrades_itself=True)
        jobs = JobStore(store, self.batch_limits, clock=self.clock)
        self.batches = Batches(jobs, Files(jobs, self.batch_limits, url=self.files_url))
        self.key = self.new_key("all", scopes=frozenset(Scope))
        self.serve()

    def serve(
        self,
        *,
        metrics: Callable[[], bytes] | None = metrics_page,
        metrics_open: bool = False,
        operations: Sequence[Operation] = (),
        pages: Sequence[Operation] = (),
    ) -> None:
        """Build the app anew."""
        self.app: ASGIApp = build_app(
            embedders={} if self.is_loading else self.embedders(),
            accounts=self.accounts,
            observer=self.heard,
            clock=self.clock,
            limits=self.limits,
            health=lambda: self.health,
            metrics=metrics,
            metrics_open=metrics_open,
            memory=self.memory,
            batches=self.batches,
            faces=self.faces,
            operations=operations,
            pages=pages,
        )

    def embedders(self) -> Mapping[str, Embedder]:
        served = {MODEL: self.model, ALIAS: self.model, PLAIN_MODEL: self.plain_model}
        if self.has_rerankers:
            served |= {RERANKER: self.reranker, CLASSIFIER: self.classifier}
        return served

    def batch_runner(self) -> JobRunner:
        """A server's part in the work on batches."""
        served = self.embedders()
        app = AppState(
            served,
            self.accounts,
            self.heard,
            self.clock,
            self.limits,
            health=lambda: READY,
            metrics=None,
            memory=ByteBudget(),
        )
        return JobRunner(
            self.batches,
            answer=partial(answer_line, app),
            names={name: one.card.names for name, one in served.items()},
            accounts=self.accounts,
            line_bytes_max=self.limits.body_bytes_max,
            clock=self.clock,
            observer=self.heard,
        )

    def new_key(
        self,
        name: str,
        *,
        scopes: frozenset[Scope] = frozenset({Scope.EMBED}),
        models: frozenset[str] | None = None,
        allowance: RateLimits = RateLimits(),  # noqa: B008 # frozen
        truncate: str | None = None,
    ) -> str:
        """A plain key."""
        plan = KeyPlan(name, scopes, models, allowance, truncate=truncate)
        return asyncio.run(self.accounts.create_key(plan)).plain

    async def new_key_async(self, name: str, allowance: RateLimits) -> str:
        """A plain key, made on the running loop."""
        return (await self.accounts.create_key(KeyPlan(name, limits=allowance))).plain

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        """A client that speaks to the app without a socket, with the key that may do all."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=True),
            base_url="http://house/v1",
            headers={"authorization": f"Bearer {key or self.key}"},
        )

    def open_gates(self) -> None:
        self.model.gate.set()
        self.plain_model.gate.set()
        self.reranker.gate.set()
        self.classifier.gate.set()

    def close(self) -> None:
        self.accounts.stop()
        self.batches.store.close()

    def let_pass(self, seconds: float) -> None:
        """Bring near what the listening app has timed, without waiting for it."""
        self._loop.call_soon_threadsafe(self._loop.move, seconds)

    @contextmanager
    def listening(self) -> Iterator[str]:
        """Serve the app by granian on a free port of the loopback; gives `http://host:port`."""
        listener = listen("127.0.0.1", 0)
        host, port = listener.getsockname()[:2]
        carrier: list[GranianServer] = []
        loop = HandLoop()
        up = threading.Event()

        async def serve() -> None:
            carrier.append(GranianServer(self.app, listener, limits=self.limits, tls=None))
            up.set()
            await carrier[0].serve()

        def run() -> None:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                runner.run(serve())

        thread = threading.Thread(target=run, name="granian")
        thread.start()
        self._loop = loop
        try:
            assert up.wait(60), "granian did not start"
            yield f"http://{host}:{port}"
        finally:
            self.open_gates()
            loop.call_soon_threadsafe(carrier[0].stop)
            thread.join(60)
            assert not thread.is_alive(), "granian did not stop"
