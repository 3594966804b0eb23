"""One model's place on a device: its line, its budget and its pace.

State for `Workers`, and touched under their lock; it starts no thread and answers nobody.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trivec.core.errors import DeadlineExceeded, Overloaded
from trivec.core.events import QueueChanged
from trivec.core.ports import Backend
from trivec.core.retry import spread_retry_s
from trivec.core.types import BatchBudget
from trivec.engine.admission import LineLoad, refusal
from trivec.engine.batcher import CANDIDATES_MAX, Share, take_batch
from trivec.engine.line import Line
from trivec.engine.pace import Pace
from trivec.engine.runner import Outcome, Runner
from trivec.engine.waiter import Waiter
from trivec.settings import QueueLimits

# Free slots share what waits, but not into rows too short to be worth their overhead.
SPLIT_MAX = 4


@dataclass(eq=False, slots=True)
class Lane:
    """Everything the workers know of one model."""

    model: str
    backend: Backend
    bound: QueueLimits
    runner: Runner
    pace: Pace
    budget: BatchBudget
    loop: asyncio.AbstractEventLoop | None = None  # where its waiters wait; known at the first
    line: Line[Waiter] = field(default_factory=Line)
    open: set[Waiter] = field(default_factory=set)  # unanswered; touched on the loop alone
    device_s: float = 0.0  # spent on it, by which lanes share the slots
    requests_told: int = 0  # what the last QueueChanged said
    jitter: Callable[[], float] = random.random  # in [0, 1), for Retry-After

    def admit(self, waiter: Waiter) -> None:
        """Put *waiter* in line, or raise `Overloaded`."""
        self.check_admission(waiter.tokens_left)
        self.line.join(waiter)

    def check_admission(self, token_count: int, tokens_ahead: int = 0) -> None:
        """Raise `Overloaded` unless a request of *token_count* may join after *tokens_ahead*.

        What is refused to a request is refused to every larger one.
        """
        load = self._load(token_count, tokens_ahead)
        full = refusal(token_count, load, self.bound)
        if full is not None:
            raise Overloaded(
                f"The queue for {self.model} is full: {load.requests_waiting} requests wait, and "
                f"{load.tokens_waiting} tokens with those on their way; {full.reason}. "
                "Please try again later.",
                retry_after_s=spread_retry_s(full.room_in_s, self.jitter()),
            )

    def _load(self, token_count: int, tokens_ahead: int) -> LineLoad:
        waiting = self.line.token_count
        tokens_per_s = self.pace.tokens_per_s
        # The sum over requests never exceeds the line, so a short line need not be summed.
        is_short = waiting + tokens_ahead <= self.bound.wait_s_max * tokens_per_s
        before = waiting if is_short else self.line.tokens_before(token_count)
        return LineLoad(len(self.line), waiting + tokens_ahead, before + tokens_ahead, tokens_per_s)

    def take_late(self, now_s: float) -> list[Waiter]:
        """Remove whoever waited too long, among all that the next batch could be made of."""
        fresh = list(zip(self.line.fresh, range(CANDIDATES_MAX), strict=False))
        late = [waiter for waiter, _ in fresh if now_s >= waiter.deadline_s]
        for waiter in late:
            self.dismiss(waiter)
        return late

    def too_late(self) -> DeadlineExceeded:
        """For a waiter whose first batch did not begin in time; come back when the line is done."""
        return DeadlineExceeded(
            f"The request waited too long for {self.model}. Please try again later.",
            retry_after_s=spread_retry_s(
                self.line.token_count / self.pace.tokens_per_s, self.jitter()
            ),
        )

    def take_shares(self, now_s: float, free_slots: int) -> list[Share[Waiter]]:
        """The next batch for one of *free_slots*, which share what waits if it is little."""
        shares = take_batch(self.line, self._budget_for(free_slots))
        for share in shares:
            if share.request.began_s is None:
                share.request.began_s = now_s
        return shares

    def _budget_for(self, free_slots: int) -> BatchBudget:
        whole = self.budget.tokens_max
        fair = -(-self.line.token_count // free_slots)
        if fair >= whole:
            return self.budget
        return BatchBudget(max(fair, -(-whole // SPLIT_MAX)), self.budget.sequences_max)

    def dismiss(self, waiter: Waiter) -> None:
        """*waiter* wants nothing more: its tokens are free at once, rows under way are dropped."""
        waiter.is_wanted = False
        self.line.leave(waiter)
        waiter.parts.clear()

    def settle(self, outcome: Outcome[Waiter]) -> list[Waiter]:
        """Take in *outcome*; those who have all their rows now."""
        for run in outcome.runs:
            if not run.failed:
                fill = min(1.0, run.tokens / self.budget.tokens_max)
                self.pace = self.pace.after(
                    tokens=run.tokens, work=run.work, duration_s=run.duration_s, fill=fill
                )
        if outcome.starved_tokens is not None:
            self._shrink_budget(outcome.starved_tokens)
        for waiter in outcome.faults:
            self.dismiss(waiter)
        complete = []
        for waiter, part in outcome.parts:
            if waiter.is_wanted and waiter.gather(part):
                waiter.is_wanted = False
                complete.append(waiter)
        return complete

    def _shrink_budget(self, starved_tokens: int) -> None:
        """Remember that *starved_tokens* at once were too many; a row keeps a useful size."""
        floor = -(-self.backend.budget.tokens_max // 8)
        tokens_max = max(floor, min(self.budget.tokens_max, starved_tokens // 2))
        self.budget = BatchBudget(tokens_max, self.budget.sequences_max)

    def news(self) -> QueueChanged | None:
        """The line's depth, if it differs from what was last told."""
        if len(self.line) == self.requests_told:
            return None
        self.requests_told = len(self.line)
        return QueueChanged(self.model, len(self.line), self.line.token_count)


def next_lane(lanes: Sequence[Lane]) -> Lane | None:
    """Of the lanes with work, the one the device has spent least time on."""
    waiting = [lane for lane in lanes if lane.line]
    return min(waiting, key=lambda lane: lane.device_s, default=None)
