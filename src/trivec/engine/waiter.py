"""Somebody waiting for one request: where its rows gather and its one answer goes."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from trivec.core.errors import ServiceError
from trivec.core.types import Reply
from trivec.engine.line import Request
from trivec.engine.reply import Part, assemble


@dataclass(eq=False, slots=True, kw_only=True)
class Waiter(Request):
    """A request with its future.

    Everything but the future is touched under the workers' lock; the future on its event loop
    only, and nobody but `deliver` and the engine's own timer answers it.
    """

    future: "asyncio.Future[Reply]"
    joined_s: float
    began_s: float | None = None  # its first batch
    parts: list[Part] = field(default_factory=list)
    rows_gathered: int = 0

    def gather(self, part: Part) -> bool:
        """Keep *part*; whether that was the last."""
        self.parts.append(part)
        self.rows_gathered += len(part.indices)
        return self.rows_gathered == len(self.order)

    def reply(self, now_s: float) -> Reply:
        assert self.began_s is not None
        return Reply(
            assemble(self.parts, len(self.order)),
            queue_s=self.began_s - self.joined_s,
            compute_s=now_s - self.began_s,
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The one answer of a waiter."""

    waiter: Waiter
    reply: Reply | ServiceError


def deliver(answers: Sequence[Answer]) -> None:
    """On the event loop: answer those who still wait."""
    for answer in answers:
        future = answer.waiter.future
        if future.done():
            continue
        if isinstance(answer.reply, Reply):
            future.set_result(answer.reply)
        else:
            future.set_exception(answer.reply)
