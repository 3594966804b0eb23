"""`verify`: every figure is compared, and a model that is off by a little is found out."""

import json
from collections.abc import Callable, Sequence
from importlib import resources

import numpy as np
import pytest

from trivec.checkpoints.verify import Figure, verify
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Output, SparseVector, Vectors

GOLDEN = json.loads(
    resources.files("trivec.checkpoints").joinpath("golden", "bge_m3.json").read_text()
)


def _sparse(weights: dict[str, float], *, change: float = 0.0) -> SparseVector:
    ids = sorted(map(int, weights))
    values = [weights[str(i)] for i in ids]
    values[0] += change
    return SparseVector(np.array(ids, np.int32), np.array(values, np.float32))


def _bge_m3(*, change: float = 0.0) -> Callable[[Sequence[str], Output], Vectors]:
    """A model that answers the published lexical weights, and vectors that mean nothing."""
    known = {case["text"]: case["weights"] for case in GOLDEN["lexical"]}

    def embed(texts: Sequence[str], outputs: Output) -> Vectors:
        weights = [known.get(text, {"5": 0.5}) for text in texts]
        multi = np.eye(4, dtype=np.float32)
        return Vectors.of(
            dense=np.eye(len(texts), 4, dtype=np.float32),
            sparse=tuple(_sparse(one, change=change) for one in weights),
            multi=tuple(multi if outputs & Output.MULTI else None for _ in texts),
        )

    return embed


def test_each_of_the_published_figures_is_compared() -> None:
    figures = verify("baai/bge-m3", _bge_m3())
    names = [figure.name for figure in figures]
    assert len(set(names)) == len(names) == 4 + 4 + 4 + 19
    expected = {figure.name: figure.expected for figure in figures}
    assert expected["dense query 1 · passage 1"] == 0.6265
    assert expected["sparse query 2 · passage 2"] == 0.1803
    assert expected["multi query 1 · passage 2"] == 0.4621


def test_scores_are_those_of_the_reference() -> None:
    """Dense by dot product, sparse over shared ids, multi by the mean of each row's best."""

    def embed(texts: Sequence[str], outputs: Output) -> Vectors:
        query = texts[0] in GOLDEN["queries"]
        rows = np.array([[1, 0], [0, 1]] if query else [[0.6, 0.8], [0.2, 0.1]], np.float32)
        sparse = _sparse({"7": 0.5, "9": 2.0} if query else {"8": 1.0, "9": 0.25})
        count = len(texts)
        return Vectors.of(np.tile(rows[:1], (count, 1)), (sparse,) * count, (rows,) * count)

    found = {figure.name: figure.found for figure in verify("baai/bge-m3", embed)}
    assert found["dense query 1 · passage 2"] == pytest.approx(0.6)
    assert found["sparse query 1 · passage 2"] == pytest.approx(0.5)
    assert found["multi query 1 · passage 2"] == pytest.approx((0.6 + 0.8) / 2)


def test_a_lexical_weight_that_is_off_is_named() -> None:
    lexical = [one for one in verify("baai/bge-m3", _bge_m3()) if "lexical" in one.name]
    assert all(figure.is_met for figure in lexical)
    off = [one for one in verify("baai/bge-m3", _bge_m3(change=0.01)) if "lexical" in one.name]
    assert not any(figure.is_met for figure in off)
    assert off[0].difference == pytest.approx(0.01, abs=1e-4)


def test_a_figure_that_is_not_a_number_is_missed() -> None:
    assert not Figure("dense", 0.5, float("nan")).is_met
    assert Figure("dense", 0.5, 0.5009).is_met
    assert not Figure("dense", 0.5, 0.5011).is_met


def test_a_model_without_figures_is_named() -> None:
    with pytest.raises(CheckpointRefused, match=r"no figures are known of baai/bge-small"):
        verify("baai/bge-small-en-v1.5", _bge_m3())
