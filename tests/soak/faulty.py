"""A device that misbehaves on certain words: any backend, with faults for single token ids.

It knows how a device can fail; what the engine makes of it is for the forms to judge.
"""

import threading
from collections.abc import Mapping
from enum import Enum, auto

import numpy as np

from trivec.core.errors import DeviceLost
from trivec.core.ports import Backend
from trivec.core.types import Batch, BatchBudget, Output, Vectors


class Fault(Enum):
    """What happens to a batch that holds the word."""

    RAISE = auto()  # an exception
    MEMORY = auto()  # MemoryError
    NAN = auto()  # the word's row is NaN; `run_exact` is sound
    NAN_FOR_GOOD = auto()  # in `run_exact` as well
    EXACT_RAISES = auto()  # NaN, and `run_exact` raises
    DIE = auto()  # what ends a thread
    HANG = auto()  # never comes back
    LOSE = auto()  # the device is gone


UNSOUND = (Fault.NAN, Fault.NAN_FOR_GOOD, Fault.EXACT_RAISES)


class Injected(Exception):
    """A fault on purpose."""


class Killed(BaseException):
    """One that no handler for exceptions catches."""


class Faulty:
    """*inner*, with *faults* by token id. `gate` holds every batch while it is cleared."""

    def __init__(self, inner: Backend, faults: Mapping[int, Fault]) -> None:
        self.inner = inner
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self._faults = faults

    @property
    def slot_count(self) -> int:
        return self.inner.slot_count

    @property
    def budget(self) -> BatchBudget:
        return self.inner.budget

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        self.entered.set()
        self.gate.wait()
        self._misbehave(batch)
        return self._spoil(batch, self.inner.run(batch, slot=slot), UNSOUND)

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        if Fault.EXACT_RAISES in self._faults_of(batch):
            raise Injected
        return self._spoil(batch, self.inner.run_exact(batch, slot=slot), (Fault.NAN_FOR_GOOD,))

    def close(self) -> None:
        self.inner.close()

    def _faults_of(self, batch: Batch) -> set[Fault]:
        return {self._faults[one] for one in self._faults if one in batch.token_ids}

    def _misbehave(self, batch: Batch) -> None:
        faults = self._faults_of(batch)
        if Fault.HANG in faults:
            threading.Event().wait()
        if Fault.DIE in faults:
            raise Killed
        if Fault.LOSE in faults:
            raise DeviceLost("on purpose")
        if Fault.MEMORY in faults:
            raise MemoryError
        if Fault.RAISE in faults:
            raise Injected

    def _spoil(self, batch: Batch, vectors: Vectors, unsound: tuple[Fault, ...]) -> Vectors:
        dense = vectors.dense  # [sequences, dimensions]
        for row in range(len(batch)):
            ids = batch.token_ids[batch.cu_seqlens[row] : batch.cu_seqlens[row + 1]]
            if any(one in ids for one, fault in self._faults.items() if fault in unsound):
                dense = dense.copy() if dense is vectors.dense else dense
                dense[row, 0] = np.nan
        return Vectors({**vectors.rows, Output.DENSE: dense})
