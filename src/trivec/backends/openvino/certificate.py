"""Whether int8 keeps a model's vectors: measured on the probes, written down, shown to users.

Pure values and comparisons. It knows no runtime and no files.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trivec.core.types import Float32Array, SparseVector, Vectors

COSINE_MIN = 0.99
COSINE_MEAN = 0.998


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cosines between vectors of two arithmetics."""

    minimum: float
    mean: float

    @property
    def passes(self) -> bool:
        return self.minimum >= COSINE_MIN and self.mean >= COSINE_MEAN

    def __str__(self) -> str:
        return f"{self.minimum:.4f} min {self.mean:.4f} mean"


@dataclass(frozen=True, slots=True)
class Certificate:
    """How near one recipe's vectors are to fp32's, on which probes, made with what."""

    recipe: str
    dense: Agreement
    sparse: Agreement | None  # None where the model has no such head
    multi: Agreement | None
    probe_count: int
    script_count: int
    refused: tuple[str, ...]  # faster recipes that did not pass

    @property
    def passes(self) -> bool:
        """Whether every kind of vector is within the bars."""
        kinds = (self.dense, self.sparse, self.multi)
        return all(kind.passes for kind in kinds if kind is not None)

    @property
    def summary(self) -> str:
        """One line for model lists and logs."""
        kinds = {"dense": self.dense, "sparse": self.sparse, "multi": self.multi}
        shown = ", ".join(f"{name} {kind}" for name, kind in kinds.items() if kind is not None)
        verdict = "passes" if self.passes else "FAILS"
        refused = f"; refused before: {', '.join(self.refused)}" if self.refused else ""
        return (
            f"{self.recipe} {verdict} against fp32: cosine {shown}; {self.probe_count} probes "
            f"in {self.script_count} scripts and languages{refused}"
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Agreement of each kind of vector; None where there is none to compare."""

    dense: Agreement
    sparse: Agreement | None
    multi: Agreement | None


def compare(exact: Vectors, other: Vectors) -> Comparison:
    """Cosines of *other* with *exact*, sequence by sequence; rows of multi one by one."""
    return Comparison(
        dense=_agreement(_cosines(exact.dense, other.dense)),
        sparse=_sparse_agreement(exact, other),
        multi=_multi_agreement(exact, other),
    )


def _cosines(a: Float32Array, b: Float32Array) -> NDArray[np.float64]:
    """Row by row, float64 `[rows]`; a row that is not finite agrees with nothing."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosines: NDArray[np.float64] = (x * y).sum(axis=1) / np.maximum(norms, 1e-30)
    cosines[~np.isfinite(cosines)] = -1.0
    return cosines


def _agreement(cosines: NDArray[np.float64]) -> Agreement:
    return Agreement(float(cosines.min()), float(cosines.mean()))


def _sparse_agreement(exact: Vectors, other: Vectors) -> Agreement | None:
    pairs = [(a, b) for a, b in zip(exact.sparse, other.sparse, strict=True) if a and b]
    cosines = [_sparse_cosine(a, b) for a, b in pairs if len(a.weights)]
    return _agreement(np.array(cosines)) if cosines else None


def _sparse_cosine(a: SparseVector, b: SparseVector) -> float:
    _, in_a, in_b = np.intersect1d(a.token_ids, b.token_ids, return_indices=True)
    dot = float(a.weights[in_a].astype(np.float64) @ b.weights[in_b])
    norms = float(np.linalg.norm(a.weights)) * float(np.linalg.norm(b.weights))
    return dot / norms if norms > 0 else 0.0


def _multi_agreement(exact: Vectors, other: Vectors) -> Agreement | None:
    rows = [_cosines(a, b) for a, b in _pairs(exact.multi, other.multi) if len(a)]
    return _agreement(np.concatenate(rows)) if rows else None


def _pairs(
    left: Iterable[Float32Array | None], right: Iterable[Float32Array | None]
) -> list[tuple[Float32Array, Float32Array]]:
    return [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
