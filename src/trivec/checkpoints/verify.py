"""Whether a model says what it should: published figures beside what was computed here.

It is given a function from texts to vectors and knows nothing of what computes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TypeAlias

import msgspec
import numpy as np

from trivec.core.errors import CheckpointRefused
from trivec.core.types import Float32Array, Output, SparseVector, Vectors

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
    weights: dict[str, float]  # decimal token id to weight


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
    """Every figure that is known of *model_id*. Raises `CheckpointRefused` where none are."""
    name = GOLDEN_FILES.get(model_id)
    if name is None:
        raise CheckpointRefused(
            f"no figures are known of {model_id}; there are some of {', '.join(GOLDEN_FILES)}"
        )
    content = resources.files("trivec.checkpoints").joinpath("golden", name).read_bytes()
    golden = msgspec.json.decode(content, type=_Golden)
    outputs = Output.DENSE
    if golden.sparse:
        outputs |= Output.SPARSE | Output.MULTI
    queries = embed(golden.queries, outputs)
    passages = embed(golden.passages, outputs)
    figures = _scores("dense", golden.dense, queries.dense @ passages.dense.T)
    for i, numbers in enumerate(golden.first_numbers):
        pairs = zip(numbers, queries.dense[i].tolist(), strict=False)
        figures += [
            Figure(f"dense number {j} of query {i + 1}", *pair) for j, pair in enumerate(pairs)
        ]
    if golden.sparse:
        figures += _scores("sparse", golden.sparse, _sparse_scores(queries, passages))
        figures += _scores("multi", golden.multi, _multi_scores(queries, passages))
    if golden.lexical:
        vectors = embed([one.text for one in golden.lexical], Output.DENSE | Output.SPARSE)
        for one, vector in zip(golden.lexical, vectors.sparse, strict=True):
            assert vector is not None
            figures.append(_lexical_figure(one, vector))
    return figures


def _scores(kind: str, expected: list[list[float]], found: Float32Array) -> list[Figure]:
    """*found* `[queries, passages]`, score by score."""
    return [
        Figure(f"{kind} query {i + 1} · passage {j + 1}", score, float(found[i, j]))
        for i, row in enumerate(expected)
        for j, score in enumerate(row)
    ]


def _sparse_scores(queries: Vectors, passages: Vectors) -> Float32Array:
    """Sum over shared ids of the products of their weights: `[queries, passages]`."""
    scores = [
        [sum(weight * passage.get(i, 0.0) for i, weight in query.items()) for passage in columns]
        for columns in [[_as_dict(sparse) for sparse in passages.sparse]]
        for query in map(_as_dict, queries.sparse)
    ]
    return np.array(scores, np.float32)


def _multi_scores(queries: Vectors, passages: Vectors) -> Float32Array:
    """Mean over a query's rows of the best dot product with a passage's: `[queries, passages]`."""
    scores = [
        [(query @ passage.T).max(axis=1).mean() for passage in _rows(passages)]
        for query in _rows(queries)
    ]
    return np.array(scores, np.float32)


def _rows(vectors: Vectors) -> list[Float32Array]:
    return [rows for rows in vectors.multi if rows is not None]


def _as_dict(sparse: SparseVector | None) -> Mapping[int, float]:
    assert sparse is not None
    return dict(zip(sparse.token_ids.tolist(), sparse.weights.tolist(), strict=True))


def _lexical_figure(expected: _Lexical, vector: SparseVector) -> Figure:
    """The weight of one text that is furthest off, so that one line a text says all."""
    found = _as_dict(vector)
    wanted = {int(token_id): weight for token_id, weight in expected.weights.items()}
    ids = sorted(wanted.keys() | found.keys())
    worst = max(ids, key=lambda i: abs(wanted.get(i, 0.0) - found.get(i, 0.0)))
    name = f"lexical weight of id {worst} in “{expected.text[:24].strip()}…”"
    return Figure(name, wanted.get(worst, 0.0), found.get(worst, 0.0))
