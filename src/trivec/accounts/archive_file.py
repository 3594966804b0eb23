"""A file of old ledger rows: JSON lines, one gzip member a batch, appended and synced.

A run that was cut off leaves at most its last member incomplete. Whether the bytes after the last
sound member are such a rest is told by the header that each of our members begins with.
"""

import fcntl
import json
import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trivec.core.errors import SettingInvalid, StoreRefused

Row = dict[str, Any]  # the columns of a ledger row, by name
# gzip: deflate, with a name, without a time, of an unknown system; and the name.
HEADER = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"ledger.jsonl\0"
GZIP_WINDOW = 31  # for zlib: a gzip header and trailer around it
CHUNK_BYTES = 256 * 1024


class ArchiveFile:
    """One file, open and locked. Raises `SettingInvalid`, in one line, for what is wrong with it."""

    def __init__(self, path: Path) -> None:
        """Make it (mode 0600) where it is not there. Raises `StoreRefused` where a run has it."""
        self.path = path
        is_new = not path.exists()
        try:
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        except OSError as fault:
            raise self._unusable(fault) from fault
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_new:
                sync_folder(path.parent)
        except BaseException as fault:
            self.close()
            if isinstance(fault, BlockingIOError):
                raise StoreRefused(
                    f"another run writes to {path}; wait until it has ended"
                ) from fault
            if isinstance(fault, OSError):
                raise self._unusable(fault) from fault
            raise
        self.byte_count = 0  # up to the end of the last sound member; `members` reads so far

    def members(self, *, may_be_torn: bool) -> Iterator[list[Row]]:
        """The rows of each member; to be read to the end before anything is appended.

        *may_be_torn*: a run into this file was cut off, and an incomplete last member is cut away.
        """
        size = os.fstat(self._file.fileno()).st_size
        while self.byte_count < size:
            found = self._member()
            if found is None:
                self._cut_rest(may_be_torn=may_be_torn)
                return
            content, end = found
            self.byte_count = end
            yield self._rows(content)

    def append(self, rows: Sequence[Row]) -> None:
        """On disk when it returns. What it cannot write whole it takes back."""
        lines = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)
        member = memoryview(_member_of(lines.encode()))
        try:
            self._file.seek(self.byte_count)
            written = 0
            while written < len(member):
                written += self._file.write(member[written:]) or 0
            os.fsync(self._file.fileno())
        except OSError as fault:
            self.cut(self.byte_count)
            raise self._unusable(fault) from fault
        self.byte_count += len(member)

    def cut(self, byte_count: int) -> None:
        """Keep the first *byte_count* bytes."""
        try:
            self._file.truncate(byte_count)
            os.fsync(self._file.fileno())
        except OSError as fault:
            raise self._unusable(fault) from fault
        self.byte_count = byte_count

    def is_whole(self) -> bool:
        """Whether it ends where its last sound member does."""
        return os.fstat(self._file.fileno()).st_size == self.byte_count

    def close(self) -> None:
        self._file.close()

    def _member(self) -> tuple[bytes, int] | None:
        """The content of the member at `byte_count` and where it ends; None where it is unsound."""
        self._file.seek(self.byte_count)
        if self._file.read(len(HEADER)) != HEADER:
            return None
        self._file.seek(self.byte_count)
        inflating = zlib.decompressobj(GZIP_WINDOW)
        pieces = []
        while not inflating.eof:
            piece = self._file.read(CHUNK_BYTES)
            if not piece:
                return None
            try:
                pieces.append(inflating.decompress(piece))
            except zlib.error:
                return None
        return b"".join(pieces), self._file.tell() - len(inflating.unused_data)

    def _cut_rest(self, *, may_be_torn: bool) -> None:
        """A member that follows shows that what is unsound was whole once: no run was cut off in it."""
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            is_followed = mapped.find(HEADER, self.byte_count + 1) >= 0
        if not may_be_torn or is_followed:
            raise SettingInvalid(
                f"{self.path} is damaged from byte {self.byte_count} on, or no archive of the "
                "ledger; nothing was changed in it: name another file with --to"
            )
        self.cut(self.byte_count)

    def _rows(self, content: bytes) -> list[Row]:
        try:
            return [json.loads(line) for line in content.splitlines()]
        except ValueError as fault:
            raise SettingInvalid(
                f"{self.path} is no archive of the ledger; name another file with --to"
            ) from fault

    def _unusable(self, fault: OSError) -> SettingInvalid:
        return SettingInvalid(
            f"{self.path} cannot be written: {fault.strerror}; make room or the folder writable, "
            "or name another file with --to"
        )


def sync_folder(folder: Path) -> None:
    """So that a file that was made or renamed in it is there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _member_of(content: bytes) -> bytes:
    deflating = zlib.compressobj(6, zlib.DEFLATED, -15)
    deflated = deflating.compress(content) + deflating.flush()
    trailer = zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(4, "little")
    return HEADER + deflated + trailer
