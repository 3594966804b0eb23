"""Smaller vectors: fewer numbers of one, or fewer bits a number, the same whoever asks for it."""

from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from trivec.core.types import Float32Array

ByteDtype: TypeAlias = Literal["int8", "uint8", "binary", "ubinary"]
INT8_MAX = 127
INT8_RANGE = 8  # times its typical size: the largest number that int8 holds


def cut(rows: Float32Array, size: int | None) -> Float32Array:
    """The first *size* numbers of each row, brought back to length 1: float32 `[rows, size]`.

    Dividing by the slice's own length undoes the model's normalisation of the whole row, so this
    equals truncating first and normalising after.
    """
    return rows if size in (None, rows.shape[1]) else unit(rows[:, :size])


def unit(rows: Float32Array) -> Float32Array:
    """Each row divided by its L2 norm: float32 `[rows, numbers]`."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: Float32Array = rows / np.maximum(lengths, np.float32(1e-12))
    return scaled


def quantise(rows: Float32Array, dtype: ByteDtype) -> NDArray[np.int8] | NDArray[np.uint8]:
    """*rows* `[rows, numbers]` in *dtype*, by rules in which each row counts alone.

    ubinary: a bit a number, 1 above 0, eight in a byte, the first highest; binary: that byte - 128
    (both as sentence-transformers has them). int8: round(v * 127 * sqrt(n) / INT8_RANGE) of a row of
    length 1 and n numbers, whose typical size is 1 / sqrt(n), kept within 127; uint8: that + 128.
    """
    if dtype in ("binary", "ubinary"):
        unsigned = np.packbits(rows > 0, axis=1)
    else:
        scale = np.float32(INT8_MAX * np.sqrt(rows.shape[1]) / INT8_RANGE)
        levels = np.clip(np.rint(unit(rows) * scale), -INT8_MAX, INT8_MAX)
        unsigned = levels.astype(np.int8).view(np.uint8) ^ np.uint8(128)
    return unsigned if dtype in ("uint8", "ubinary") else (unsigned ^ np.uint8(128)).view(np.int8)
