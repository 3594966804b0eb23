"""Arrays as text and as base64 are the same numbers, to the last bit."""

import base64
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trivec.api.responses import ROWS_AT_ONCE, to_base64, to_json
from trivec.core.types import Float32Array

EDGES = [0.0, -0.0, 1.0, -1.0, 0.1, 1 / 3, 1e-45, 1.1754942e-38, 1e-14, 1e-15, 16777217.0, 3.4e38]


def assert_same_numbers(text: bytes, array: Float32Array) -> None:
    """As float64, and so as float32 too."""
    found = np.array(json.loads(text), np.float64)
    np.testing.assert_array_equal(found.view(np.uint64), array.astype(np.float64).view(np.uint64))


FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(arrays(np.float32, st.integers(0, 40), elements=FINITE))
def test_text_reads_back_to_the_same_numbers(array: Float32Array) -> None:
    assert_same_numbers(to_json(array), array)


def test_text_reads_back_to_the_same_numbers_over_the_whole_range_of_float32() -> None:
    bits = np.random.default_rng(7).integers(0, 2**32, 200_000, dtype=np.uint64).astype(np.uint32)
    floats = bits.view(np.float32)
    array = np.concatenate([floats[np.isfinite(floats)], np.array(EDGES, np.float32)])
    assert_same_numbers(to_json(array), array)


@pytest.mark.parametrize("rows", [0, 1, ROWS_AT_ONCE, ROWS_AT_ONCE + 1, 3 * ROWS_AT_ONCE])
def test_a_matrix_is_the_same_text_whatever_blocks_it_is_written_in(rows: int) -> None:
    matrix = np.random.default_rng(rows).standard_normal((rows, 3)).astype(np.float32)
    assert to_json(matrix) == b"[%b]" % b",".join(to_json(row) for row in matrix)


def test_integers_are_written_as_integers() -> None:
    assert to_json(np.array([0, 250_001], np.int32)) == b"[0,250001]"


def test_base64_is_little_endian_whatever_the_layout_of_the_array() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    numbers = np.array([0, 3, 1, 4, 2, 5], "<f4").tobytes()
    expected = b'"%b"' % base64.b64encode(numbers)
    assert to_base64(matrix.T) == expected
    assert to_base64(matrix.T.astype(">f4")) == expected
