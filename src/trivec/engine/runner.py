"""One batch on the device, and what to do when it fails: only the item at fault pays.

Called from a slot's thread, which it may block for as long as the device takes. It knows requests
as lists of sequences; not who waits for them, nor what runs next.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic

import numpy as np

from trivec.core.errors import DeviceLost, EngineFault
from trivec.core.events import RowNotFinite
from trivec.core.ports import Backend, Clock, Observer
from trivec.core.types import Batch, Vectors
from trivec.engine.batcher import Share
from trivec.engine.heartbeat import Calls
from trivec.engine.line import R
from trivec.engine.pace import Pace, work
from trivec.engine.reply import Part, slice_rows, unsound_rows

# `run_exact` may have to load the model a second time, at full precision, before it begins.
EXACT_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Run:
    """One call into the device, and how it went."""

    sequences: int
    tokens: int
    work: float
    duration_s: float
    failed: bool


@dataclass(slots=True)
class Outcome(Generic[R]):
    """What became of a batch: every row is in a part, or its request in a fault."""

    parts: list[tuple[R, Part]] = field(default_factory=list)
    faults: dict[R, EngineFault] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    starved_tokens: int | None = None  # the smallest batch that memory did not suffice for

    def starve(self, tokens: int) -> None:
        self.starved_tokens = min(tokens, self.starved_tokens or tokens)


def pack(shares: Sequence[Share[R]]) -> Batch:
    """The batch that *shares* make, in their order."""
    if len(shares) == 1 and len(shares[0].request.order) == 1:  # a lone text: nothing to copy
        alone = shares[0].request
        outputs = np.array([alone.outputs], np.uint8)
        return Batch(alone.sequences.token_ids, alone.sequences.cu_seqlens, outputs)
    pieces = []
    flags: list[int] = []
    for share in shares:
        token_ids, starts = share.request.sequences.token_ids, share.request.sequences.cu_seqlens
        pieces += [token_ids[starts[i] : starts[i + 1]] for i in share.indices]
        flags += [share.request.outputs] * len(share.indices)
    starts = np.zeros(len(pieces) + 1, np.int32)
    np.cumsum(list(map(len, pieces)), out=starts[1:])
    return Batch(np.concatenate(pieces), starts, np.array(flags, np.uint8))


class Runner:
    """Runs batches of one model."""

    def __init__(
        self, model: str, backend: Backend, *, calls: Calls, clock: Clock, observer: Observer
    ) -> None:
        self._model = model
        self._backend = backend
        self._calls = calls
        self._clock = clock
        self._observer = observer

    def run(self, shares: Sequence[Share[R]], slot: int, pace: Pace) -> Outcome[R]:
        """Compute *shares*; on an exception halve them until the one at fault is alone."""
        outcome: Outcome[R] = Outcome()
        todo = [shares]
        while todo:
            wanted = [
                share
                for share in todo.pop()
                if share.request.is_wanted and share.request not in outcome.faults
            ]
            if not wanted:
                continue
            batch = pack(wanted)
            try:
                vectors = self._call(batch, slot, pace, outcome)
            except DeviceLost:
                raise
            # The outermost loop as far as the device goes: whatever it raises belongs to an item.
            except Exception as exc:
                if isinstance(exc, MemoryError):
                    outcome.starve(batch.token_count)
                if len(batch) > 1:
                    todo += _halves(wanted)
                elif len(outcome.runs) == 1:  # everything has a second chance
                    todo.append(wanted)
                else:
                    outcome.faults[wanted[0].request] = _fault(self._model, exc)
            else:
                self._keep_sound(wanted, vectors, slot, outcome)
        return outcome

    def _call(self, batch: Batch, slot: int, pace: Pace, outcome: Outcome[R]) -> Vectors:
        cost = work(np.diff(batch.cu_seqlens).tolist())
        self._calls.began(slot, self._model, pace.expected_s(cost))
        began_s = self._clock.now_s()
        failed = True
        try:
            vectors = self._backend.run(batch, slot=slot)
            assert len(vectors) == len(batch), "the backend lost a row"
            failed = False
        finally:
            self._calls.ended(slot)
            duration_s = self._clock.now_s() - began_s
            outcome.runs.append(Run(len(batch), batch.token_count, cost, duration_s, failed))
        return vectors

    def _call_exact(self, batch: Batch, slot: int) -> Vectors:
        self._calls.began(slot, self._model, EXACT_S_MAX)
        try:
            return self._backend.run_exact(batch, slot=slot)
        finally:
            self._calls.ended(slot)

    def _keep_sound(
        self, shares: Sequence[Share[R]], vectors: Vectors, slot: int, outcome: Outcome[R]
    ) -> None:
        """Rows into parts; one that holds NaN or infinity is computed again, alone and exactly."""
        unsound = set(unsound_rows(vectors))
        end = 0
        for share in shares:
            begin, end = end, end + len(share.indices)
            if unsound.isdisjoint(range(begin, end)):
                part = Part(share.indices, slice_rows(vectors, begin, end))
                outcome.parts.append((share.request, part))
                continue
            for row, i in zip(range(begin, end), share.indices, strict=True):
                alone = _shares([(share.request, i)])[0]
                if row not in unsound:
                    part = Part([i], slice_rows(vectors, row, row + 1))
                    outcome.parts.append((share.request, part))
                elif not self._recover(alone, slot, outcome):
                    break

    def _recover(self, alone: Share[R], slot: int, outcome: Outcome[R]) -> bool:
        try:
            vectors = self._call_exact(pack([alone]), slot)
            fault = "the vector is not finite even in fp32" if unsound_rows(vectors) else None
        except DeviceLost:
            raise
        except Exception as exc:  # as in `run`
            fault = repr(exc)
        self._observer.observe(RowNotFinite(self._model, recovered=fault is None))
        if fault is None:
            outcome.parts.append((alone.request, Part(alone.indices, vectors)))
        else:
            outcome.faults[alone.request] = EngineFault(f"{self._model}: {fault}")
        return fault is None


def _fault(model: str, exc: Exception) -> EngineFault:
    fault = EngineFault(f"{model}: the device failed on one sequence alone: {exc!r}")
    fault.__cause__ = exc.with_traceback(None)  # its frames hold the outcome that the fault is in
    return fault


def _halves(shares: Sequence[Share[R]]) -> list[list[Share[R]]]:
    """*shares* as two of about equal row counts, the second first: the caller takes from the end."""
    rows = [(share.request, i) for share in shares for i in share.indices]
    middle = len(rows) // 2
    return [_shares(rows[middle:]), _shares(rows[:middle])]


def _shares(rows: Sequence[tuple[R, int]]) -> list[Share[R]]:
    indices: dict[R, list[int]] = {}
    for request, i in rows:
        indices.setdefault(request, []).append(i)
    return [
        Share(request, own, int(request.sequences.lengths()[own].sum()))
        for request, own in indices.items()
    ]
