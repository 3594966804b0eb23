"""An engine over a fake device, for tests of everything between a request and a batch."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

import numpy as np
from tests.hand_clock import HandClock

from trivec.backends.fake import FakeBackend
from trivec.core.events import Event
from trivec.core.types import Batch, ModelCard, Output, Reply, Sequences
from trivec.engine import Engine, Workers
from trivec.engine.request import Request
from trivec.settings import QueueLimits

NO_FLOOR = {"always_requests": 0, "always_tokens": 0}  # the limits hold in a short queue, too
ALL = Output.DENSE | Output.SPARSE | Output.MULTI


class Listener:
    """An `Observer` that remembers."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def observe(self, event: Event) -> None:
        self.events.append(event)

    def heard(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def sequences(*lengths: int, marks: Sequence[int] = (), first: int = 10) -> Sequences:
    """Sequences of *lengths* that all differ; *marks* become the second id of each, if given."""
    ids = []
    for i, length in enumerate(lengths):
        own = np.arange(first + 1_000 * i, first + 1_000 * i + length, dtype=np.int32)
        if marks:
            own[-1] = marks[i]
        ids.append(own)
    return Sequences.pack(ids)


def texts_of(token_count: int) -> Sequences:
    """Texts of up to 500 tokens, *token_count* together."""
    return sequences(*[500] * (token_count // 500), *filter(None, [token_count % 500]))


def unanswered(*lengths: int) -> Request:
    """A request of texts of *lengths*, for tests of a queue alone: its future is never set."""
    return Request(
        sequences=Sequences.pack([np.zeros(length, np.int32) for length in lengths]),
        outputs=Output.DENSE,
        future=cast("asyncio.Future[Reply]", None),
        submitted_s=0.0,
        deadline_s=0.0,
    )


def card(model: str = "fake", outputs: Output = ALL) -> ModelCard:
    return ModelCard(
        id=model,
        token_count_max=8_192,
        vocabulary_size=250_002,
        dimensions=8,
        outputs=outputs,
        late_chunking=True,
        precision="fp32",
        created=0,
        owned_by="tests",
    )


@dataclass
class Rig:
    """`async with Rig(...) as rig` starts the workers, and stops them at the end."""

    backend: FakeBackend = field(default_factory=lambda: FakeBackend(dimensions=8, outputs=ALL))
    limits: QueueLimits = field(default_factory=QueueLimits)
    clock: HandClock = field(default_factory=HandClock)
    listener: Listener = field(default_factory=Listener)
    slot_count: int | None = None
    coalesces: bool = False

    async def __aenter__(self) -> Self:
        self.workers = Workers(
            self.slot_count or self.backend.slot_count,
            coalesces=self.coalesces,
            clock=self.clock,
            observer=self.listener,
        )
        self.engine = self.add("fake", self.backend)
        self.workers.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.backend.gate.set()
        await self.workers.stop(0)

    def add(self, model: str, backend: FakeBackend) -> Engine:
        return Engine(
            card(model),
            tokenizer=None,  # these tests begin with ids
            backend=backend,
            workers=self.workers,
            limits=self.limits,
        )

    def send(
        self, what: Sequences, outputs: Output = Output.DENSE, **options: Any
    ) -> "asyncio.Task[Reply]":
        return asyncio.create_task(self.engine.embed(what, outputs, **options))

    async def occupy(self, length: int = 4) -> "asyncio.Task[Reply]":
        """Hold the one slot: what is sent from now on is queued until the gate is opened."""
        self.backend.gate.clear()
        entered = len(self.backend.ran)
        holder = self.send(sequences(length, first=1))
        await self.entered(entered + 1)
        return holder

    async def run_at(self, tokens_per_s: float) -> None:
        """Run one batch that takes as long as on a device of *tokens_per_s*."""
        holder = await self.occupy(400)
        self.clock.move(400 / tokens_per_s)
        self.backend.gate.set()
        await holder

    async def entered(self, count: int) -> None:
        """Wait until the device has been called *count* times."""
        assert await asyncio.to_thread(self.backend.wait_entered, count)

    async def queued(self, *requests: "asyncio.Task[Reply]") -> None:
        """Let *requests* get as far as the queue."""
        await asyncio.sleep(0)
        assert not any(request.done() and not request.exception() for request in requests)

    def batches(self) -> list[list[int]]:
        """The sequence lengths of each batch that ran, in order."""
        return [lengths(call.batch) for call in self.backend.ran]


def lengths(batch: Batch) -> list[int]:
    return [int(length) for length in np.diff(batch.cu_seqlens)]


def alone(what: Sequences, i: int, outputs: Output = Output.DENSE) -> Any:
    """What the fake device makes of one sequence by itself."""
    ids = what.token_ids[what.cu_seqlens[i] : what.cu_seqlens[i + 1]]
    batch = Batch(ids, np.array([0, len(ids)], np.int32), np.array([outputs], np.uint8))
    return FakeBackend(dimensions=8, outputs=ALL).run(batch, slot=0)
