"""Torch's zip files (`.bin`, `.pt`), mapped: no torch, no unpickling, no unpacking.

Such a file is a zip archive of uncompressed entries: `NAME/data.pkl`, which says what tensors
there are, and `NAME/data/0`, `1`, ... with their bytes. Whatever else a zip archive can be is
refused: compressed, encrypted, doubled or overlapping entries, and names nobody expects.
"""

import mmap
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, cast

from trivec.checkpoints.state_dict import StorageSlice, read_state_dict
from trivec.checkpoints.tensors import MappedTensors, StoredTensor, map_file
from trivec.core.errors import CheckpointRefused

PICKLE_BYTES_MAX = 16 * 1024 * 1024
DIRECTORY_BYTES_MAX = 16 * 1024 * 1024
ENTRY = re.compile(
    r"(?P<top>[^/\\]+)/(?P<part>data\.pkl|data/\d+|version|byteorder|\.format_version"
    r"|\.storage_alignment|\.data/serialization_id)"
)
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
CHUNK_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where an entry's bytes are, in the mapped file."""

    begin: int
    end: int
    checksum: int


def open_torch_file(file: Path) -> MappedTensors:
    """Map *file* and find its tensors. Raises `CheckpointRefused`, which names what is wrong.

    Reads the file once, to compare the archive's checksums: about 1 GB/s.
    """
    mapped = map_file(file)
    try:
        _refuse_other_formats(mapped)
        entries = _entries(mapped)
        return MappedTensors(file, mapped, _tensors(mapped, entries))
    except (ValueError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise CheckpointRefused(
            f"{file}: refused: {error}. Take a copy of the model in safetensors, or from a source "
            "you trust."
        ) from error


def _refuse_other_formats(mapped: mmap.mmap) -> None:
    head = mapped[:4]
    if head[:1] == b"\x80":
        raise ValueError(
            "it is a bare pickle, torch's legacy format from before 1.6, which cannot be read "
            "without running it"
        )
    if head != b"PK\x03\x04":
        raise ValueError("it is not a zip archive, which torch files are")


class _BoundedReader:
    """The mapped file as zipfile reads it; a lying directory cannot ask for all of memory."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped
        self.seek, self.tell = mapped.seek, mapped.tell

    def read(self, size: int = -1) -> bytes:
        left = len(self._mapped) - self._mapped.tell()
        wanted = left if size < 0 else min(size, left)
        if wanted > DIRECTORY_BYTES_MAX:
            raise ValueError(f"its directory claims {wanted:,} bytes")
        return self._mapped.read(wanted)

    def seekable(self) -> bool:
        return True


def _entries(mapped: mmap.mmap) -> dict[str, _Entry]:
    """The archive's entries by what follows their top folder; all of them, or `ValueError`."""
    with zipfile.ZipFile(cast("IO[bytes]", _BoundedReader(mapped))) as archive:
        listed = archive.infolist()
    entries: dict[str, _Entry] = {}
    tops: set[str] = set()
    for info in listed:
        match = ENTRY.fullmatch(info.filename)
        if match is None or info.filename != info.orig_filename or match["top"] in (".", ".."):
            raise ValueError(f"its entry {info.orig_filename!r:.120} is none of a state dict's")
        if match["part"] in entries:
            raise ValueError(f"its entry {info.filename!r:.120} is there twice")
        tops.add(match["top"])
        entries[match["part"]] = _locate(mapped, info)
    if len(tops) != 1 or "data.pkl" not in entries:
        raise ValueError("it holds no data.pkl in one folder, so no state dict")
    _refuse_overlaps(entries, len(mapped))
    _refuse_other_byte_order(mapped, entries)
    return entries


def _locate(mapped: mmap.mmap, info: zipfile.ZipInfo) -> _Entry:
    name = f"{info.filename!r:.120}"
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"its entry {name} is compressed; torch stores entries as they are")
    if info.flag_bits & 0x1:
        raise ValueError(f"its entry {name} is encrypted")
    at = info.header_offset
    fields = LOCAL_HEADER.unpack(mapped[at : at + LOCAL_HEADER.size])
    signature, name_bytes, extra_bytes = fields[0], fields[9], fields[10]
    name_at = at + LOCAL_HEADER.size
    stored_name = mapped[name_at : name_at + name_bytes]
    if signature != b"PK\x03\x04" or stored_name != info.orig_filename.encode():
        raise ValueError(f"its directory and its entry {name} disagree")
    begin = name_at + name_bytes + extra_bytes
    return _Entry(begin, begin + info.file_size, info.CRC)


def _refuse_overlaps(entries: Mapping[str, _Entry], file_bytes: int) -> None:
    end = 0
    for part, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        if entry.begin < end or entry.end > file_bytes:
            raise ValueError(f"its entry {part} overlaps another or ends outside the file")
        end = entry.end


def _refuse_other_byte_order(mapped: mmap.mmap, entries: Mapping[str, _Entry]) -> None:
    if (entry := entries.get("byteorder")) is not None:
        order = mapped[entry.begin : min(entry.end, entry.begin + 16)]
        if order.strip() != b"little":
            raise ValueError(f"its byte order is {order!r}; read is little-endian")


def _tensors(mapped: mmap.mmap, entries: Mapping[str, _Entry]) -> dict[str, StoredTensor]:
    pickle_entry = entries["data.pkl"]
    if pickle_entry.end - pickle_entry.begin > PICKLE_BYTES_MAX:
        raise ValueError(f"its data.pkl has more than {PICKLE_BYTES_MAX:,} bytes")
    slices = read_state_dict(mapped[pickle_entry.begin : pickle_entry.end])
    tensors = {name: _place(name, tensor, entries) for name, tensor in slices.items()}
    storages = [entry for part, entry in entries.items() if part.startswith("data/")]
    stored_bytes = sum(entry.end - entry.begin for entry in storages)
    if sum(tensor.byte_count for tensor in tensors.values()) > 2 * stored_bytes:
        raise ValueError("its tensors share their storage until they are more than twice its size")
    for part, entry in entries.items():
        _refuse_damage(mapped, part, entry)
    return tensors


def _place(name: str, tensor: StorageSlice, entries: Mapping[str, _Entry]) -> StoredTensor:
    storage = tensor.storage
    entry = entries.get(f"data/{storage.key}")
    if entry is None:
        raise ValueError(f"{name} lies in storage {storage.key!r:.40}, which is not there")
    item_bytes = storage.dtype.item_bytes
    if storage.element_count * item_bytes != entry.end - entry.begin:
        raise ValueError(
            f"storage {storage.key} has {entry.end - entry.begin:,} bytes, its pickle says "
            f"{storage.element_count * item_bytes:,}"
        )
    if tensor.offset + prod(tensor.shape) > storage.element_count:
        raise ValueError(f"{name} of shape {list(tensor.shape)} reaches outside its storage")
    return StoredTensor(storage.dtype, tensor.shape, entry.begin + tensor.offset * item_bytes)


def _refuse_damage(mapped: mmap.mmap, part: str, entry: _Entry) -> None:
    checksum = 0
    with memoryview(mapped) as whole:
        for at in range(entry.begin, entry.end, CHUNK_BYTES):
            checksum = zlib.crc32(whole[at : min(at + CHUNK_BYTES, entry.end)], checksum)
    if checksum != entry.checksum:
        raise ValueError(f"its entry {part} is damaged: its checksum does not match")
