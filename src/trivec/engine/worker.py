"""Worker threads: one for each slot of the device. Each runs one batch after another.

A batch that fails is halved until the sequence at fault is alone. A call that hangs, a device that
is gone and a bug in a worker end the service of this process, which `Workers.lost` reports.
"""

import asyncio
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from trivec.core.errors import BusyError, DeviceLost, Draining, EngineFault
from trivec.core.events import BatchRan, RowNotFinite
from trivec.core.ports import Clock, Observer
from trivec.core.types import Batch, Int32Array, SparseVector, Vectors
from trivec.engine.request import BatchItem
from trivec.engine.scheduler import RESTART_S, ModelQueue, ScheduledBatch, Scheduler, batch_cost

NO_CHUNKS = np.zeros(1, np.int32)  # of a sequence that was not asked for any
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
        self,
        slot_count: int,
        *,
        coalesces: bool = False,
        clock: Clock,
        observer: Observer,
        call_s_min: float = CALL_S_MIN,
    ) -> None:
        """*coalesces*: slots are cores, of which the event loop needs one (decision 0012).

        *call_s_min*: no call is taken to hang before this.
        """
        assert slot_count > 0
        self.slot_count = slot_count
        self.scheduler = Scheduler(slot_count, coalesces=coalesces, clock=clock)
        self._clock = clock
        self._observer = observer
        self._call_s_min = call_s_min
        self._threads: list[threading.Thread] = []
        # By slot: each is written by its thread, and read by the event loop without a lock.
        self._calls: list[_Call | None] = [None] * slot_count
        self._suspect: _Call | None = None  # found late by the last check

    def start(self) -> None:
        """Start the threads; they wait for work."""
        self._loss: asyncio.Future[str] = asyncio.get_running_loop().create_future()
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
        while True:
            self.check_for_hang()
            now_s = self._clock.now_s()
            # A call that starts later is late later. A suspect is looked at again in a second.
            left_s = [call.late_s - now_s for call in self._calls if call is not None]
            wait_s = 1.0 if self._suspect else max(0.1, min([CALL_S_MIN, *left_s]))
            lost, _ = await asyncio.wait([self._loss], timeout=wait_s)
            if lost:
                return self._loss.result()

    def check_for_hang(self) -> None:
        """One check of `lost`: two in a row that find the same call late mean that it hangs.

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

        Then the threads end and the backends are closed, each once, and only if no thread may be
        inside one. A second call while the first still waits shortens it.
        """
        self.scheduler.stop_admitting(STOPPING)
        admitted = [request.future for queue in self.scheduler.queues for request in queue.open]
        if admitted:
            await asyncio.wait(admitted, timeout=within_s)
        self.scheduler.close(lambda: Draining(STOPPED, retry_after_s=RESTART_S))
        for thread in self._threads:
            await asyncio.to_thread(thread.join, JOIN_S_MAX)
        if not any(thread.is_alive() for thread in self._threads):
            queues, self.scheduler.queues = self.scheduler.queues, ()
            for queue in queues:
                await asyncio.to_thread(queue.backend.close)

    def _lose(self, reason: str, *, is_bug: bool = False) -> None:
        """On the event loop: this process cannot use the device any more."""
        if not self._loss.done():
            self.scheduler.stop_admitting(LOST)
            self.scheduler.close(
                lambda: EngineFault(reason) if is_bug else Draining(LOST, retry_after_s=RESTART_S)
            )
            self._loss.set_result(reason)

    def _work(self, slot: int) -> None:
        """Body of a slot's thread."""
        batch: ScheduledBatch | None = None
        try:
            while batch := self.scheduler.next_batch(finished=batch):
                self._run_batch(batch, slot)
        except DeviceLost as exc:
            lose = partial(self._lose, f"slot {slot}: {exc}")
        except BaseException as exc:  # an outermost loop: the state that a bug leaves is unknown
            where = traceback.extract_tb(exc.__traceback__)[-1]
            reason = f"slot {slot}: its worker failed in {where.name}, line {where.lineno}: {exc!r}"
            lose = partial(self._lose, reason, is_bug=True)
        else:
            return
        loop = self._loss.get_loop()
        if not loop.is_closed():
            loop.call_soon_threadsafe(lose)

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
            result = self._call(
                queue.backend.run, packed, queue.model, slot, cost * queue.throughput.s_per_cost
            )
            call_count += 1
            ran = BatchRan(
                model=queue.model,
                slot=slot,
                sequences=len(packed),
                tokens=packed.token_count,
                tokens_max=queue.budget.tokens_max,
                duration_s=self._clock.now_s() - started_s,
                failed=isinstance(result, Exception),
            )
            self._observer.observe(ran)
            if isinstance(result, Vectors):
                rows = self._finite_rows(queue, items, result, slot)
                self.scheduler.complete(queue, rows, ran, cost)
                continue
            if isinstance(result, BusyError):  # no sequence is at fault
                for request, _ in items:
                    refusal = type(result)(str(result), retry_after_s=result.retry_after_s)
                    self.scheduler.fail(queue, request, refusal)
                continue
            if isinstance(result, MemoryError):
                self.scheduler.shrink_budget(queue, packed.token_count)
            if len(packed) > 1:
                apart = one_by_one(items)
                half = len(apart) // 2
                todo += [apart[half:], apart[:half]]
            elif call_count == 1:  # a lone sequence has a second try
                todo.append(items)
            else:
                reason = f"{queue.model}: the device failed on one sequence alone: {result!r}"
                self.scheduler.fail(queue, items[0].request, EngineFault(reason))

    def _call(
        self, run: Callable[..., Vectors], batch: Batch, model: str, slot: int, expected_s: float
    ) -> Vectors | Exception:
        """One call into a backend, watched for hanging: its rows, or what it raised."""
        started_s = self._clock.now_s()
        late_s = started_s + max(self._call_s_min, CALL_RATIO_MAX * expected_s)
        self._calls[slot] = _Call(slot, model, started_s, late_s)
        try:
            vectors = run(batch, slot=slot)
            assert len(vectors) == len(batch), "the backend lost a row"
        except DeviceLost:
            raise
        except Exception as exc:  # of any kind: a sequence of the batch is at fault
            return exc.with_traceback(None)  # whose frames hold the requests
        finally:
            self._calls[slot] = None
        return vectors

    def _finite_rows(
        self, queue: ModelQueue, items: list[BatchItem], vectors: Vectors, slot: int
    ) -> list[tuple[BatchItem, Vectors]]:
        """*vectors* cut by request. A row with NaN or infinity is computed again, alone in fp32.

        A request with a row that is not finite even then fails.
        """
        bad, end = nonfinite_rows(vectors), 0
        cut: list[tuple[BatchItem, Vectors]] = []
        for item in one_by_one(items) if bad else items:
            begin, end = end, end + len(item.indices)
            if begin not in bad:
                own_rows = {output: rows[begin:end] for output, rows in vectors.rows.items()}
                cut.append((item, Vectors(own_rows)))
            elif item.request.is_open:
                run_exact = queue.backend.run_exact
                result = self._call(run_exact, pack([item]), queue.model, slot, EXACT_S_MAX)
                if isinstance(result, Vectors) and not nonfinite_rows(result):
                    cut.append((item, result))
                    self._observer.observe(RowNotFinite(queue.model, recovered=True))
                    continue
                self._observer.observe(RowNotFinite(queue.model, recovered=False))
                cause = f": {result!r}" if isinstance(result, Exception) else ""
                reason = f"{queue.model}: a vector is not finite even in fp32{cause}"
                self.scheduler.fail(queue, item.request, EngineFault(reason))
        return cut


