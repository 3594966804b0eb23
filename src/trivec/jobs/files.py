"""Files of the Files API: bytes in a folder or at any URL of fsspec, records in the store.

Each key has a folder, and the names in it are ours: no part of a path comes from a client. Files of
any size are written and read in pieces of `PIECE_BYTES`, on threads.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import IO, Any

from trivec.accounts.keys import sync_folder
from trivec.core.errors import BodyTooLarge, SettingInvalid, StoreUnavailable
from trivec.jobs.records import FileRecord, JobStore
from trivec.settings import BatchLimits

PIECE_BYTES = 1 << 20
RETRY_AFTER_S = 30.0  # a disk that is full does not empty itself in a second


class FileStorage:
    """Bytes by key and name, at *url*. All methods block, and raise `StoreUnavailable`."""

    def __init__(self, url: str) -> None:
        """Raises `SettingInvalid` for a URL whose file system is unknown, or not installed."""
        self._url = url
        if "://" in url:
            try:
                _ = self._place
            except (ImportError, TypeError, ValueError) as unfit:
                raise SettingInvalid(f"batch.files is {url}, for fsspec: {unfit}") from unfit
            except OSError:
                pass  # it is away for now, and looked for again by each call

    @cached_property
    def _place(self) -> tuple[Any, str]:
        """The file system, and the folder in it."""
        from fsspec.core import url_to_fs  # slow to import, and most servers never need it

        return url_to_fs(self._url)  # type: ignore[no-any-return]

    def _path(self, key_id: str, name: str) -> str:
        return f"{self._place[1]}/{key_id}/{name}"

    @property
    def _is_local(self) -> bool:
        return "file" in self._place[0].protocol

    def create(self, key_id: str, name: str) -> IO[bytes]:
        """A new file, to be ended with `sync`."""
        path = self._path(key_id, name)
        with storage_faults():
            if self._is_local:
                Path(path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                return os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb")
            self._place[0].makedirs(path.rpartition("/")[0], exist_ok=True)
            opened: IO[bytes] = self._place[0].open(path, "wb")
            return opened

    def sync(self, file: IO[bytes], key_id: str, name: str) -> None:
        """Close *file*, so that it outlives a power cut."""
        with storage_faults():
            try:
                file.flush()
                if self._is_local:
                    os.fsync(file.fileno())
            finally:
                file.close()
            if self._is_local:
                sync_folder(Path(self._path(key_id, name)).parent)

    def open(self, key_id: str, name: str) -> IO[bytes]:
        with storage_faults():
            opened: IO[bytes] = self._place[0].open(self._path(key_id, name), "rb")
            return opened

    def remove(self, key_id: str, name: str) -> None:
        """Remove a file, or a folder and all in it; nothing if it is not there."""
        with storage_faults(), suppress(FileNotFoundError):
            self._place[0].rm(self._path(key_id, name), recursive=True)


class FileWriter:
    """A file that is written in pieces: used on the event loop, writes on threads."""

    def __init__(self, storage: FileStorage, key_id: str, name: str) -> None:
        self.byte_count = 0
        self._storage = storage
        self._place = (key_id, name)
        self._file: IO[bytes] | None = None
        self._piece = bytearray()
        self._turn = asyncio.Lock()
        self._writing: asyncio.Future[None] | None = None

    async def write(self, content: bytes | memoryview) -> None:
        self._piece += content
        self.byte_count += len(content)
        if len(self._piece) >= PIECE_BYTES:
            await self._write_piece()

    async def close(self) -> None:
        """All of it is on the disk when this returns."""
        await self._write_piece()
        assert self._file is not None
        syncing = asyncio.to_thread(self._storage.sync, self._file, *self._place)
        self._writing = asyncio.ensure_future(syncing)
        await asyncio.shield(self._writing)

    async def abort(self) -> None:
        """Remove what was written, as far as that can be done."""
        if self._writing is not None:  # its task may be cancelled, but not its thread
            await asyncio.wait([self._writing])

        def remove() -> None:
            with suppress(OSError):  # a full disk, when the rest is flushed
                if self._file is not None:
                    self._file.close()
            self._storage.remove(*self._place)

        await asyncio.to_thread(remove)

    async def _write_piece(self) -> None:
        async with self._turn:
            piece, self._piece = self._piece, bytearray()
            self._writing = asyncio.ensure_future(asyncio.to_thread(self._write, piece))
            await asyncio.shield(self._writing)

    def _write(self, piece: bytearray) -> None:
        if self._file is None:
            self._file = self._storage.create(*self._place)
        with storage_faults():
            self._file.write(piece)


class Files:
    """The files of all keys, on the event loop."""

    def __init__(self, store: JobStore, limits: BatchLimits, *, url: str) -> None:
        self.limits = limits
        self.storage = FileStorage(url)
        self._store = store

    async def begin(self, key_id: str, purpose: str) -> "NewFile":
        """A file to be written, then kept or dropped. Raises `FieldInvalid`, `StoreUnavailable`."""
        record = await asyncio.to_thread(self._store.add_file, key_id, purpose)
        return NewFile(self, self._store, record)

    async def find(self, key_id: str, file_id: str) -> FileRecord:
        return await asyncio.to_thread(self._store.find_file, key_id, file_id)

    async def read(self, key_id: str, name: str) -> AsyncGenerator[bytes]:
        """The bytes of a file, in pieces. Raises `StoreUnavailable`."""
        opened = await asyncio.to_thread(self.storage.open, key_id, name)

        def read_piece() -> bytes:
            with storage_faults():
                return opened.read(PIECE_BYTES)

        try:
            while piece := await asyncio.to_thread(read_piece):
                yield piece
        finally:
            opened.close()

    async def delete(self, key_id: str, file_id: str) -> None:
        """Raises `ResourceUnknown`, `FieldInvalid` where a batch job reads it."""
        record = await asyncio.to_thread(self._store.delete_file, key_id, file_id)
        with suppress(StoreUnavailable):  # its record is deleted, and a sweep will remove it
            await asyncio.to_thread(self._remove, record)

    async def sweep(self) -> None:
        """Remove what was deleted, has expired, or was never written to its end."""
        for record in await asyncio.to_thread(self._store.dead_files):
            with suppress(StoreUnavailable):  # the next sweep tries again
                await asyncio.to_thread(self._remove, record)

    def _remove(self, record: FileRecord) -> None:
        self.storage.remove(record.key_id, record.id)
        self._store.forget_file(record.id)


class NewFile(FileWriter):
    """A file of a key while it is written. It is not found before it is kept."""

    def __init__(self, files: Files, store: JobStore, record: FileRecord) -> None:
        super().__init__(files.storage, record.key_id, record.id)
        self._limits = files.limits
        self._store = store
        self.record = record

    async def receive(self, content: bytes) -> None:
        """Write what a client sends. Raises what `check_size` does."""
        self.check_size(self.byte_count + len(content))
        await self.write(content)

    def check_size(self, byte_count: int) -> None:
        """Raise `BodyTooLarge` beyond the limit of one file."""
        bytes_max = self._limits.file_bytes_max
        if byte_count > bytes_max:
            raise BodyTooLarge(
                f"The file has more than {bytes_max:,} bytes. Split it into several."
            )

    async def finished(self, filename: str, *, expires_s: int | None) -> FileRecord:
        """Close it; the record to keep it with."""
        await self.close()
        record = replace(self.record, filename=filename, byte_count=self.byte_count)
        if expires_s is None:
            return record
        return replace(record, expires_us=record.created_us + expires_s * 1_000_000)

    async def keep(self, filename: str, *, expires_s: int | None) -> FileRecord:
        """Close it, and let it be found. Raises `FieldInvalid` where its key has no room for it."""
        record = await self.finished(filename, expires_s=expires_s)
        await asyncio.to_thread(self._store.keep_file, record)
        return record

    async def drop(self) -> None:
        """Remove it; what cannot be removed now, a sweep will remove."""
        with suppress(StoreUnavailable):
            await self.abort()
            await asyncio.to_thread(self._store.forget_file, self.record.id)


@contextmanager
def storage_faults() -> Iterator[None]:
    """Raise `StoreUnavailable` for an error of the storage."""
    try:
        yield
    except OSError as fault:
        reason = fault.strerror or "the storage does not answer"
        raise StoreUnavailable(
            f"Files cannot be read or written right now: {reason}. Please try again later.",
            retry_after_s=RETRY_AFTER_S,
        ) from fault
