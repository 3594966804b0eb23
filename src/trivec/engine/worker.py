"""Worker threads: one a slot of the device, each running one batch after another to its replies.

A call that fails is halved until the sequence at fault is alone; a call that hangs, a device that
is gone and a bug in a worker end the process's service, which `Workers.lost` reports.
"""

import asyncio
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from trivec.core.errors import DeviceLost, Draining, EngineFault
from trivec.core.events import BatchRan, RowNotFinite
from trivec.core.ports import Clock, Observer
from trivec.core.types import Batch, Vectors
from trivec.engine.request import BatchItem, halve, nonfinite_rows, pack, slice_rows
from trivec.engine.scheduler import RESTART_S, ModelQueue, ScheduledBatch, Scheduler, batch_cost

CALL_S_MIN = 15.0  # no call is late before this
CALL_RATIO_MAX = 5.0  # nor before this many times its expected duration
EXACT_S_MAX = 60.0  # `run_exact` may first have to load the model again, at full precision
JOIN_S_MAX = 5.0  # how long `stop` waits for a thread that has nothing left to do
STOPPING = "The server is stopping. Please try again."
STOPPED = "The server stopped before this request was through. Please try again."
LOST = "The server lost its device and is restarting. Please try again."


@dataclass(frozen=True, slots=True)
class _Call:
    """A call into a backend, while it runs."""

    slot: int
    model: str
    started_s: float
    late_s: float  # on the clock: when it is taken to hang


