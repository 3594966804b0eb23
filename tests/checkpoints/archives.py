"""Torch archives made by hand, so that each may be wrong in exactly one way."""

import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np

FLOATS = np.arange(6, dtype="<f4").tobytes()


def text(value: str) -> bytes:
    """The opcode BINUNICODE."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """The opcode BININT, or LONG1 where it does not fit."""
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    encoded = value.to_bytes(9, "little", signed=True)
    return b"\x8a\x09" + encoded


def _tuple(values: Iterable[int]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def pickle_of(
    shapes: Mapping[str, tuple[int, ...]] | Iterable[tuple[str, tuple[int, ...]]],
    *,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    key: str | None = None,
    element_count: int | None = None,
) -> bytes:
    """A state dict of float32 tensors; what is not None is written in place of the truth."""
    parts = [b"\x80\x02}("]
    pairs = shapes.items() if isinstance(shapes, Mapping) else shapes
    for i, (name, shape) in enumerate(pairs):
        true_strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
        count = prod(shape) if element_count is None else element_count
        storage = text("storage") + b"ctorch\nFloatStorage\n" + text(key or str(i)) + text("cpu")
        parts += [
            text(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            b"(" + storage + number(count) + b"tQ",
            number(offset),
            _tuple(shape),
            _tuple(true_strides if strides is None else strides),
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*parts, b"u."])


@dataclass(frozen=True)
class Archive:
    """A sound archive of one tensor `a` of six numbers, but for what is said otherwise."""

    pickled: bytes | None = field(default_factory=lambda: pickle_of({"a": (6,)}))
    storages: Mapping[str, bytes] = field(default_factory=lambda: {"0": FLOATS})
    compressed: frozenset[str] | set[str] = frozenset()
    more: Mapping[str, bytes] = field(default_factory=dict)
    doubled: str | None = None
    byte_order: bytes = b"little"

    def write(self, file: Path) -> Path:
        entries = {} if self.pickled is None else {"archive/data.pkl": self.pickled}
        entries["archive/byteorder"] = self.byte_order
        entries |= {f"archive/data/{key}": storage for key, storage in self.storages.items()}
        entries |= self.more
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in entries.items():
                is_compressed = name.removeprefix("archive/") in self.compressed
                info = zipfile.ZipInfo(name)
                info.filename = name
                info.compress_type = zipfile.ZIP_DEFLATED if is_compressed else zipfile.ZIP_STORED
                archive.writestr(info, content)
                if self.doubled is not None and name.endswith(self.doubled):
                    archive.writestr(name, content)
        return file
