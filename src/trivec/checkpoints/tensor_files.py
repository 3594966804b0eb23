"""Tensor files: safetensors and torch's zip files, mapped into memory, never read whole and never run.

* safetensors: 8 bytes of header length (little-endian), a JSON header, then the tensors end to end
  (https://huggingface.co/docs/safetensors). The safetensors package checks the header; it reads
  whole tensors into memory and knows no bfloat16 under numpy, so the file is mapped here.
* torch (`.bin`, `.pt`): a zip archive of uncompressed entries, `NAME/data.pkl`, which says what
  tensors there are, and `NAME/data/0`, `1`, … with their bytes. Other archives are refused.

The pickle is a program for a stack machine that may import and call anything. `_StateDictUnpickler`
gives it two dozen opcodes and three callables, which make a state dict.
"""

import fcntl
import hashlib
import io
import mmap
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from reprlib import Repr
from typing import Any, ClassVar, TypeGuard, cast
from uuid import uuid4

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from trivec.checkpoints.hashes import HashedFile, Hashes
from trivec.core.errors import CheckpointRefused
from trivec.core.types import Float32Array

# Bytes of an element, by the type's name in safetensors.
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"
}  # fmt: skip
TORCH_SUFFIXES = (".bin", ".pt")
DIMENSIONS_MAX = 8
# Larger writes make larger folios, which are mapped whole: 2 MB for each row of a table that is read.
PIECE_BYTES = 64 * 1024
# How BERT's first files call the two tensors of a LayerNorm.
NORM_PARTS = {"gamma": "weight", "beta": "bias"}
OLD_NORM = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")
PICKLE_BYTES_MAX = 4 * 1024 * 1024  # BGE-M3's 391 tensors take 60 kB


