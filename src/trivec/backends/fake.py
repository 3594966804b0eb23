"""Fake backend: vectors from a hash of the token ids, for tests and for trials without a model.

Like a real one it gives a sequence the same bits whatever lies beside it. Tests can hold its
batches at a gate, poison single tokens, and read which batch ran on which slot.
"""

import hashlib
import threading
import time
from dataclasses import dataclass
from enum import Enum
from math import inf

import numpy as np

from trivec.core.types import Batch, BatchBudget, Float32Array, Output, SparseVector, Vectors

DEFAULT_BUDGET = BatchBudget(tokens_max=512, sequences_max=64)
SPECIAL_IDS = 4  # ids below this never enter a sparse vector, as with XLM-R's <s> <pad> </s> <unk>


class Poison(Enum):
    """The effect of a poisoned token on its sequence."""

    RAISE = "raise"  # its whole batch fails
    NAN = "nan"  # its row is NaN in `run`, sound in `run_exact`
    NAN_ALWAYS = "nan_always"  # its row is NaN in both


@dataclass(frozen=True, slots=True)
class Ran:
    """One call that entered the backend."""

    batch: Batch
    slot: int
    exact: bool


class FakeBackend:
    """Deterministic vectors, with hooks for tests.

    `gate` (an event, set at first) holds every batch inside `run` while it is cleared; `poison`
    maps a token id to its effect; `ran` lists the calls in the order they entered;
    `wait_entered` blocks until so many have; `closed` says whether `close` was called. With
    *tokens_per_s* each slot takes as long as a device of that rate, without using a core.
    """

    def __init__(
        self,
        *,
        dimensions: int,
        outputs: Output = Output.DENSE,
        labels: int = 1,
        slot_count: int = 1,
        budget: BatchBudget = DEFAULT_BUDGET,
        tokens_per_s: float = inf,
    ) -> None:
        self.dimensions = dimensions
        self.outputs = outputs
        self.labels = labels  # of a score
        self.gate = threading.Event()
        self.gate.set()
        self.poison: dict[int, Poison] = {}
        self.ran: list[Ran] = []
        self.closed = False
        self.slot_count = slot_count
        self.budget = budget
        self._tokens_per_s = tokens_per_s
        self._entered = threading.Condition()

    def run(self, batch: Batch, *, slot: int) -> Vectors:
        return self._run(Ran(batch, slot, exact=False))

    def run_exact(self, batch: Batch, *, slot: int) -> Vectors:
        return self._run(Ran(batch, slot, exact=True))

    def close(self) -> None:
        self.closed = True

    def wait_entered(self, count: int, *, within_s: float = 60.0) -> bool:
        """Block until *count* calls have entered `run` or `run_exact`; False when they did not."""
        with self._entered:
            return self._entered.wait_for(lambda: len(self.ran) >= count, timeout=within_s)

    def _run(self, call: Ran) -> Vectors:
        batch = call.batch
        assert 0 <= call.slot < self.slot_count, "a slot that was not offered"
        assert not self.closed, "a batch after close"
        with self._entered:
            self.ran.append(call)
            self._entered.notify_all()
        self.gate.wait()
        time.sleep(batch.token_count / self._tokens_per_s)
        dense = np.empty((len(batch), self.dimensions), np.float32)  # [sequences, dimensions]
        score = np.empty((len(batch), self.labels), np.float32)  # [sequences, labels]
        sparse: list[SparseVector | None] = [None] * len(batch)
        multi: list[Float32Array | None] = [None] * len(batch)
        chunks: list[Float32Array | None] = [None] * len(batch)
        for i, flags in enumerate(batch.outputs.tolist()):
            ids = batch.token_ids[batch.cu_seqlens[i] : batch.cu_seqlens[i + 1]]
            effects = {self.poison[token] for token in ids.tolist() if token in self.poison}
            if Poison.RAISE in effects:
                raise RuntimeError("a poisoned token was in the batch")
            wanted = Output(flags) & self.outputs
            skip = b"" if batch.skip is None or not batch.skip[i] else batch.skip[i].tobytes()
            digest = hashlib.blake2b(ids.astype("<i4").tobytes() + skip, digest_size=8).digest()
            draw = np.random.default_rng(int.from_bytes(digest, "little"))
            row_count = len(ids) if Output.MULTI in wanted else 1
            rows = draw.standard_normal((row_count, self.dimensions), np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            is_nan = Poison.NAN_ALWAYS in effects or (Poison.NAN in effects and not call.exact)
            dense[i] = np.nan if is_nan else rows[0]
            score[i] = np.nan if is_nan else draw.standard_normal(self.labels, np.float32)
            if Output.MULTI in wanted:
                multi[i] = rows[1:]
            if Output.CHUNKS in Output(flags) and batch.chunks is not None:
                size = (len(batch.chunks[i]) - 1, self.dimensions)
                means = draw.standard_normal(size, np.float32)
                chunks[i] = means / np.linalg.norm(means, axis=1, keepdims=True)
            if Output.SPARSE in wanted:
                distinct = np.unique(ids[ids >= SPECIAL_IDS])
                weights = (distinct.astype(np.int64) * 7919 % 1000 + 1) / 1000
                sparse[i] = SparseVector(distinct, weights.astype(np.float32))
        own_dense = dense if Output.DENSE in self.outputs else None
        own_score = score if Output.SCORE in self.outputs else None
        return Vectors.of(own_dense, sparse, multi, own_score, chunks)
