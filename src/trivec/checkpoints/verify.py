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
    for kind, output, scores in (
        ("dense", Output.DENSE, golden.dense),
        ("sparse", Output.SPARSE, golden.sparse),
        ("multi", Output.MULTI, golden.multi),
    ):
        if scores and queries[output][0] is None:
            raise CheckpointRefused(f"{model_id}: this copy yields no {kind} vectors")
        for i, row in enumerate(scores):
            for j, expected in enumerate(row):
                found = _score(output, queries[output][i], passages[output][j])
                figures.append(Figure(f"{kind} query {i + 1} · passage {j + 1}", expected, found))
    for i, numbers in enumerate(golden.first_numbers):
        for j, number in enumerate(numbers):
            name = f"dense number {j} of query {i + 1}"
            figures.append(Figure(name, number, float(queries.dense[i, j])))
    if golden.lexical:
        vectors = embed([one.text for one in golden.lexical], Output.DENSE | Output.SPARSE)
        for one, vector in zip(golden.lexical, vectors.sparse, strict=True):
            assert vector is not None
            weights = dict(zip(vector.token_ids.tolist(), vector.weights.tolist(), strict=True))
            compared = [
                Figure(
                    f"lexical weight of id {token_id} in “{one.text[:24].strip()}…”",
                    one.weights.get(token_id, 0.0),
                    weights.get(token_id, 0.0),
                )
                for token_id in sorted(one.weights.keys() | weights.keys())
            ]
            # The weight that is furthest off, so that one line a text says all.
            figures.append(max(compared, key=lambda figure: figure.difference))
    return figures


def _score(output: Output, query: Any, passage: Any) -> float:
    """Dense: dot product. Sparse: over shared ids. Multi: mean of each query row's best product."""
    if output == Output.SPARSE:
        _, at, other_at = np.intersect1d(query.token_ids, passage.token_ids, return_indices=True)
        return float(query.weights[at] @ passage.weights[other_at])
    if output == Output.MULTI:
        return float((query @ passage.T).max(axis=1).mean())
    return float(query @ passage)
