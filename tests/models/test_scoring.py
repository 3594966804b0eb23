"""Scores of pairs equal their definitions, written out in plain loops."""

import tracemalloc

import numpy as np
import pytest

from trivec.core.types import Float32Array, Output, Row, SparseVector
from trivec.models import scoring
from trivec.models.scoring import cosine, fused_score, lexical_score, max_sim

DIMENSIONS = 16


def unit_rows(seed: int, count: int, dimensions: int = DIMENSIONS) -> Float32Array:
    rows = np.random.default_rng(seed).standard_normal((count, dimensions), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def sparse(seed: int, count: int) -> SparseVector:
    draw = np.random.default_rng(seed)
    ids = np.sort(draw.choice(60, count, replace=False)).astype(np.int32)
    return SparseVector(ids, draw.random(count, np.float32))


def plain_max_sim(query: Float32Array, document: Float32Array) -> float:
    best = [max(sum(a * b for a, b in zip(q, d, strict=True)) for d in document) for q in query]
    return float(sum(best) / len(best))


def plain_lexical(query: SparseVector, document: SparseVector) -> float:
    theirs = dict(zip(document.token_ids.tolist(), document.weights.tolist(), strict=True))
    ours = zip(query.token_ids.tolist(), query.weights.tolist(), strict=True)
    return float(sum(weight * theirs.get(token_id, 0.0) for token_id, weight in ours))


@pytest.mark.parametrize(("query", "document"), [(1, 1), (3, 7), (7, 3), (20, 50)])
def test_max_sim_is_the_mean_of_the_best_products(query: int, document: int) -> None:
    ours, theirs = unit_rows(1, query), unit_rows(2, document)
    assert max_sim(ours, theirs) == pytest.approx(plain_max_sim(ours, theirs), abs=1e-6)


def test_max_sim_in_steps_is_max_sim_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = unit_rows(1, 37), unit_rows(2, 11)
    at_once = max_sim(ours, theirs)
    monkeypatch.setattr(scoring, "PRODUCTS_MAX", 50)
    assert max_sim(ours, theirs) == pytest.approx(at_once, abs=1e-6)


def test_max_sim_of_two_long_texts_takes_little_memory() -> None:
    ours, theirs = unit_rows(1, 8192), unit_rows(2, 8192)
    tracemalloc.start()
    max_sim(ours, theirs)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2 * 4 * scoring.PRODUCTS_MAX  # all products at once are 16 times that


def test_a_text_without_rows_answers_nothing() -> None:
    none = np.empty((0, DIMENSIONS), np.float32)
    assert max_sim(none, unit_rows(1, 3)) == max_sim(unit_rows(1, 3), none) == 0.0


@pytest.mark.parametrize("counts", [(0, 5), (5, 0), (30, 30), (1, 60)], ids=str)
def test_the_lexical_score_sums_over_shared_ids(counts: tuple[int, int]) -> None:
    ours, theirs = sparse(1, counts[0]), sparse(2, counts[1])
    assert lexical_score(ours, theirs) == pytest.approx(plain_lexical(ours, theirs), abs=1e-6)


def test_the_cosine_does_without_lengths_of_one() -> None:
    ours, theirs = unit_rows(1, 1)[0], unit_rows(2, 1)[0]
    assert cosine(3 * ours, 5 * theirs) == pytest.approx(float(ours @ theirs), abs=1e-6)
    assert cosine(ours, 0 * theirs) == 0.0


def test_fusion_is_the_weighted_mean_of_what_has_a_weight() -> None:
    def rows(seed: int) -> dict[Output, Row]:
        return {
            Output.DENSE: unit_rows(seed, 1)[0],
            Output.SPARSE: sparse(seed, 30),
            Output.MULTI: unit_rows(seed, 9),
        }

    query, document = rows(1), rows(2)
    parts = {one: fused_score(query, document, {one: 5.0}) for one in query}
    weights = {Output.DENSE: 0.4, Output.SPARSE: 0.2, Output.MULTI: 0.6}
    expected = sum(weights[one] * parts[one] for one in parts) / 1.2
    assert fused_score(query, document, weights) == pytest.approx(expected, abs=1e-6)
