"""Hash cache: the sha256 of files, so that a warm start does not read 2.3 GB again.

A cached hash counts only while the file's device, inode, size, modification time and change time
are what they were. A program cannot set the change time, so replacing or editing the file in any
ordinary way is noticed; a disk that rots silently is not.
"""

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from trivec.core.errors import CheckpointRefused
from trivec.core.ports import OnProgress, no_progress

CHUNK_BYTES = 1024 * 1024
REMEMBERED_BYTES_MIN = 1024 * 1024  # smaller files are hashed faster than they are looked up
SETTLED_S = 2.0  # a file changed this recently may change again within one tick of its clock


@dataclass(frozen=True, slots=True)
class HashedFile:
    """A file whose content is known by its hash."""

    path: Path
    byte_count: int
    sha256: str


def sha256_of(file: Path, on_progress: OnProgress = no_progress) -> str:
    """The hash of *file*, read whole. Raises `OSError`."""
    digest, chunk = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with file.open("rb", buffering=0) as opened:
        byte_count = max(1, os.fstat(opened.fileno()).st_size)
        while count := opened.readinto(chunk):
            digest.update(chunk[:count])
            on_progress(f"hashing {file.name}", min(1.0, opened.tell() / byte_count))
    return digest.hexdigest()


class Hashes:
    """Hashes files and caches the results under *folder*. Several processes may share it."""

    def __init__(
        self,
        folder: Path,
        *,
        wall_s: Callable[[], float] = time.time,
        on_progress: OnProgress = no_progress,
    ) -> None:
        self._folder = folder
        self._on_progress = on_progress
        self._wall_s = wall_s

    def of(self, file: Path, *, fresh: bool = False) -> HashedFile:
        """The hash of *file*, read anew when *fresh*. Raises `CheckpointRefused` if unreadable."""
        try:
            before, stamp = file.stat(), _stamp(file)
            if not fresh:
                with suppress(OSError):
                    sha256, _, cached = self._note(file).read_bytes().partition(b" ")
                    if cached == stamp:
                        return HashedFile(file, before.st_size, sha256.decode())
            begun_s = self._wall_s()
            found = sha256_of(file, self._on_progress)
            is_same = _stamp(file) == stamp
        except OSError as error:
            raise CheckpointRefused(f"{file}: cannot be read: {error}") from error
        if not is_same:
            raise CheckpointRefused(
                f"{file}: changed while it was read; try again when it is still"
            )
        if before.st_size >= REMEMBERED_BYTES_MIN and begun_s - before.st_ctime > SETTLED_S:
            self.remember(file, found)
        return HashedFile(file, before.st_size, found)

    def remember(self, file: Path, sha256: str) -> None:
        """Cache the hash of a *file* that the caller has just written or read in full."""
        note = self._note(file)
        # A cache that cannot be written costs time at the next start, and nothing else.
        with suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            unfinished = note.with_name(f".{note.name}.{os.getpid()}.part")
            unfinished.write_bytes(sha256.encode() + b" " + _stamp(file))
            unfinished.replace(note)

    def _note(self, file: Path) -> Path:
        return self._folder / hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]


def _stamp(file: Path) -> bytes:
    """What a cached hash is bound to: the file's place, size and times."""
    found = file.stat()
    numbers = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return os.fsencode(f"{numbers} {file.resolve()}")
