"""State dicts in torch's zip format, written without torch: for dummy checkpoints.

The archive has what `torch.load` looks for and nothing else: `data.pkl` in pickle protocol 2, one
uncompressed entry a tensor at a multiple of 64 bytes, `byteorder` and `version`. It is the
counterpart of the reader in `checkpoints/tensor_files.py`; the tests read its files with torch.
"""

import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

TOP = "archive"
ALIGNMENT_BYTES = 64
LOCAL_HEADER_BYTES = 30
PADDING_FIELD = 0x4246  # "FB", the extra field that torch pads with
DATE = (1980, 1, 1, 0, 0, 0)  # the same bytes whenever they are written
ORDERED_DICT = "collections.OrderedDict"
REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
STORAGE_NAMES = {
    "F32": "torch.FloatStorage",
    "F16": "torch.HalfStorage",
    "BF16": "torch.BFloat16Storage",
}


def write_torch_file(
    file: Path,
    shapes: Mapping[str, tuple[str, tuple[int, ...]]],
    tensors: Iterable[Iterable[memoryview | bytes]],
) -> None:
    """Write the state dict *shapes* to *file*, in one pass.

    *tensors* yields, for each name of *shapes* in order, the little-endian bytes of it in pieces.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _write(archive, "data.pkl", [pickled(shapes)])
        _write(archive, "byteorder", [b"little"])
        for key, pieces in enumerate(tensors):
            _write(archive, f"data/{key}", pieces)
        _write(archive, "version", [b"3\n"])


def _write(archive: zipfile.ZipFile, part: str, pieces: Iterable[memoryview | bytes]) -> None:
    entry = zipfile.ZipInfo(f"{TOP}/{part}", DATE)
    assert archive.fp is not None
    begin = archive.fp.tell() + LOCAL_HEADER_BYTES + len(entry.filename) + 4
    padding = -begin % ALIGNMENT_BYTES
    entry.extra = struct.pack("<HH", PADDING_FIELD, padding) + b"Z" * padding
    with archive.open(entry, "w") as out:
        for piece in pieces:
            out.write(piece)


def pickled(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The pickle of an OrderedDict of row-major tensors, each in a storage of its own."""
    parts = [b"\x80\x02", _global(ORDERED_DICT), b")R("]
    for key, (name, (dtype, shape)) in enumerate(shapes.items()):
        parts += [_text(name), *_tensor(str(key), dtype, shape)]
    return b"".join([*parts, b"u."])


def _tensor(key: str, dtype: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    yield _global(REBUILD_TENSOR) + b"("
    storage = _text("storage") + _global(STORAGE_NAMES[dtype]) + _text(key) + _text("cpu")
    yield b"(" + storage + _number(prod(shape)) + b"tQ"
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    yield _number(0) + _numbers(shape) + _numbers(strides)
    yield b"\x89" + _global(ORDERED_DICT) + b")RtR"


def _global(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)


def _numbers(numbers: Iterable[int]) -> bytes:
    return b"(" + b"".join(_number(number) for number in numbers) + b"t"
