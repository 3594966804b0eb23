"""The one place where requests and free slots meet: every lane of a device behind one lock.

The event loop joins and leaves here, slot threads take jobs and bring outcomes. The lock is held
to choose (tens of µs), never while anything is computed. It starts no thread.
"""

import threading
from collections import Counter
from dataclasses import dataclass
from itertools import chain

from trivec.core.errors import Draining, EngineFault
from trivec.core.events import QueueChanged
from trivec.core.ports import Clock, Observer
from trivec.engine.batcher import Share
from trivec.engine.lane import Lane, next_lane
from trivec.engine.runner import Outcome
from trivec.engine.sparing import time_to_spare_s
from trivec.engine.waiter import Answer, Waiter, deliver

RESTART_S = 10.0  # after which a client should find a process that has started again


@dataclass(slots=True)
class Job:
    """A batch in a slot's hands, kept so that a successor can take it over."""

    lane: Lane
    shares: list[Share[Waiter]]
    began_s: float
    expected_s: float
    may_retry: bool = True


class Desk:
    """Lanes, who is idle, and which job each slot has."""

    def __init__(
        self, slot_count: int, *, spares_core: bool, clock: Clock, observer: Observer
    ) -> None:
        """*spares_core*: the last free slot may leave its core to the event loop."""
        self.spares_core = spares_core
        self._clock = clock
        self._observer = observer
        self._changed = threading.Condition()  # its lock guards all below
        self._lanes: tuple[Lane, ...] = ()
        self._jobs: list[Job | None] = [None] * slot_count
        self._idle_count = 0
        self._is_sparing = False  # a slot is free, and leaves what waits to those at work
        self._device_s = 0.0  # `device_s` of the lane served last
        self._refusal: str | None = None  # why nobody may join any more
        self._is_closed = False

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return self._lanes

    def adopt(self, lane: Lane) -> None:
        with self._changed:
            self._lanes = (*self._lanes, lane)

    def refuse(self, reason: str) -> None:
        """Nobody joins from now on; those who try are told *reason*."""
        with self._changed:
            self._refusal = reason

    def close(self) -> None:
        """No more jobs for anybody."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def release(self) -> tuple[Lane, ...]:
        """The lanes, for the one who closes their backends; nobody after that."""
        with self._changed:
            lanes, self._lanes = self._lanes, ()
        return lanes

    def check_admission(self, lane: Lane, token_count: int, tokens_ahead: int) -> None:
        """Raise what `join` would for a request of *token_count*, or of more."""
        with self._changed:
            self._check_open()
            lane.check_admission(token_count, tokens_ahead)

    def join(self, lane: Lane, waiter: Waiter) -> None:
        """Put *waiter* in *lane*'s line. Raises `Overloaded`, or `Draining` when stopping."""
        news = None
        with self._changed:
            self._check_open()
            if not lane.line:  # no credit for the time it had nothing to do
                lane.device_s = max(lane.device_s, self._device_s)
            lane.admit(waiter)
            if self._idle_count or (self._is_sparing and not self._time_to_spare_s()):
                self._changed.notify()
            else:
                news = lane.news()
        self._tell(news)

    def _check_open(self) -> None:
        if self._refusal is not None:
            raise Draining(self._refusal, retry_after_s=RESTART_S)

    def leave(self, lane: Lane, waiters: list[Waiter]) -> None:
        """Free what *waiters* hold; their rows under way are dropped."""
        with self._changed:
            for waiter in waiters:
                lane.dismiss(waiter)

    def leave_late(self, lane: Lane, waiter: Waiter) -> None:
        """Its deadline has come: unless its first batch has begun, *waiter* is answered so."""
        with self._changed:
            if waiter.began_s is None and waiter.is_wanted:
                lane.dismiss(waiter)
                deliver([Answer(waiter, lane.too_late())])

    def take_job(self, slot: int) -> Job | None:
        """Wait for work and take it; None when there will be no more."""
        with self._changed:
            while not self._is_closed:
                lane = next_lane(self._lanes)
                if lane is None:
                    self._idle_count += 1
                    self._changed.wait()
                    self._idle_count -= 1
                    continue
                is_last_free = not self._idle_count and not self._is_sparing
                if is_last_free and (left_s := self._time_to_spare_s()):
                    self._spare(left_s)
                    continue
                job = self._jobs[slot] = self._choose(lane)
                if (self._idle_count or self._is_sparing) and next_lane(self._lanes) is not None:
                    self._changed.notify()
                if job is not None:
                    return job
            return None

    def _spare(self, within_s: float) -> None:
        self._is_sparing = True
        try:
            self._changed.wait(within_s)
        finally:
            self._is_sparing = False

    def _time_to_spare_s(self) -> float:
        """How long the last free slot may leave all that waits; 0 when it should not."""
        ends_s = [job.began_s + job.expected_s for job in self._jobs if job is not None]
        if not self.spares_core or not ends_s:
            return 0.0
        ends_in_s = min(ends_s) - self._clock.now_s()
        return min(
            time_to_spare_s(
                request_count=len(lane.line),
                waiting_s=lane.pace.usual_s(lane.line.token_count),
                row_s=lane.pace.usual_s(lane.budget.tokens_max),
                ends_in_s=ends_in_s,
            )
            for lane in self._lanes
            if lane.line
        )

    def _choose(self, lane: Lane) -> Job | None:
        """The next batch of *lane*; None when all that waited had waited too long."""
        now_s = self._clock.now_s()
        _send(lane, [Answer(waiter, lane.too_late()) for waiter in lane.take_late(now_s)])
        shares = lane.take_shares(now_s, self._idle_count + 1)
        if not shares:
            return None
        expected_s = lane.pace.usual_s(sum(share.token_count for share in shares))
        self._device_s = lane.device_s
        lane.device_s += expected_s
        return Job(lane, shares, now_s, expected_s)

    def settle(self, slot: int, outcome: Outcome[Waiter]) -> None:
        """Take in the *outcome* of the slot's job, and answer whoever it was the last of."""
        job = self._jobs[slot]
        assert job is not None
        lane, now_s = job.lane, self._clock.now_s()
        with self._changed:
            job.may_retry = False  # from here on rows are given out
            lane.device_s += now_s - job.began_s - job.expected_s
            complete = lane.settle(outcome)
            news = lane.news()
        answers = [Answer(waiter, waiter.reply(now_s)) for waiter in complete]
        answers += [Answer(waiter, fault) for waiter, fault in outcome.faults.items()]
        _send(lane, answers)
        self._jobs[slot] = None
        self._tell(news)

    def inherit(self, slot: int) -> Job | None:
        """The job of a thread that died, for its successor; once, and then it is answered."""
        with self._changed:
            job, self._jobs[slot] = self._jobs[slot], None
            if job is None or self._is_closed:
                self._look_for_strays()
                return None
            if job.may_retry:
                job.may_retry = False
                self._jobs[slot] = job
                return job
            fault = EngineFault(f"{job.lane.model}: two threads died of the same batch")
            for share in job.shares:
                job.lane.dismiss(share.request)
            _send(job.lane, [Answer(share.request, fault) for share in job.shares])
            return None

    def _look_for_strays(self) -> None:
        """A thread that died choosing may have had rows in its hands that are in no job yet."""
        for lane in self._lanes:
            if lane.loop is not None and not lane.loop.is_closed():
                lane.loop.call_soon_threadsafe(self._answer_strays, lane)

    def _answer_strays(self, lane: Lane) -> None:
        """On the event loop: a fault for whoever has rows neither in line, in a job, nor done."""
        with self._changed:
            jobs = [job for job in self._jobs if job is not None]
            in_jobs = Counter[Waiter]()
            for share in chain.from_iterable(job.shares for job in jobs):
                in_jobs[share.request] += len(share.indices)
            strays = [
                waiter
                for waiter in lane.open
                if waiter.is_wanted and waiter.taken > waiter.rows_gathered + in_jobs[waiter]
            ]
            for waiter in strays:
                lane.dismiss(waiter)
        fault = EngineFault(f"{lane.model}: a thread died choosing a batch")
        deliver([Answer(waiter, fault) for waiter in strays])

    def dismiss_all(self, message: str) -> None:
        """On the event loop: answer every waiter `Draining`."""
        for lane in self._lanes:
            waiters = list(lane.open)
            self.leave(lane, waiters)
            deliver([Answer(one, Draining(message, retry_after_s=RESTART_S)) for one in waiters])

    def _tell(self, news: QueueChanged | None) -> None:
        if news is not None:
            self._observer.observe(news)


def _send(lane: Lane, answers: list[Answer]) -> None:
    """One wake-up of the event loop for all of *answers*."""
    if answers and lane.loop is not None and not lane.loop.is_closed():
        lane.loop.call_soon_threadsafe(deliver, answers)
