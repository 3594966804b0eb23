"""Golden comparison: a model's published figures beside what was computed here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeAlias

import msgspec
import numpy as np

from trivec.core.errors import CheckpointRefused
from trivec.core.types import Output, Vectors

Embed: TypeAlias = Callable[[Sequence[str], Output], Vectors]

TOLERANCE = 1e-3  # at fp32; the published figures have four digits
GOLDEN_FILES = {"baai/bge-m3": "bge_m3.json", "all-minilm-l6-v2": "all_minilm_l6_v2.json"}


@dataclass(frozen=True, slots=True)
class Figure:
    """One published number and its counterpart."""

    name: str
    expected: float
    found: float

    @property
    def difference(self) -> float:
        return abs(self.found - self.expected)

    @property
    def is_met(self) -> bool:
        """False for a NaN, too."""
        return self.difference <= TOLERANCE


class _Lexical(msgspec.Struct, frozen=True):
    text: str
    weights: dict[int, float]  # by token id


class _Golden(msgspec.Struct, frozen=True):
    """Figures of one model: scores of each query (row) with each passage (column)."""

    queries: list[str]
    passages: list[str]
    dense: list[list[float]]
    sparse: list[list[float]] = []
    multi: list[list[float]] = []
    first_numbers: list[list[float]] = []  # of the dense vectors of the queries
    lexical: list[_Lexical] = []


def verify(model_id: str, embed: Embed) -> list[Figure]:
    """Every figure that is known of *model_id*, computed by *embed*, which maps texts to vectors.

    Raises `CheckpointRefused` where none are known.
    """
    file = GOLDEN_FILES.get(model_id)
    if file is None:
        raise CheckpointRefused(
            f"no figures are known of {model_id}; there are some of {', '.join(GOLDEN_FILES)}"
        )
    content = resources.files("trivec.checkpoints").joinpath("golden", file).read_bytes()
    golden = msgspec.json.decode(content, type=_Golden)
    outputs = Output.DENSE
    if golden.sparse:
        outputs |= Output.SPARSE | Output.MULTI
    queries, passages = embed(golden.queries, outputs), embed(golden.passages, outputs)
    figures: list[Figure] = []
    for kind, output, expected, score in (
        ("dense", Output.DENSE, golden.dense, _dense_score),
        ("sparse", Output.SPARSE, golden.sparse, _sparse_score),
        ("multi", Output.MULTI, golden.multi, _multi_score),
    ):
        if expected and queries[output][0] is None:
            raise CheckpointRefused(f"{model_id}: this copy yields no {kind} vectors")
        figures += [
            Figure(
                name=f"{kind} query {i + 1} · passage {j + 1}",
                expected=value,
                found=score(queries[output][i], passages[output][j]),
            )
            for i, row in enumerate(expected)
            for j, value in enumerate(row)
        ]
    for i, numbers in enumerate(golden.first_numbers):
        found = queries.dense[i].tolist()
        figures += [
            Figure(f"dense number {j} of query {i + 1}", number, found[j])
            for j, number in enumerate(numbers)
        ]
    if golden.lexical:
        vectors = embed([one.text for one in golden.lexical], Output.DENSE | Output.SPARSE)
        for one, vector in zip(golden.lexical, vectors.sparse, strict=True):
            assert vector is not None
            weights = dict(zip(vector.token_ids.tolist(), vector.weights.tolist(), strict=True))
            text = one.text[:24].strip()
            compared = [
                Figure(
                    name=f"lexical weight of id {id_} in “{text}…”",
                    expected=one.weights.get(id_, 0.0),
                    found=weights.get(id_, 0.0),
                )
                for id_ in sorted(one.weights.keys() | weights.keys())
            ]
            # The weight that is furthest off, so that one line a text says all.
            figures.append(max(compared, key=lambda figure: figure.difference))
    return figures


def _dense_score(query: Any, passage: Any) -> float:
    return float(query @ passage)


def _sparse_score(query: Any, passage: Any) -> float:
    """Sum over shared ids of the products of two `SparseVector`s' weights."""
    _, at, other_at = np.intersect1d(query.token_ids, passage.token_ids, return_indices=True)
    return float(query.weights[at] @ passage.weights[other_at])


def _multi_score(query: Any, passage: Any) -> float:
    """Mean over the query's rows of the best dot product with the passage's."""
    return float((query @ passage.T).max(axis=1).mean())
