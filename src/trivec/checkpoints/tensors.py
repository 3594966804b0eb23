"""Tensors that lie in a file: where each begins, what it holds, and float32 views of it.

Both readers (`safetensors_file`, `torch_file`) end here, so that whoever uses weights never
learns which format they came in. The file is mapped, never read whole.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod
from pathlib import Path

import numpy as np

from trivec.core.errors import CheckpointRefused
from trivec.core.types import Float32Array


class StoredType(Enum):
    """A tensor's element type, by the name safetensors gives it, with its bytes an element."""

    F64 = ("F64", 8)
    F32 = ("F32", 4)
    F16 = ("F16", 2)
    BF16 = ("BF16", 2)
    I64 = ("I64", 8)
    I32 = ("I32", 4)
    I16 = ("I16", 2)
    I8 = ("I8", 1)
    U8 = ("U8", 1)
    BOOL = ("BOOL", 1)

    @property
    def label(self) -> str:
        return self.value[0]

    @property
    def item_bytes(self) -> int:
        return self.value[1]


WIDENED = frozenset({StoredType.F32, StoredType.F16, StoredType.BF16})


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file, row-major and little-endian."""

    dtype: StoredType
    shape: tuple[int, ...]
    offset_bytes: int  # from the start of the file

    @property
    def byte_count(self) -> int:
        return prod(self.shape) * self.dtype.item_bytes


class MappedTensors:
    """A mapped file and the tensors in it. Any thread may read.

    Views keep the map alive, so dropping this object is always safe.
    """

    def __init__(self, file: Path, mapped: mmap.mmap, tensors: Mapping[str, StoredTensor]) -> None:
        self.file = file
        self.tensors = tensors
        self._mapped = mapped

    def raw(self, name: str) -> memoryview:
        """The stored bytes of *name*, without a copy."""
        tensor = self.tensors[name]
        end = tensor.offset_bytes + tensor.byte_count
        return memoryview(self._mapped)[tensor.offset_bytes : end]

    def float32(self, name: str) -> Float32Array:
        """Tensor *name* as float32 in its own shape: a view where the file holds float32.

        Raises `CheckpointRefused` for a type that is not a float of at most 32 bits, and for a
        value that is not finite.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in WIDENED:
            raise CheckpointRefused(
                f"{self.file}: {name} is stored as {tensor.dtype.label}; weights are read from "
                "F32, F16 or BF16. Convert the checkpoint to one of these."
            )
        array = widen(self.raw(name), tensor.dtype).reshape(tensor.shape)
        if not all_finite(array):
            raise CheckpointRefused(
                f"{self.file}: {name} holds a value that is not finite (NaN or infinity). "
                "The file is damaged or its training diverged; fetch it again."
            )
        return array


def widen(raw: memoryview, dtype: StoredType) -> Float32Array:
    """The float32 values of *raw*, flat. bfloat16 is the upper half of a float32."""
    if dtype is StoredType.F32:
        return np.frombuffer(raw, "<f4").astype(np.float32, copy=False)
    if dtype is StoredType.F16:
        return np.frombuffer(raw, "<f2").astype(np.float32)
    assert dtype is StoredType.BF16
    return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)


def all_finite(array: Float32Array) -> bool:
    """Whether *array* holds neither NaN nor infinity, without a temporary of its size.

    A finite sum proves it, since neither NaN nor infinity can be added away; only a sum that
    overflowed needs the slow look.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float32)
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


def map_file(file: Path) -> mmap.mmap:
    """*file*, mapped. Raises `CheckpointRefused` when it cannot be, or is empty.

    The map is private: arrays over it are writable, as OpenVINO and torch want them to be before
    they will share memory, and nothing written would ever reach the file.
    """
    try:
        with file.open("rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointRefused(f"{file}: cannot be read: {error}") from error
