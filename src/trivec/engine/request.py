"""Requests: their sequences on the way into batches, and their rows on the way back.

Plain state and pure functions. A request is touched under the scheduler's lock, but for its future,
which belongs to its event loop.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trivec.core.types import (
    Batch,
    Float32Array,
    Int32Array,
    Output,
    Reply,
    Row,
    Rows,
    Sequences,
    SparseVector,
    Vectors,
)


@dataclass(eq=False, slots=True, kw_only=True)
class Request:
    """One client's list of sequences, and the future of its reply.

    Sequences leave longest first: neighbours in that order are of similar length, so a batch of
    them pads little, and the short ones that come last fill the ends of batches.
    """

    sequences: Sequences
    outputs: Output
    future: "asyncio.Future[Reply]"
    submitted_s: float  # on the engine's clock, as is the deadline
    deadline_s: float  # by which its first batch must have started
    order: list[int] = field(init=False)  # sequence indices, longest first
    lengths: list[int] = field(init=False)  # tokens of each of `order`
    tokens_left: int = field(init=False)  # in no batch yet
    taken: int = 0  # how many of `order` are in batches
    deficit: int = 0  # tokens it may take in its turn, as in deficit round robin
    has_turn: bool = False
    queue_index: int | None = None  # in the queue's array of tokens left; None: not queued
    is_open: bool = True  # its rows are still wanted
    started_s: float | None = None  # its first batch
    parts: "list[tuple[Sequence[int], Vectors]]" = field(default_factory=list)  # see `gather`
    row_count: int = 0  # in `parts`

    def __post_init__(self) -> None:
        self.tokens_left = self.sequences.token_count
        if len(self.sequences) == 1:
            self.order, self.lengths = [0], [self.tokens_left]
            return
        lengths = self.sequences.lengths()  # [sequences]
        order = np.argsort(-lengths, kind="stable")
        self.order, self.lengths = order.tolist(), lengths[order].tolist()

    @property
    def is_exhausted(self) -> bool:
        """Every sequence is in some batch."""
        return self.taken == len(self.order)

    @property
    def next_length(self) -> int:
        return self.lengths[self.taken]

    def add_rows(self, indices: Sequence[int], vectors: Vectors) -> bool:
        """Keep the rows of the sequences *indices*; whether the request is complete with them."""
        self.parts.append((indices, vectors))
        self.row_count += len(indices)
        return self.row_count == len(self.order)

    def reply(self, now_s: float) -> Reply:
        assert self.started_s is not None
        return Reply(
            gather(self.parts, len(self.order)),
            queue_s=self.started_s - self.submitted_s,
            compute_s=now_s - self.started_s,
        )


class BatchItem(NamedTuple):
    """What one request has in a batch."""

    request: Request
    indices: list[int]  # of its sequences, in the order of the batch's rows


def pack(items: Sequence[BatchItem]) -> Batch:
    """Lay the sequences of *items* end to end, in their order."""
    if len(items) == 1 and len(items[0].request.order) == 1:  # a lone text: nothing to copy
        alone, outputs = items[0].request.sequences, items[0].request.outputs
        asked = np.array([outputs], np.uint8)
        return Batch(alone.token_ids, alone.cu_seqlens, asked, alone.token_types)
    ids: list[Int32Array] = []
    types: list[Int32Array] = []
    flags: list[int] = []
    has_types = any(item.request.sequences.token_types is not None for item in items)
    for request, indices in items:
        sequences, starts = request.sequences, request.sequences.cu_seqlens
        spans = [slice(starts[i], starts[i + 1]) for i in indices]
        ids += [sequences.token_ids[span] for span in spans]
        flags += [request.outputs] * len(indices)
        if has_types:
            own = sequences.token_types
            own = np.zeros(sequences.token_count, np.int32) if own is None else own
            types += [own[span] for span in spans]
    cu_seqlens = np.zeros(len(ids) + 1, np.int32)
    np.cumsum(list(map(len, ids)), out=cu_seqlens[1:])
    token_types = np.concatenate(types) if has_types else None  # int32 [tokens]
    return Batch(np.concatenate(ids), cu_seqlens, np.array(flags, np.uint8), token_types)


def halve(items: Sequence[BatchItem]) -> tuple[list[BatchItem], list[BatchItem]]:
    """*items* as two lists of about equal sequence counts."""
    first, second = list[BatchItem](), list[BatchItem]()
    left = sum(len(item.indices) for item in items) // 2  # sequences that still go to `first`
    for request, indices in items:
        if indices[:left]:
            first.append(BatchItem(request, indices[:left]))
        if indices[left:]:
            second.append(BatchItem(request, indices[left:]))
        left = max(0, left - len(indices))
    return first, second


def slice_rows(vectors: Vectors, begin: int, end: int) -> Vectors:
    """Rows *begin* to *end*, as views."""
    return Vectors({output: rows[begin:end] for output, rows in vectors.rows.items()})


def gather(parts: "Sequence[tuple[Sequence[int], Vectors]]", sequence_count: int) -> Vectors:
    """All rows of a request, row i for its sequence i; every index is in exactly one part."""
    indices, first = parts[0]
    if len(parts) == 1 and indices == list(range(sequence_count)):
        return first
    gathered: dict[Output, Rows] = {}
    for output in {output for _, vectors in parts for output in vectors.rows}:
        rows = first[output]
        if isinstance(rows, np.ndarray):
            array: Float32Array = np.empty((sequence_count, *rows.shape[1:]), np.float32)
            for indices, vectors in parts:
                array[indices] = np.asarray(vectors[output])
            gathered[output] = array
            continue
        listed: list[Row | None] = [None] * sequence_count
        for indices, vectors in parts:
            for i, row in zip(indices, vectors[output], strict=True):
                listed[i] = row
        gathered[output] = tuple(listed)
    return Vectors(gathered)


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