class Workers:
    """Slot threads of one device: `start` them once, then `stop`, both on the event loop."""

    def __init__(
        self, slot_count: int, *, spares_core: bool = False, clock: Clock, observer: Observer
    ) -> None:
        """*spares_core*: slots are cores, of which the event loop needs one (decision 0044)."""
        assert slot_count > 0
        self.slot_count = slot_count
        self.scheduler = Scheduler(coalesces=spares_core, clock=clock)
        self._clock = clock
        self._observer = observer
        self._threads: list[threading.Thread] = []
        # By slot: each is written by its thread, and read by the event loop without a lock.
        self._calls: list[_Call | None] = [None] * slot_count
        self._suspect: _Call | None = None  # found late by the last check
        self._loss: str | None = None  # touched on the event loop, as is the event
        self._is_lost = asyncio.Event()

    def start(self) -> None:
        """Start the threads; they wait for work."""
        self._loop = asyncio.get_running_loop()
        for slot in range(self.slot_count):
            name = f"trivec-slot-{slot}"
            thread = threading.Thread(target=self._work, args=(slot,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    async def lost(self) -> str:
        """Wait until the device is lost to this process for good, and say why.

        A call has hung, a backend raised `DeviceLost`, or a worker has a bug. By then every request
        has its error, none is admitted, and the only cure is another process.
        """
        while self._loss is None:
            self.check_for_hang()
            now_s = self._clock.now_s()
            # A call that starts later is late later. A suspect is looked at again in a second.
            left_s = [call.late_s - now_s for call in self._calls if call is not None]
            wait_s = 1.0 if self._suspect else max(0.1, min([CALL_S_MIN, *left_s]))
            try:
                async with asyncio.timeout(wait_s):
                    await self._is_lost.wait()
            except TimeoutError:
                continue
        return self._loss

    def check_for_hang(self) -> None:
        """One check of `lost`: two in a row that find the same call late are a hang.

        One is not enough: when the whole process was stopped for a while, every call looks late
        as it goes on. Checks are on the event loop, at least a second apart.
        """
        now_s = self._clock.now_s()
        calls = [call for call in self._calls if call is not None]
        late = next((call for call in calls if now_s > call.late_s), None)
        if late is not None and late is self._suspect:
            self._lose(
                f"slot {late.slot} has been in one call of {late.model} for "
                f"{now_s - late.started_s:.0f} s, at most {late.late_s - late.started_s:.0f} s were "
                "expected"
            )
        self._suspect = late

    async def stop(self, within_s: float) -> None:
        """Admit nothing, finish what was admitted within *within_s*, fail the rest with `Draining`.

        Then the threads end and the backends are closed. A second call while the first still
        waits shortens it.
        """
        if self._loss is None:
            self.scheduler.stop_admitting(STOPPING)
        admitted = [request.future for queue in self.scheduler.queues for request in queue.open]
        if admitted:
            await asyncio.wait(admitted, timeout=within_s)
        self.scheduler.fail_all(lambda: Draining(STOPPED, retry_after_s=RESTART_S))
        self.scheduler.close()
        await asyncio.to_thread(self._join)

    def _join(self) -> None:
        """Join the threads, then close each backend once; not while a thread may be inside one."""
        for thread in self._threads:
            thread.join(JOIN_S_MAX)
        if not any(thread.is_alive() for thread in self._threads):
            for queue in self.scheduler.remove_queues():
                queue.backend.close()

    def _lose(self, reason: str, *, is_bug: bool = False) -> None:
        """On the event loop: this process cannot use the device any more."""
        if self._loss is None:
            self._loss = reason
            self.scheduler.stop_admitting(LOST)
            self.scheduler.fail_all(
                lambda: EngineFault(reason) if is_bug else Draining(LOST, retry_after_s=RESTART_S)
            )
            self._is_lost.set()

    def _work(self, slot: int) -> None:
        """Body of a slot's thread."""
        reason, is_bug = None, False
        try:
            while (batch := self.scheduler.next_batch()) is not None:
                self._run_batch(batch, slot)
                self.scheduler.finish(batch)
        except DeviceLost as exc:
            reason = f"slot {slot}: {exc}"
        except BaseException as exc:  # an outermost loop: what state this leaves, nobody knows
            where = traceback.extract_tb(exc.__traceback__)[-1]
            reason = f"slot {slot}: its worker failed in {where.name}, line {where.lineno}: {exc!r}"
            is_bug = True
        if reason is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(partial(self._lose, reason, is_bug=is_bug))

    def _run_batch(self, batch: ScheduledBatch, slot: int) -> None:
        """Compute *batch*; halve what fails until the sequence at fault is alone, and fails."""
        queue, todo, call_count = batch.queue, [batch.items], 0
        while todo:
            items = [item for item in todo.pop() if item.request.is_open]
            if not items:
                continue
            packed = pack(items)
            cost = batch_cost(np.diff(packed.cu_seqlens).tolist())
            started_s = self._clock.now_s()
            result = self._call(queue, packed, slot, queue.throughput.upper_bound_s(cost))
            duration_s = self._clock.now_s() - started_s
            call_count += 1
            if isinstance(result, Vectors):
                self.scheduler.measure(queue, packed.token_count, cost, duration_s)
            self._observer.observe(
                BatchRan(
                    model=queue.model,
                    slot=slot,
                    sequences=len(packed),
                    tokens=packed.token_count,
                    tokens_max=queue.budget.tokens_max,
                    duration_s=duration_s,
                    failed=not isinstance(result, Vectors),
                )
            )
            if isinstance(result, Vectors):
                self.scheduler.complete(self._finite_rows(queue, items, result, slot))
                continue
            if isinstance(result, MemoryError):
                self.scheduler.shrink_budget(queue, packed.token_count)
            if len(packed) > 1:
                first, second = halve(items)
                todo += [second, first]
            elif call_count == 1:  # a lone sequence has a second try
                todo.append(items)
            else:
                fault = EngineFault(
                    f"{queue.model}: the device failed on one sequence alone: {result!r}"
                )
                fault.__cause__ = result.with_traceback(None)  # its frames hold the request
                self.scheduler.fail(queue, items[0].request, fault)

    def _call(
        self,
        queue: ModelQueue,
        batch: Batch,
        slot: int,
        expected_s: float,
        *,
        exact: bool = False,
    ) -> Vectors | Exception:
        """One call into the backend, watched for hanging: its rows, or what it raised."""
        run = queue.backend.run_exact if exact else queue.backend.run
        started_s = self._clock.now_s()
        late_s = started_s + max(CALL_S_MIN, CALL_RATIO_MAX * expected_s)
        self._calls[slot] = _Call(slot, queue.model, started_s, late_s)
        try:
            vectors = run(batch, slot=slot)
            assert len(vectors) == len(batch), "the backend lost a row"
        except DeviceLost:
            raise
        except Exception as exc:  # whatever it is, some sequence of the batch has caused it
            return exc
        finally:
            self._calls[slot] = None
        return vectors

    def _finite_rows(
        self, queue: ModelQueue, items: Sequence[BatchItem], vectors: Vectors, slot: int
    ) -> list[tuple[BatchItem, Vectors]]:
        """*vectors* cut by request. A row with NaN or infinity is computed again, alone in fp32.

        A request with a row that is not finite even then fails, and has none here.
        """
        bad = nonfinite_rows(vectors)
        cut: list[tuple[BatchItem, Vectors]] = []
        end = 0
        for item in items:
            begin, end = end, end + len(item.indices)
            if bad.isdisjoint(range(begin, end)):
                cut.append((item, slice_rows(vectors, begin, end)))
                continue
            for row, index in zip(range(begin, end), item.indices, strict=True):
                alone = BatchItem(item.request, [index])
                if row not in bad:
                    cut.append((alone, slice_rows(vectors, row, row + 1)))
                    continue
                again = self._call(queue, pack([alone]), slot, EXACT_S_MAX, exact=True)
                if isinstance(again, Vectors) and not nonfinite_rows(again):
                    self._observer.observe(RowNotFinite(queue.model, recovered=True))
                    cut.append((alone, again))
                    continue
                self._observer.observe(RowNotFinite(queue.model, recovered=False))
                cause = "the vector is not finite even in fp32"
                if isinstance(again, Exception):
                    cause = repr(again)
                self.scheduler.fail(queue, item.request, EngineFault(f"{queue.model}: {cause}"))
                break
        return cut
