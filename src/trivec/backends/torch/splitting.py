"""Cutting a batch in two, putting the vectors of its parts together again, filling one to warm up.

Pure numpy.
"""

from collections.abc import Sequence

import numpy as np

from trivec.core.types import Batch, BatchBudget, Output, Vectors


def halve(batch: Batch) -> tuple[Batch, Batch]:
    """Two batches of about half the tokens each, none empty, order kept."""
    assert len(batch) > 1, "one sequence cannot be halved"
    middle = int(np.searchsorted(batch.starts, batch.token_count / 2))
    middle = min(max(middle, 1), len(batch) - 1)
    return _cut(batch, 0, middle), _cut(batch, middle, len(batch))


def join(parts: Sequence[Vectors]) -> Vectors:
    """The rows of *parts* in their order."""
    return Vectors(
        dense=np.concatenate([part.dense for part in parts]),
        sparse=tuple(one for part in parts for one in part.sparse),
        multi=tuple(one for part in parts for one in part.multi),
    )


def uniform_batch(length: int, budget: BatchBudget, outputs: Output) -> Batch:
    """As many sequences of *length* as *budget* holds, at least one, all asking for *outputs*."""
    count = max(min(budget.tokens_max // length, budget.sequences_max), 1)
    return Batch(
        token_ids=np.zeros(count * length, np.int32),
        starts=np.arange(count + 1, dtype=np.int32) * length,
        outputs=np.full(count, outputs, np.uint8),
    )


def _cut(batch: Batch, first: int, last: int) -> Batch:
    """Sequences *first* to *last* of a batch, views where that is possible."""
    tokens = slice(int(batch.starts[first]), int(batch.starts[last]))
    return Batch(
        token_ids=batch.token_ids[tokens],
        starts=batch.starts[first : last + 1] - batch.starts[first],
        outputs=batch.outputs[first:last],
        token_types=None if batch.token_types is None else batch.token_types[tokens],
    )
