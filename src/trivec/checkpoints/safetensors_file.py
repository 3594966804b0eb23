"""The safetensors format: a JSON header checked by the byte, and a streaming writer.

The safetensors package reads whole tensors into memory and knows no bfloat16 under numpy; this
reader hands out views of the mapped file. The format: 8 bytes of header length (little-endian),
the header, then the tensors end to end. https://huggingface.co/docs/safetensors
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path

import msgspec

from trivec.checkpoints.tensors import MappedTensors, StoredTensor, StoredType, map_file
from trivec.core.errors import CheckpointRefused

HEADER_BYTES_MAX = 16 * 1024 * 1024
DIMENSIONS_MAX = 8
STORED_TYPES = {one.label: one for one in StoredType}


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def open_safetensors(file: Path) -> MappedTensors:
    """Map *file* and check its header: every tensor inside the file, none overlapping, no holes.

    Raises `CheckpointRefused`, which names what is wrong.
    """
    mapped = map_file(file)
    try:
        return MappedTensors(file, mapped, _read_header(mapped))
    except ValueError as error:
        raise CheckpointRefused(
            f"{file}: not a sound safetensors file: {error}. Fetch the file again."
        ) from error


def _read_header(mapped: mmap.mmap) -> dict[str, StoredTensor]:
    header_bytes = int.from_bytes(mapped[:8], "little")
    data_at = 8 + header_bytes
    if len(mapped) < 8 or header_bytes > HEADER_BYTES_MAX or data_at > len(mapped):
        raise ValueError(
            f"its header claims {header_bytes:,} bytes of a file of {len(mapped):,} "
            f"(at most {HEADER_BYTES_MAX:,} are read)"
        )
    entries = _decode(mapped[8:data_at])
    tensors = {name: _tensor(name, entry, data_at) for name, entry in entries.items()}
    expected_at = data_at
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset_bytes):
        if tensor.offset_bytes != expected_at and tensor.byte_count:
            raise ValueError(f"{name} overlaps another tensor or leaves a hole")
        expected_at += tensor.byte_count
    if expected_at != len(mapped):
        raise ValueError(f"it holds {len(mapped):,} bytes where its header says {expected_at:,}")
    return tensors


def _decode(header: bytes) -> dict[str, _Entry]:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(names := dict(pairs)) != len(pairs):
            raise ValueError("its header names something twice")
        return names

    try:
        entries = json.loads(header, object_pairs_hook=once)
        if isinstance(entries, dict):
            entries.pop("__metadata__", None)
        return msgspec.convert(entries, dict[str, _Entry])
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    except msgspec.ValidationError as error:
        raise ValueError(f"its header is malformed ({error})") from error


def _tensor(name: str, entry: _Entry, data_at: int) -> StoredTensor:
    if entry.dtype not in STORED_TYPES:
        raise ValueError(f"{name} has the unknown type {entry.dtype!r}")
    if len(entry.shape) > DIMENSIONS_MAX or any(size < 0 for size in entry.shape):
        raise ValueError(f"{name} has the impossible shape {entry.shape}")
    begin, end = entry.data_offsets
    tensor = StoredTensor(STORED_TYPES[entry.dtype], tuple(entry.shape), data_at + begin)
    if begin < 0 or end - begin != tensor.byte_count:
        raise ValueError(
            f"{name} of shape {entry.shape} takes {tensor.byte_count:,} bytes, "
            f"its offsets say {end - begin:,}"
        )
    return tensor


def write_safetensors(
    file: Path,
    shapes: Mapping[str, tuple[StoredType, tuple[int, ...]]],
    tensors: Iterable[Iterable[memoryview | bytes]],
) -> str:
    """Write *file* in one pass, one piece in memory at a time; returns its sha256.

    *tensors* yields, for each name of *shapes* in order, the little-endian bytes of it in pieces.
    The file is moved into place at the end: a reader never sees half of it.
    """
    entries: dict[str, _Entry] = {}
    offset = 0
    for name, (dtype, shape) in shapes.items():
        end = offset + prod(shape) * dtype.item_bytes
        entries[name] = _Entry(dtype.label, list(shape), (offset, end))
        offset = end
    encoded = msgspec.json.encode({"__metadata__": {"format": "pt"}, **entries})
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors begin at a multiple of eight
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as out:
            head = len(encoded).to_bytes(8, "little") + encoded
            sha256 = hashlib.sha256(head)
            out.write(head)
            for entry, pieces in zip(entries.values(), tensors, strict=True):
                for piece in pieces:
                    sha256.update(piece)
                    out.write(piece)
                assert out.tell() == len(head) + entry.data_offsets[1]
            out.flush()
            os.fsync(out.fileno())
        unfinished.replace(file)
        return sha256.hexdigest()
    finally:
        unfinished.unlink(missing_ok=True)
