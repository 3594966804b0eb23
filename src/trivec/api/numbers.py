"""float32 and int32 arrays as JSON text or base64, with no Python loop over numbers.

Both forms of an array decode to the same bits. Which way is fastest was measured: decision 0050.
"""

import msgspec
import numpy as np
import pybase64
from numpy.typing import NDArray

from trivec.core.types import Float32Array, Int32Array

# Every power of ten that float64 holds exactly, so that n / 10**k is rounded once only.
_POWERS = 10.0 ** np.arange(23)
_LOG10_2 = 0.30102999566398120
# What one number takes in JSON, comma included: sign, "0.", up to 12 digits; as base64: 16/3.
FLOAT_TEXT_BYTES = 16
INT_TEXT_BYTES = 8
ROWS_AT_ONCE = 64


def to_base64(array: NDArray[np.generic]) -> bytes:
    """The array's bytes, little-endian and in C order, as padded base64."""
    little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    encoded: bytes = pybase64.b64encode(little)
    return encoded


def to_json(array: Float32Array | Int32Array) -> bytes:
    """The array as JSON lists. A float is written in at most 9 digits that read back to its bits.

    Rows of a matrix go block by block: the temporaries stay small, and no call holds the
    interpreter's lock for long.
    """
    if array.ndim == 2 and len(array) > ROWS_AT_ONCE:
        blocks = (array[i : i + ROWS_AT_ONCE] for i in range(0, len(array), ROWS_AT_ONCE))
        return b"[%b]" % b",".join(to_json(block)[1:-1] for block in blocks)
    exact = array if array.dtype == np.int32 else _few_digits(array)
    return msgspec.json.encode(exact.tolist())


def _few_digits(array: NDArray[np.generic]) -> NDArray[np.float64]:
    """The float64 with the fewest decimal digits (8 or 9) that rounds to each float32.

    Nine digits always tell float32s apart. A float64's shortest text has no more digits than the
    decimal it was made from, if the division below is exact but for one rounding. Where it is not
    (below 1e-14), or where it would not read back, the number itself is kept, digits and all.
    """
    exact = array.astype(np.float64)
    exponent = np.frexp(array)[1] - 1  # of two
    places = np.clip(8 - np.floor(exponent * _LOG10_2).astype(np.intp), 0, 22)
    scale = _POWERS[places]
    nine = np.rint(exact * scale)
    result: NDArray[np.float64] = nine / scale
    np.copyto(result, exact, where=result.astype(np.float32) != array)
    eight = np.rint(nine * 0.1) * 10.0 / scale
    np.copyto(result, eight, where=eight.astype(np.float32) == array)
    return result
