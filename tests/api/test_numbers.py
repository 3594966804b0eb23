"""Arrays as text and as base64 are the same bits, and the text is short."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trivec.api.numbers import ROWS_AT_ONCE, to_base64, to_json
from trivec.core.types import Float32Array

EDGES = [0.0, -0.0, 1.0, -1.0, 0.1, 1 / 3, 1e-45, 1.1754942e-38, 1e-14, 1e-15, 16777217.0, 3.4e38]


def bits_of_text(text: bytes, like: Float32Array) -> Float32Array:
    return np.array(json.loads(text), np.float64).astype(np.float32).reshape(like.shape)


def assert_same_bits(found: Float32Array, expected: Float32Array) -> None:
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@given(
    arrays(
        np.float32,
        st.integers(0, 40),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_text_reads_back_to_the_same_bits(array: Float32Array) -> None:
    assert_same_bits(bits_of_text(to_json(array), array), array)


def test_text_reads_back_to_the_same_bits_over_the_whole_range_of_float32() -> None:
    bits = np.random.default_rng(7).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    floats = bits.view(np.float32)
    array = np.concatenate([floats[np.isfinite(floats)], np.array(EDGES, np.float32)])
    assert_same_bits(bits_of_text(to_json(array), array), array)


def test_the_numbers_of_an_embedding_take_at_most_nine_digits() -> None:
    vector = np.random.default_rng(7).standard_normal(1024).astype(np.float32)
    vector /= np.linalg.norm(vector)
    for word in to_json(vector)[1:-1].split(b","):
        digits = word.lstrip(b"-").partition(b"e")[0].replace(b".", b"").lstrip(b"0")
        assert len(digits) <= 9, word


@pytest.mark.parametrize("rows", [0, 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 3 * ROWS_AT_ONCE])
def test_a_matrix_is_the_same_text_whatever_blocks_it_is_written_in(rows: int) -> None:
    matrix = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
    assert to_json(matrix) == b"[%b]" % b",".join(to_json(row) for row in matrix)


def test_integers_are_written_as_integers() -> None:
    assert to_json(np.array([0, 250_001], np.int32)) == b"[0,250001]"


def test_base64_is_little_endian_whatever_the_layout_of_the_array() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = base64.b64encode(np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes())
    assert to_base64(matrix.T) == expected
    assert to_base64(matrix.T.astype(">f4")) == expected
