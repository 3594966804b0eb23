"""Batches made by hand, and vectors compared bit by bit."""

from collections.abc import Sequence

import numpy as np

from trivec.core.types import Batch, Output, Sequences, Vectors

ALL = Output.DENSE | Output.SPARSE | Output.MULTI


def batch_of(ids: Sequence[list[int]], outputs: Output | Sequence[Output] = Output.DENSE) -> Batch:
    """The texts *ids*, all asking for *outputs*, or each for its own."""
    packed = Sequences.pack(ids)
    flags = [outputs] * len(ids) if isinstance(outputs, Output) else outputs
    return Batch(packed.token_ids, packed.cu_seqlens, np.array([int(o) for o in flags], np.uint8))


def bits(vectors: Vectors, i: int) -> tuple[bytes, bytes, bytes, bytes]:
    """Every bit of sequence *i*'s vectors."""
    sparse, multi = vectors.sparse[i], vectors.multi[i]
    return (
        vectors.dense[i].tobytes(),
        sparse.token_ids.tobytes() if sparse else b"",
        sparse.weights.tobytes() if sparse else b"",
        multi.tobytes() if multi is not None else b"",
    )