class _Malformed(ValueError):
    """A file does not hold what its format says; the message names what it holds instead."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor in a file, row-major and little-endian."""

    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]
    offset_bytes: int  # from the start of the file

    @property
    def byte_count(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A mapped file and the tensors in it, whatever its format. Any thread may read.

    Views keep the map alive, so dropping this object is always safe.
    """

    file: Path
    mapped: mmap.mmap
    tensors: Mapping[str, StoredTensor]

    def raw(self, name: str) -> memoryview:
        """The stored bytes of *name*, without a copy."""
        tensor = self.tensors[name]
        end = tensor.offset_bytes + tensor.byte_count
        return memoryview(self.mapped)[tensor.offset_bytes : end]

    def float32(self, name: str) -> Float32Array:
        """Tensor *name* as float32 in its own shape: a view where the file holds float32.

        Raises `CheckpointRefused` for a type that is not a float of at most 32 bits, and for a
        value that is not finite.
        """
        tensor, raw = self.tensors[name], self.raw(name)
        if tensor.dtype == "F32":
            array = np.frombuffer(raw, "<f4").astype(np.float32, copy=False)
        elif tensor.dtype == "F16":
            array = np.frombuffer(raw, "<f2").astype(np.float32)
        elif tensor.dtype == "BF16":  # the upper half of a float32
            array = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            raise CheckpointRefused(
                f"{self.file}: {name} is stored as {tensor.dtype}; weights are read from "
                "F32, F16 or BF16. Convert the checkpoint to one of these."
            )
        if not all_finite(array):
            raise CheckpointRefused(
                f"{self.file}: {name} holds a value that is not finite (NaN or infinity). "
                "The file is damaged or its training diverged; fetch it again."
            )
        return array.reshape(tensor.shape)

    def release_pages(self) -> None:
        """Drop what of the file is in memory; a view of it is read again when it is needed."""
        self.mapped.madvise(mmap.MADV_DONTNEED)

    def numbers(self, name: str) -> NDArray[np.generic]:
        """Tensor *name* in the type and shape it is stored in; float32 where numpy has no such type."""
        tensor = self.tensors[name]
        if tensor.dtype not in NUMPY_TYPES:
            return self.float32(name)
        return np.frombuffer(self.raw(name), NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape)


class TensorFiles:
    """A model's tensors, in one file or several, under the names that transformers gives them now."""

    def __init__(self, files: Sequence[TensorFile]) -> None:
        """Raises `CheckpointRefused` for a name that is there twice."""
        self.file = files[0].file  # for messages: the first
        self.tensors: dict[str, StoredTensor] = {}
        self._places: dict[str, tuple[TensorFile, str]] = {}  # its file, and its name there
        self._files = files
        for file in files:
            for name, tensor in file.tensors.items():
                now = OLD_NORM.sub(lambda found: NORM_PARTS[found[0]], name)
                if now in self.tensors:
                    raise CheckpointRefused(f"{file.file}: {now} is there twice")
                self.tensors[now], self._places[now] = tensor, (file, name)

    def float32(self, name: str) -> Float32Array:
        """As `TensorFile.float32`."""
        file, stored_name = self._places[name]
        return file.float32(stored_name)

    def release_pages(self) -> None:
        """As `TensorFile.release_pages`, of all files."""
        for file in self._files:
            file.release_pages()

    def numbers(self, name: str) -> NDArray[np.generic]:
        """As `TensorFile.numbers`."""
        file, stored_name = self._places[name]
        return file.numbers(stored_name)


def all_finite(array: Float32Array) -> bool:
    """Whether *array* holds neither NaN nor infinity, without a temporary of its size.

    A finite sum proves it, since neither NaN nor infinity can be added away; only a sum that
    overflowed needs the slow look.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float32)
    return bool(np.isfinite(total)) or bool(np.isfinite(array).all())


def open_tensor_file(file: Path) -> TensorFile:
    """Map *file*, a torch file if it ends in `.bin` or `.pt` and safetensors otherwise.

    Of a safetensors file the header is read; a torch file is read once, about 1 GB/s, to compare
    the archive's checksums. Raises `CheckpointRefused`, which names what is wrong.
    """
    try:
        with file.open("rb") as opened:
            # A private map: arrays over it are writable, as OpenVINO and torch want them to be
            # before they share memory, and nothing written would ever reach the file.
            mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointRefused(f"{file}: cannot be read: {error}") from error
    try:
        read = _read_archive if file.suffix in TORCH_SUFFIXES else _read_header
        return TensorFile(file, mapped, read(file, mapped))
    except (ValueError, SafetensorError, zipfile.BadZipFile, RuntimeError, struct.error) as error:
        problem = f"not a sound safetensors file: {error}. Fetch the file again."
        if file.suffix in TORCH_SUFFIXES:
            problem = f"refused: {error}. Take a copy in safetensors, or from a source you trust."
        raise CheckpointRefused(f"{file}: {problem}") from error


def as_safetensors(source: HashedFile, *, cache_dir: Path) -> Path:
    """*source* itself, or of a torch file its safetensors form: from the cache or made now.

    A copy in the cache counts only while it has the hash it was written with; a damaged one is
    made again. Memory: one tensor.
    Raises `CheckpointRefused` when *source* is not a plain state dict.
    """
    if source.path.suffix not in TORCH_SUFFIXES:
        return source.path
    folder, hashes = cache_dir / "converted" / source.sha256, Hashes(cache_dir / "hashes")
    file, note = folder / "model.safetensors", folder / "sha256"
    remove_unfinished(file)
    is_there = file.is_file() and note.is_file()
    if is_there and hashes.of(file).sha256 == note.read_text(errors="replace"):
        return file
    opened = open_tensor_file(source.path)
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in opened.tensors.items()}

    def pieces() -> Iterator[list[memoryview]]:
        for name in shapes:
            yield [opened.raw(name)]
            opened.release_pages()

    sha256 = write_safetensors(file, shapes, pieces())
    note.write_text(sha256)
    hashes.remember(file, sha256)
    return file


# safetensors


def _read_header(file: Path, mapped: mmap.mmap) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, whose header the format's own library checks.

    It does not say where they begin, but that they cover the file in this order, without holes.
    """
    tensors: dict[str, StoredTensor] = {}
    offset = 8 + int.from_bytes(mapped[:8], "little")
    with safe_open(file, "numpy") as opened:
        for name in opened.offset_keys():
            found = opened.get_slice(name)
            dtype, shape = found.get_dtype(), tuple(found.get_shape())
            if dtype not in ITEM_BYTES or len(shape) > DIMENSIONS_MAX:
                raise _Malformed(f"{name} has the unknown type {dtype!r}, or {len(shape)} axes")
            tensors[name] = StoredTensor(dtype, shape, offset)
            offset += tensors[name].byte_count
    if offset != len(mapped):
        raise _Malformed("its tensors do not cover the file")
    return tensors


def write_safetensors(
    file: Path,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],  # type and shape by name
    tensors: Iterable[Iterable[memoryview | bytes]],
) -> str:
    """Write *file* in one pass, one piece in memory at a time; returns its sha256.

    *tensors* yields, for each name of *shapes* in order, the little-endian bytes of it in pieces.
    The file is moved into place at the end: a reader never sees half of it. Until then its writer
    holds a lock: see `remove_unfinished`.
    """
    entries: dict[str, dict[str, object]] = {}
    end = 0  # of the tensor, from the end of the header
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    encoded = msgspec.json.encode({"__metadata__": {"format": "pt"}, **entries})
    encoded += b" " * (-len(encoded) % 8)  # so that the tensors begin at a multiple of eight
    head = len(encoded).to_bytes(8, "little") + encoded
    sha256 = hashlib.sha256()
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{uuid4().hex}.part")
    try:
        with unfinished.open("xb") as out:
            with suppress(OSError):  # a file system without locks keeps what was left
                fcntl.flock(out, fcntl.LOCK_EX)
            for whole in chain([head], chain.from_iterable(tensors)):
                for at in range(0, len(whole), PIECE_BYTES):
                    piece = whole[at : at + PIECE_BYTES]
                    sha256.update(piece)
                    out.write(piece)
            assert out.tell() == len(head) + end
            out.flush()
            os.fsync(out.fileno())
            unfinished.replace(file)
        return sha256.hexdigest()
    finally:
        unfinished.unlink(missing_ok=True)


