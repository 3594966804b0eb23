"""Remembered hashes: fast while nothing changed, and never wrong about what did."""

import os
from pathlib import Path

import pytest

from trivec.checkpoints.hashes import REMEMBERED_BYTES_MIN, Hashes
from trivec.core.errors import CheckpointRefused

LONG_AFTER_S = 4e9  # a wall clock by which every file here has settled


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(b"\0" * REMEMBERED_BYTES_MIN)
    return file


@pytest.fixture
def hashes(tmp_path: Path) -> Hashes:
    return Hashes(tmp_path / "hashes", wall_s=lambda: LONG_AFTER_S)


def _forge(hashes: Hashes, file: Path) -> None:
    """Make the cache tell on itself: what it remembers is a hash that no file has."""
    hashes.remember(file, "f" * 64)


def test_an_unchanged_file_is_not_read_again(hashes: Hashes, file: Path) -> None:
    _forge(hashes, file)
    assert hashes.of(file).sha256 == "f" * 64


def test_fresh_reads_it_all_the_same(hashes: Hashes, file: Path) -> None:
    _forge(hashes, file)
    assert hashes.of(file, fresh=True).sha256 != "f" * 64


def test_a_file_edited_in_place_with_its_time_put_back_is_read_again(
    hashes: Hashes, file: Path
) -> None:
    _forge(hashes, file)
    before = file.stat()
    with file.open("r+b") as opened:
        opened.write(b"\1")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert hashes.of(file).sha256 != "f" * 64


def test_a_file_replaced_by_one_of_the_same_size_is_read_again(
    hashes: Hashes, file: Path, tmp_path: Path
) -> None:
    _forge(hashes, file)
    other = tmp_path / "other"
    other.write_bytes(b"\1" * REMEMBERED_BYTES_MIN)
    other.replace(file)
    assert hashes.of(file).sha256 != "f" * 64


def test_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path, file: Path) -> None:
    """It could change again within one tick of the file system's clock."""
    just_now_s = file.stat().st_ctime + 0.5
    Hashes(tmp_path / "hashes", wall_s=lambda: just_now_s).of(file)
    assert not (tmp_path / "hashes").exists()
    Hashes(tmp_path / "hashes", wall_s=lambda: LONG_AFTER_S).of(file)
    assert len(list((tmp_path / "hashes").iterdir())) == 1


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut-off"),
        pytest.param(b'{"path": 7}', id="of-another-form"),
    ],
)
def test_a_damaged_memory_costs_only_time(
    content: bytes, hashes: Hashes, file: Path, tmp_path: Path
) -> None:
    true = hashes.of(file).sha256
    (note,) = (tmp_path / "hashes").iterdir()
    note.write_bytes(content)
    assert hashes.of(file).sha256 == true


def test_a_cache_that_cannot_be_written_costs_only_time(file: Path) -> None:
    assert Hashes(Path("/dev/null/hashes"), wall_s=lambda: LONG_AFTER_S).of(file).byte_count > 0


def test_a_file_that_cannot_be_read_is_named(hashes: Hashes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused, match="gone: cannot be read"):
        hashes.of(tmp_path / "gone")