def pack(items: Sequence[BatchItem]) -> Batch:
    """Lay the sequences of *items* end to end, in their order."""
    outputs = np.array([request.outputs for request, own in items for _ in own], np.uint8)
    if len(items) == 1 and len(items[0].request.order) == 1:  # a lone text: nothing to copy
        alone = items[0].request.sequences
        return Batch(
            alone.token_ids, alone.cu_seqlens, outputs, alone.token_types, alone.skip, alone.chunks
        )
    has_types = any(item.request.sequences.token_types is not None for item in items)
    has_skip = any(item.request.sequences.skip is not None for item in items)
    ids, types = list[Int32Array](), list[Int32Array]()  # [tokens] of each sequence
    skips = list[Int32Array]()  # [sequences] of each request
    chunks = list[Int32Array]()  # [chunks + 1] of each sequence
    for request, indices in items:
        sequences, starts = request.sequences, request.sequences.cu_seqlens
        spans = [slice(starts[i], starts[i + 1]) for i in indices]
        ids += [sequences.token_ids[span] for span in spans]
        if has_types:
            own_types = sequences.token_types
            if own_types is None:
                own_types = np.zeros(sequences.token_count, np.int32)
            types += [own_types[span] for span in spans]
        if has_skip:
            own_skip = sequences.skip
            skips.append(np.zeros(len(spans), np.int32) if own_skip is None else own_skip[indices])
        own_chunks = sequences.chunks
        chunks += [NO_CHUNKS if own_chunks is None else own_chunks[i] for i in indices]
    cu_seqlens = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    token_types = np.concatenate(types) if has_types else None
    skip = np.concatenate(skips) if has_skip else None
    bounds = tuple(chunks) if any(own is not NO_CHUNKS for own in chunks) else None
    return Batch(np.concatenate(ids), cu_seqlens, outputs, token_types, skip, bounds)


def one_by_one(items: Sequence[BatchItem]) -> list[BatchItem]:
    """*items* with one sequence each."""
    return [BatchItem(request, [index]) for request, indices in items for index in indices]


def nonfinite_rows(vectors: Vectors) -> set[int]:
    """Rows that hold NaN or infinity in any of their outputs."""
    found: set[int] = set()
    for rows in vectors.rows.values():
        if isinstance(rows, np.ndarray):
            is_finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
            found.update(np.flatnonzero(~is_finite).tolist())
            continue
        for i, row in enumerate(rows):
            numbers = row.weights if isinstance(row, SparseVector) else row
            if numbers is not None and not np.isfinite(numbers).all():
                found.add(i)
    return found
