"""The threads that drive a device's slots, shared by all of its models, and their end.

A slot's thread only takes, runs and settles. What to run is the desk's choice; how a batch may
fail is the runner's.
"""

import asyncio
import threading

from trivec.core.errors import DeviceLost
from trivec.core.events import BatchRan, WorkerRestarted
from trivec.core.ports import Clock, Observer
from trivec.engine.desk import Desk, Job
from trivec.engine.heartbeat import Calls, Heartbeat

DEATHS_MAX = 10  # of a slot's threads with no batch finished between them
JOIN_S_MAX = 5.0  # how long `stop` waits for a thread that has nothing left to do
STOPPING = "The server is stopping. Please try again."
STOPPED = "The server stopped before this request was through. Please try again."
LOST = "The server lost its device and is restarting. Please try again."


class Workers:
    """Slot threads of one device: `start` them once, then `stop` on the event loop."""

    def __init__(
        self, slot_count: int, *, spares_core: bool = False, clock: Clock, observer: Observer
    ) -> None:
        """*spares_core*: slots are cores, of which those who ask need one (`sparing`)."""
        assert slot_count > 0
        self.slot_count = slot_count
        self.calls = Calls(slot_count, clock)
        self.desk = Desk(slot_count, spares_core=spares_core, clock=clock, observer=observer)
        self._observer = observer
        self._threads: dict[int, threading.Thread] = {}  # by slot
        self._deaths = [0] * slot_count  # each touched by its slot's thread
        self._loss: str | None = None
        self._is_lost = asyncio.Event()  # touched on the event loop, as is `_loss`

    def start(self) -> None:
        """Start the threads; they wait for work."""
        for slot in range(self.slot_count):
            self._start_thread(slot, None)

    def heartbeat(self) -> tuple[Heartbeat, ...]:
        """Every device call under way; one that `is_late` is a reason for concern."""
        return self.calls.beats()

    async def lost(self) -> str:
        """Wait until the device is lost for good, and say why.

        Either a call has hung or a backend raised `DeviceLost`. By then everyone has been answered
        `Draining`, nobody is admitted, and the only cure is another process.
        """
        while self._loss is None:
            self.look_for_hang()
            try:
                async with asyncio.timeout(self.calls.next_look_s()):
                    await self._is_lost.wait()
            except TimeoutError:
                continue
        return self._loss

    def look_for_hang(self) -> None:
        """One look of `lost`, on the event loop: two in a row that find a late call are a hang."""
        hung = self.calls.hung()
        if hung is not None:
            self._lose(
                f"slot {hung.slot} has been in one call of {hung.model} for "
                f"{hung.running_s:.0f} s, at most {hung.bound_s:.0f} s were expected"
            )

    async def stop(self, within_s: float) -> None:
        """Admit nobody, finish what was accepted within *within_s*, answer the rest `Draining`.

        Then the threads end and the backends are closed. A second call while the first still
        waits shortens it.
        """
        if self._loss is None:
            self.desk.refuse(STOPPING)
        accepted = [waiter.future for lane in self.desk.lanes for waiter in lane.open]
        if accepted:
            await asyncio.wait(accepted, timeout=within_s)
        self.desk.dismiss_all(STOPPED)
        self.desk.close()
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        """Join the threads. A backend is closed only when no thread can be inside it."""
        threads = tuple(self._threads.values())
        for thread in threads:
            thread.join(JOIN_S_MAX)
        if any(thread.is_alive() for thread in threads):
            return
        for lane in self.desk.release():
            lane.backend.close()

    def _lose(self, reason: str) -> None:
        """On the event loop: the device will not work again in this process."""
        if self._loss is None:
            self._loss = reason
            self.desk.refuse(LOST)
            self.desk.dismiss_all(LOST)
            self._is_lost.set()

    def _start_thread(self, slot: int, inherited: Job | None) -> None:
        self._threads[slot] = threading.Thread(
            target=self._drive, args=(slot, inherited), name=f"trivec-slot-{slot}", daemon=True
        )
        self._threads[slot].start()

    def _drive(self, slot: int, inherited: Job | None) -> None:
        """A slot's thread: one batch after another until the desk closes."""
        try:
            if inherited is not None:
                self._work(slot, inherited)
            while (job := self.desk.take_job(slot)) is not None:
                self._work(slot, job)
        except DeviceLost as exc:
            self._report_loss(slot, str(exc))
        except BaseException as exc:  # an outermost loop: the slot outlives whatever this is
            self._replace(slot, exc)

    def _replace(self, slot: int, exc: BaseException) -> None:
        """From a slot's thread, which ends: another takes its place and, once, its batch."""
        self.calls.ended(slot)
        inherited = self.desk.inherit(slot)
        self._deaths[slot] += 1
        if self._deaths[slot] > DEATHS_MAX:  # it would go on for ever: the fault is not the batch's
            self._report_loss(slot, f"{self._deaths[slot]} threads died in a row: {exc!r}")
            return
        try:
            self._observer.observe(WorkerRestarted(slot, reason=repr(exc)))
        finally:
            self._start_thread(slot, inherited)

    def _work(self, slot: int, job: Job) -> None:
        lane = job.lane
        outcome = lane.runner.run(job.shares, slot, lane.pace)
        for run in outcome.runs:
            self._observer.observe(
                BatchRan(
                    model=lane.model,
                    slot=slot,
                    sequences=run.sequences,
                    tokens=run.tokens,
                    tokens_max=lane.budget.tokens_max,
                    duration_s=run.duration_s,
                    failed=run.failed,
                )
            )
        self.desk.settle(slot, outcome)
        self._deaths[slot] = 0

    def _report_loss(self, slot: int, reason: str) -> None:
        """From a slot's thread, which ends: its waiters' event loop hears of it."""
        for loop in {lane.loop for lane in self.desk.lanes if lane.loop is not None}:
            loop.call_soon_threadsafe(self._lose, f"slot {slot}: {reason}")
