"""The safetensors reader and writer, beside the format's own library."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from trivec.checkpoints.tensor_files import (
    all_finite,
    open_tensor_file,
    remove_unfinished,
    write_safetensors,
)
from trivec.core.errors import CheckpointRefused

SHAPES = {
    "a": ("F32", (2, 3)),
    "b": ("F16", (5,)),
    "none": ("F32", (0,)),
}
ARRAYS = {
    "a": np.arange(6, dtype="<f4").reshape(2, 3),
    "b": np.arange(5, dtype="<f2"),
    "none": np.zeros(0, "<f4"),
}


def _write(file: Path) -> Path:
    pieces = [[array.tobytes()[:4], array.tobytes()[4:]] for array in ARRAYS.values()]
    write_safetensors(file, SHAPES, pieces)
    return file


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    with safe_open(_write(tmp_path / "x.safetensors"), "numpy") as tensors:
        assert set(tensors.keys()) == set(ARRAYS)
        assert all(np.array_equal(tensors.get_tensor(name), ARRAYS[name]) for name in ARRAYS)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(ARRAYS, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = open_tensor_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(tensors.float32(name), ARRAYS[name]) for name in ARRAYS)


def test_a_view_outlives_its_file_and_never_changes_it(tmp_path: Path) -> None:
    file = _write(tmp_path / "x.safetensors")
    before = file.read_bytes()
    array = open_tensor_file(file).float32("a")
    array[:] = 7
    assert file.read_bytes() == before
    file.unlink()
    assert array.sum() == 42


def test_half_a_file_is_never_seen(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"

    def stopped() -> Any:
        yield [ARRAYS["a"].tobytes()]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(file, SHAPES, stopped())
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_writes_is_not(
    tmp_path: Path,
) -> None:
    file = tmp_path / "x.safetensors"
    (tmp_path / ".x.safetensors.1234.part").write_bytes(b"half")
    (tmp_path / ".y.safetensors.1234.part").write_bytes(b"another file's")
    seen: list[list[bool]] = []

    def pieces() -> Any:
        for _ in range(4):  # more than is buffered, so that some of it is in the file
            yield [bytes(100_000)]
            remove_unfinished(file)  # as another process would that starts now
            seen.append([one.stat().st_size > 0 for one in tmp_path.glob(".x.*.part")])

    write_safetensors(file, {str(i): ("U8", (100_000,)) for i in range(4)}, pieces())
    assert seen == [[True]] * 4
    assert {one.name for one in tmp_path.iterdir()} == {file.name, ".y.safetensors.1234.part"}
    assert len(open_tensor_file(file).tensors) == 4


def _entry(**fields: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | fields


HEADERS: dict[str, tuple[object, str]] = {
    "a-shape-that-lies": ({"a": _entry(shape=[2, 4])}, "invalid shape"),
    "a-huge-shape": ({"a": _entry(shape=[2**40, 2**40])}, "overflow"),
    "a-negative-shape": ({"a": _entry(shape=[-2, -3])}, "invalid value"),
    "a-shape-of-fractions": ({"a": _entry(shape=[2.5, 3])}, "invalid type"),
    "offsets-past-the-end": (
        {"a": _entry(shape=[4, 3], data_offsets=[0, 48])},
        "not fully covered",
    ),
    "offsets-before-the-start": ({"a": _entry(data_offsets=[-24, 0])}, "invalid value"),
    "offsets-the-wrong-way": ({"a": _entry(data_offsets=[24, 0])}, "invalid offset"),
    "an-overlap": (
        {"a": _entry(), "b": _entry(shape=[1], data_offsets=[8, 12])},
        "invalid offset",
    ),
    "two-names-for-the-same-bytes": ({"a": _entry(), "b": _entry()}, "invalid offset"),
    "a-hole": ({"a": _entry(shape=[2], data_offsets=[16, 24])}, "invalid offset"),
    "bytes-nobody-names": ({"a": _entry(shape=[2], data_offsets=[0, 8])}, "not fully covered"),
    "a-type-that-nothing-here-reads": (
        {"a": _entry(dtype="F8_E4M3", shape=[24])},
        "unknown type 'F8_E4M3'",
    ),
    "a-type-that-there-is-not": ({"a": _entry(dtype="F33")}, "unknown variant"),
    "a-list": ([], "invalid JSON"),
    "a-number-for-a-tensor": ({"a": 7}, "invalid JSON"),
}


def _raw(header: bytes, *, claimed: int | None = None) -> bytes:
    count = len(header) if claimed is None else claimed
    return count.to_bytes(8, "little") + header + ARRAYS["a"].tobytes()


@pytest.mark.parametrize(("header", "reason"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_lies_is_refused(header: object, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(_raw(json.dumps(header).encode()))
    with pytest.raises(CheckpointRefused, match=reason):
        open_tensor_file(file)


RAW: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "shorter-than-its-length-field": (b"\1\0", "too small"),
    "a-header-longer-than-the-file": (_raw(b"{}", claimed=10_000), "invalid header length"),
    "a-header-of-gigabytes": (_raw(b"{}", claimed=2**62), "header too large"),
    "no-json": (_raw(b"\x80\x02cos\nsystem\n"), "in header"),
    "nested-without-end": (_raw(b"[" * 100_000), "invalid JSON"),
    "nested-without-end-in-an-entry": (_raw(b'{"a":' * 100_000), "in header"),
}


@pytest.mark.parametrize(("content", "reason"), RAW.values(), ids=RAW.keys())
def test_a_file_that_is_not_safetensors_is_refused(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointRefused, match=reason):
        open_tensor_file(file)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-1], id="a-byte-short"),
        pytest.param(lambda content: content + b"\0", id="a-byte-more"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
    ],
)
def test_a_file_of_another_length_is_refused(
    damage: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    file = _write(tmp_path / "x.safetensors")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(
        CheckpointRefused,
        match=r"x.safetensors: not a sound safetensors file: .* Fetch the file again",
    ):
        open_tensor_file(file)


@given(st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=50))
def test_finite_means_every_value_is(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert all_finite(array) == bool(np.isfinite(array).all())
