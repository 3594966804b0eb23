"""The vectorised heads against loops, and what a mixed batch gets."""

import ctypes
import sys
from dataclasses import replace

import numpy as np
import pytest
from tests.backends.batches import ALL

from trivec.build import open_parts
from trivec.core.types import Output
from trivec.models.pooling import SET_BLAS_THREADS, Heads, HiddenRows, Pooler, Pooling
from trivec.settings import load_settings

HIDDEN, DIMENSIONS = 32, 24
IGNORED = (0, 1, 2, 3)


def heads(seed: int = 0) -> Heads:
    draw = np.random.default_rng(seed)
    return Heads(
        sparse_weight=draw.standard_normal((1, HIDDEN), np.float32),
        sparse_bias=np.array([0.1], np.float32),
        multi_weight=draw.standard_normal((DIMENSIONS, HIDDEN), np.float32),
        multi_bias=draw.standard_normal(DIMENSIONS, np.float32),
        ignored_token_ids=IGNORED,
    )


def rows_of(lengths: list[int], outputs: list[Output], *, vocabulary: int = 9) -> HiddenRows:
    """Random rows with ids so few that most repeat."""
    draw = np.random.default_rng(sum(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    hidden = draw.standard_normal((int(starts[-1]), HIDDEN), np.float32)
    ids = draw.integers(0, vocabulary, int(starts[-1])).astype(np.int32)
    return HiddenRows(hidden, ids, starts, np.array([int(o) for o in outputs], np.uint8))


def lexical_weights(head: Heads, rows: HiddenRows, i: int) -> dict[int, float]:
    found: dict[int, float] = {}
    for place in range(rows.cu_seqlens[i], rows.cu_seqlens[i + 1]):
        token = int(rows.token_ids[place])
        weight = float(rows.hidden[place] @ head.sparse_weight[0] + head.sparse_bias[0])
        if token not in IGNORED and weight > 0:
            found[token] = max(weight, found.get(token, 0.0))
    return found


def test_sparse_is_the_largest_weight_of_each_id_in_each_text() -> None:
    rows = rows_of([5, 1, 12, 40, 2], [ALL] * 5)
    found = Pooler((Pooling.CLS,), True, heads()).vectors(rows).sparse
    for i, sparse in enumerate(found):
        expected = lexical_weights(heads(), rows, i)
        assert sparse is not None
        assert sparse.token_ids.tolist() == sorted(expected)
        weights = [expected[token] for token in sorted(expected)]
        np.testing.assert_allclose(sparse.weights, weights, rtol=1e-4, atol=1e-6)


def test_a_text_of_special_tokens_only_has_an_empty_sparse_vector() -> None:
    rows = rows_of([4, 6], [ALL, ALL], vocabulary=3)
    found = Pooler((Pooling.CLS,), True, heads()).vectors(rows).sparse
    assert [len(one.token_ids) for one in found if one is not None] == [0, 0]


def test_multi_drops_the_first_token_and_has_rows_of_length_one() -> None:
    rows = rows_of([5, 2, 9], [Output.DENSE, Output.MULTI, ALL])
    found = Pooler((Pooling.CLS,), True, heads()).vectors(rows).multi
    assert found[0] is None
    for i, count in ((1, 1), (2, 8)):
        own = rows.hidden[rows.cu_seqlens[i] + 1 : rows.cu_seqlens[i + 1]]
        expected = own @ heads().multi_weight.T + heads().multi_bias
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        multi = found[i]
        assert multi is not None
        assert multi.shape == (count, DIMENSIONS)
        np.testing.assert_allclose(multi, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("pooling", "normalize"),
    [
        pytest.param(Pooling.MEAN, True, id="mean-normalised"),
        pytest.param(Pooling.MEAN, False, id="mean-as-it-is"),
        pytest.param(Pooling.CLS, True, id="first-token-normalised"),
        pytest.param(Pooling.CLS, False, id="first-token-as-it-is"),
    ],
)
def test_dense_pools_each_text_alone(pooling: Pooling, normalize: bool) -> None:
    rows = rows_of([5, 1, 12], [Output.DENSE] * 3)
    found = Pooler((pooling,), normalize, None).vectors(rows).dense
    for i in range(3):
        own = rows.hidden[rows.cu_seqlens[i] : rows.cu_seqlens[i + 1]].astype(np.float64)
        expected = own.mean(axis=0) if pooling is Pooling.MEAN else own[0]
        expected = expected / np.linalg.norm(expected) if normalize else expected
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-6)


def test_a_prompt_is_left_out_of_whatever_counts_all_tokens() -> None:
    poolings = (Pooling.MEAN, Pooling.MAX, Pooling.WEIGHTED_MEAN, Pooling.MEAN_SQRT_LEN)
    skip = [3, 0, 0, 3]
    rows = replace(rows_of([5, 1, 12, 4], [Output.DENSE] * 4), skip=np.array(skip, np.int32))
    found = Pooler(poolings, False, None).vectors(rows).dense
    for i in range(4):
        own = rows.hidden[rows.cu_seqlens[i] + skip[i] : rows.cu_seqlens[i + 1]]
        weights = np.arange(skip[i] + 1, skip[i] + 1 + len(own))
        expected = (
            own.mean(axis=0),
            own.max(axis=0),
            np.average(own, axis=0, weights=weights),
            own.sum(axis=0) / len(own) ** 0.5,
        )
        np.testing.assert_allclose(found[i], np.concatenate(expected), rtol=0, atol=1e-6)


def test_a_chunks_vector_is_the_mean_of_its_tokens() -> None:
    lengths = [9, 4, 3]
    chunks = [np.array([1, 3, 8], np.int32), np.zeros(1, np.int32), np.array([0, 3], np.int32)]
    outputs = [Output.CHUNKS, Output.DENSE, Output.CHUNKS]
    rows = replace(rows_of(lengths, outputs), chunks=chunks)
    found = Pooler((Pooling.MEAN,), True, None).vectors(rows).chunks
    assert found[1] is None
    for i, spans in ((0, [(1, 3), (3, 8)]), (2, [(0, 3)])):
        own = rows.hidden[rows.cu_seqlens[i] : rows.cu_seqlens[i + 1]]
        means = np.array([own[start:end].mean(axis=0) for start, end in spans])
        expected = means / np.linalg.norm(means, axis=1, keepdims=True)
        one = found[i]
        assert one is not None
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-6)