def remove_unfinished(file: Path) -> None:
    """Remove what processes left that were killed while they wrote *file*: up to all its bytes.

    A writer that lives holds its lock before the first byte; what is empty may not have it yet.
    """
    for part in file.parent.glob(f".{file.name}.*.part"):
        with suppress(OSError), part.open("r+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(opened.fileno()).st_size:
                part.unlink()


# torch's zip files

PARTS = re.compile(
    r"(?P<top>[^/\\]+)/(?P<part>data\.pkl|data/\d+|version|byteorder|\.format_version"
    r"|\.storage_alignment|\.data/serialization_id)"
)


def _read_archive(file: Path, mapped: mmap.mmap) -> dict[str, StoredTensor]:
    """The tensors of a torch file, whose every part is where it says and undamaged."""
    if mapped[:1] == b"\x80":
        raise _Malformed(
            "it is a bare pickle, torch's legacy format from before 1.6, which cannot be read "
            "without running it"
        )
    if mapped[:4] != b"PK\x03\x04":
        raise _Malformed("it is not a zip archive, which torch files are")
    with zipfile.ZipFile(file) as archive:
        parts = _locate_parts(mapped, archive.infolist())
        # Each entry's own header and its checksum, which the file is read once for.
        if (damaged := archive.testzip()) is not None:
            raise _Malformed(f"its entry {damaged} is damaged: its checksum does not match")
    order = parts.get("byteorder")
    if order is not None and (said := mapped[order.start : order[:16].stop]).strip() != b"little":
        raise _Malformed(f"its byte order is {said!r}; read is little-endian")
    pickled = parts["data.pkl"]
    if len(pickled) > PICKLE_BYTES_MAX:
        raise _Malformed(f"its data.pkl has more than {PICKLE_BYTES_MAX:,} bytes")
    storages = {name[5:]: part for name, part in parts.items() if name.startswith("data/")}
    tensors = _read_state_dict(mapped[pickled.start : pickled.stop], storages)
    # A small file must not become a large one when it is converted.
    if sum(one.byte_count for one in tensors.values()) > 2 * sum(map(len, storages.values())):
        raise _Malformed("its tensors share their storage until they are more than twice its size")
    return tensors


def _locate_parts(mapped: mmap.mmap, listed: list[zipfile.ZipInfo]) -> dict[str, range]:
    """Where the archive's entries are, by what follows their one top folder; none overlap."""
    parts: dict[str, range] = {}
    tops: set[str] = set()
    for info in listed:
        name = f"{info.orig_filename!r:.120}"
        match = PARTS.fullmatch(info.filename)
        if match is None or info.filename != info.orig_filename or match["top"] in (".", ".."):
            raise _Malformed(f"its entry {name} is none of a state dict's")
        if match["part"] in parts:
            raise _Malformed(f"its entry {name} is there twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise _Malformed(f"its entry {name} is compressed; torch stores entries as they are")
        # Only the entry's own header says how long its name and its extra field are.
        name_bytes, extra_bytes = struct.unpack_from("<2H", mapped, info.header_offset + 26)
        begin = info.header_offset + 30 + name_bytes + extra_bytes
        parts[match["part"]] = range(begin, begin + info.file_size)
        tops.add(match["top"])
    if len(tops) != 1 or "data.pkl" not in parts:
        raise _Malformed("it holds no data.pkl in one folder, so no state dict")
    end = 0
    for name, part in sorted(parts.items(), key=lambda item: (item[1].start, item[1].stop)):
        if part.start < end or part.stop > len(mapped):
            raise _Malformed(f"its entry {name} overlaps another or ends outside the file")
        end = part.stop
    return parts


# the pickle of a state dict


class _StateDict(dict[str, object]):
    """A dict with text for keys: hashing a tuple nested 300,000 times would end the process."""

    def __init__(self) -> None:  # so that it is made of nothing, whatever a pickle calls it with
        super().__init__()

    def __setitem__(self, key: object, value: object) -> None:
        if type(key) is not str or not key.isprintable():
            raise _Malformed(f"its pickle has {_brief(key)} for a name")
        if key in self:
            raise _Malformed(f"its pickle names {key!r} twice")
        super().__setitem__(key, value)


def _rebuild_tensor(  # of six values: a seventh may say that the stored ones are negated
    storage: object, offset: object, shape: object, strides: object, _grad: object, _hooks: object
) -> StoredTensor:
    """The tensor that torch's function of this name makes; offset and strides are in elements."""
    if not isinstance(storage, StoredTensor):
        raise _Malformed(f"its pickle rebuilds a tensor from {_brief(storage)}")
    if not _is_shape(shape):
        raise _Malformed(f"its pickle has a tensor of the impossible shape {_brief(shape)}")
    # The stride of an axis of length one says nothing.
    if not (_is_shape(strides) and len(strides) == len(shape)) or any(
        size != 1 and strides[axis] != prod(shape[axis + 1 :]) for axis, size in enumerate(shape)
    ):
        raise _Malformed(
            f"its pickle has a tensor of shape {_brief(shape)} with strides {_brief(strides)}, "
            "not row-major"
        )
    if not _is_count(offset):
        raise _Malformed(f"its pickle has a tensor at the impossible offset {_brief(offset)}")
    if offset + prod(shape) > prod(storage.shape):
        raise _Malformed(f"its tensor of shape {list(shape)} reaches outside its storage")
    begin = storage.offset_bytes + offset * ITEM_BYTES[storage.dtype]
    return StoredTensor(storage.dtype, tuple(shape), begin)


# What the names in a pickle stand for; a storage's type is a key of ITEM_BYTES.
GLOBALS: Mapping[str, object] = {
    "collections.OrderedDict": _StateDict,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, _grad, _hooks: tensor,
    "torch.DoubleStorage": "F64",
    "torch.FloatStorage": "F32",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.LongStorage": "I64",
    "torch.IntStorage": "I32",
    "torch.ShortStorage": "I16",
    "torch.CharStorage": "I8",
    "torch.ByteStorage": "U8",
    "torch.BoolStorage": "BOOL",
}
# Opcodes that put values on the stack, take them together, keep them for later or call a global.
ALLOWED_OPCODES = (
    pickle.MARK, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE,
    pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINUNICODE,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.SETITEM, pickle.SETITEMS, pickle.GLOBAL, pickle.BINPERSID, pickle.REDUCE,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET,
)  # fmt: skip


class _Opcodes(dict[int, Callable[[Any], None]]):
    """What each opcode does; none but these are known."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
        name = names.get(chr(code), f"{code:#x}")
        raise _Malformed(f"its pickle uses the opcode {name}, which a state dict does not need")


class _StateDictUnpickler(pickle._Unpickler):
    """The standard library's unpickler in Python, cut down to what a state dict needs.

    Not `pickle.Unpickler`, which is in C: its dicts hash any key and its memo is an array of the
    size that the pickle asks for, so a few bytes end the process or take gigabytes; nor can it
    refuse an opcode.
    """

    stack: list[object]
    metastack: list[list[object]]
    read: Callable[[int], bytes]

    def __init__(self, pickled: bytes, storages: Mapping[str, range]) -> None:
        super().__init__(io.BytesIO(pickled))
        self._storages = storages

    def find_class(self, module: str, name: str) -> object:
        name = f"{module}.{name}"
        if name not in GLOBALS:
            raise _Malformed(f"its pickle asks for {name!r}, which a state dict does not need")
        return GLOBALS[name]

    def persistent_load(self, pid: object) -> StoredTensor:
        """The storage, as one flat tensor, of ("storage", type, key, device, element count)."""
        match pid:
            case ("storage", str(dtype), str(key), _, int(count)) if dtype in ITEM_BYTES:
                part = self._storages.get(key)
            case _:
                raise _Malformed(f"its pickle refers to {_brief(pid)}, which is no storage")
        if part is None:
            raise _Malformed(f"its pickle refers to storage {key!r:.40}, which is not there")
        storage = StoredTensor(dtype, (count,), part.start)
        if (said := storage.byte_count) != len(part):
            raise _Malformed(f"storage {key} has {len(part):,} bytes, its pickle says {said:,}")
        return storage

    def _load_protocol(self) -> None:
        if (version := ord(self.read(1))) != 2:
            raise _Malformed(f"its pickle is of protocol {version}; torch writes 2")

    def _load_build(self) -> None:
        """Modules leave version numbers on their state dict, as its attribute `_metadata`."""
        state, held = self.stack.pop(), self.stack[-1]
        if not (type(held) is type(state) is _StateDict and [*state] == ["_metadata"]):
            raise _Malformed(f"its pickle sets attributes of {_brief(held)}")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = _Opcodes(
        {code[0]: pickle._Unpickler.dispatch[code[0]] for code in ALLOWED_OPCODES}
        | {
            pickle.PROTO[0]: _load_protocol,
            pickle.EMPTY_DICT[0]: lambda self: self.stack.append(_StateDict()),
            pickle.BUILD[0]: _load_build,
        }
    )


def _read_state_dict(pickled: bytes, storages: Mapping[str, range]) -> dict[str, StoredTensor]:
    """Name to tensor, as *pickled* says, in *storages* (key to place). No code of it is run.

    Raises `ValueError`, which names the opcode, global or value that a state dict does not have.
    """
    unpickler = _StateDictUnpickler(pickled, storages)
    if not pickled.endswith(pickle.STOP):
        raise _Malformed("its pickle is no complete one")
    try:
        found = unpickler.load()
    except (EOFError, IndexError, TypeError, struct.error, pickle.UnpicklingError) as error:
        raise _Malformed(f"its pickle is damaged ({error})") from error
    if unpickler.stack or unpickler.metastack:
        raise _Malformed("its pickle does not end in one value")
    if not isinstance(found, _StateDict):
        raise _Malformed(f"its pickle holds {_brief(found)} where a state dict is expected")
    for name, tensor in found.items():
        if not isinstance(tensor, StoredTensor):
            raise _Malformed(
                f"its pickle maps {name!r} to {_brief(tensor)}, not a name to a tensor"
            )
    return cast("dict[str, StoredTensor]", found)


def _is_shape(sizes: object) -> TypeGuard[tuple[int, ...]]:
    return (
        isinstance(sizes, tuple | list)
        and len(sizes) <= DIMENSIONS_MAX
        and all(_is_count(size) for size in sizes)
    )


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < 2**48


def _brief(value: object) -> str:
    """A value of the pickle's in few words: a small pickle can nest one tuple into an endless one."""
    shortened = Repr()
    shortened.maxlevel = 2
    return f"{type(value).__name__.strip('_').lower()} {shortened.repr(value)}"