def test_not_a_number_is_never_hidden_by_the_heads() -> None:
    """The engine checks that vectors are finite; a NaN must reach it in every kind of vector."""
    rows = rows_of([6], [ALL])
    rows.token_ids[:] = 7
    rows.hidden[:] = np.nan
    found = Pooler((Pooling.CLS,), True, heads()).vectors(rows)
    sparse, multi = found.sparse[0], found.multi[0]
    assert sparse is not None
    assert multi is not None
    assert np.isnan(found.dense).all()
    assert np.isnan(sparse.weights).all()
    assert np.isnan(multi).all()


def test_a_zero_row_stays_zero() -> None:
    rows = rows_of([2], [Output.DENSE])
    rows.hidden[:] = 0
    assert not Pooler((Pooling.MEAN,), True, None).vectors(rows).dense.any()


def test_vectors_are_no_views_of_the_hidden_states() -> None:
    """The hidden states are the device's memory, overwritten by the next row."""
    rows = rows_of([3, 4], [ALL, ALL])
    found = Pooler((Pooling.CLS,), False, heads()).vectors(rows)
    before = [found.dense.copy(), *(one.copy() for one in found.multi if one is not None)]
    rows.hidden[:] = 0
    after = [found.dense, *(one for one in found.multi if one is not None)]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("skip", [None, [0, 2, 0, 39]], ids=["whole", "without-a-prompt"])
@pytest.mark.parametrize("pooling", Pooling)
def test_each_pooling_is_its_formula(pooling: Pooling, skip: list[int] | None) -> None:
    """Of the tokens that are left; a weighted mean counts their places in the whole sequence."""
    rows = rows_of([5, 3, 12, 40], [Output.DENSE] * 4)
    if skip is not None:
        rows = replace(rows, skip=np.array(skip, np.int32))
    found = Pooler((pooling,), False, None).vectors(rows).dense
    for i in range(4):
        left = 0 if skip is None else skip[i]
        own = rows.hidden[rows.cu_seqlens[i] + left : rows.cu_seqlens[i + 1]].astype(np.float64)
        places = np.arange(left + 1, left + len(own) + 1)
        expected = {
            Pooling.CLS: own[0],
            Pooling.MEAN: own.mean(axis=0),
            Pooling.LAST: own[-1],
            Pooling.MAX: own.max(axis=0),
            Pooling.WEIGHTED_MEAN: np.average(own, axis=0, weights=places),
            Pooling.MEAN_SQRT_LEN: own.sum(axis=0) / np.sqrt(len(own)),
        }[pooling]
        np.testing.assert_allclose(found[i], expected, rtol=0, atol=2e-6)


def test_several_poolings_lie_end_to_end_in_the_order_given() -> None:
    rows = rows_of([5, 3], [Output.DENSE] * 2)
    single = [Pooler((one,), False, None).vectors(rows).dense for one in (Pooling.MAX, Pooling.CLS)]
    both = Pooler((Pooling.MAX, Pooling.CLS), False, None).vectors(rows).dense
    assert np.array_equal(both, np.concatenate(single, axis=1))


def test_a_process_with_models_gives_each_product_of_numpys_one_thread() -> None:
    library = ctypes.CDLL(sys.modules["numpy._core._multiarray_umath"].__file__)
    name = next((one for one in SET_BLAS_THREADS if hasattr(library, one)), None)
    if name is None:
        pytest.skip("this system does not say how many threads numpy's products have")
    threads = getattr(library, name.replace("_set_", "_get_"))
    getattr(library, name)(ctypes.c_int(2))
    assert threads() == 2
    open_parts(load_settings({}, {}))
    assert threads() == 1
