"""Archive of old ledger rows: moved out of the store into a file, so that a crash loses and doubles none.

The file holds JSON lines, one gzip member a batch. Each batch is synced to the file before it is
deleted from the store. Rows that the file holds already are deleted from the store first. A note in
the data folder names the file of a run that was cut off, and the next run settles that file first,
whichever file it writes to itself.
"""

import fcntl
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from trivec.accounts.keys import sync_folder
from trivec.accounts.stores.sql import SqlStore
from trivec.accounts.stores.tables import Values
from trivec.core.errors import SettingInvalid, StoreRefused

BATCH_ROWS = 2_000  # deleted in some ten milliseconds; other writers get the lock after each
NOTE = "archive-unfinished"
# gzip: deflate, with a name, without a time, of an unknown system; and the name. The bytes after the
# last sound member are known by it to be the start of one of ours.
HEADER = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + b"ledger.jsonl\0"
GZIP_WINDOW = 31  # for zlib: a gzip header and trailer around it
CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ArchivePlan:
    """What to move, and where to."""

    before_us: int  # the beginning of a UTC day, microseconds since the epoch
    file: Path
    data_dir: Path  # holds the note
    batch_rows: int = BATCH_ROWS


@dataclass(frozen=True, slots=True)
class Archived:
    """The outcome of a run."""

    rows: int  # moved out of the store
    byte_count: int  # of the whole file
    file: Path | None  # None: there was no row, and no file


def archive(store: SqlStore, plan: ArchivePlan, *, told: Callable[[int], None]) -> Archived:
    """Move every row before `plan.before_us`; *told* is called with the rows moved so far.

    Raises `SettingInvalid` for a file that cannot be used, `StoreRefused` where another run is at
    work, `StoreUnavailable`. Each of them may come after some batches: the next run goes on.
    """
    with _only_run_in(plan.data_dir), store.archiving():
        return _Run(store, plan, told).move_all()


class _Run:
    """One run, from settling what an earlier one left to the last batch."""

    def __init__(self, store: SqlStore, plan: ArchivePlan, told: Callable[[int], None]) -> None:
        self._store = store
        self._plan = plan
        self._told = told
        self._note = ArchiveJournal(plan.data_dir)
        self._moved = 0

    def move_all(self) -> Archived:
        file = self._plan.file.absolute()
        unfinished = self._note.read()
        if unfinished is not None and not unfinished.exists():
            raise SettingInvalid(
                f"the last run wrote to {unfinished} and was cut off, and that file is gone: put it "
                f"back, or, if it is lost for good, delete {self._note.path}"
            )
        if unfinished is not None and unfinished != file:
            with closing(ArchiveFile(unfinished)) as opened:
                self._settle(opened, may_be_torn=True)
            self._note.clear()
        from_us = 0
        if not file.exists() and not self._oldest(from_us):
            self._store.end_archive(self._plan.before_us)
            return Archived(self._moved, 0, None)
        with closing(ArchiveFile(file)) as opened:
            self._settle(opened, may_be_torn=unfinished == file)
            self._note.write(file)
            while rows := self._oldest(from_us):
                self._move(opened, rows)
                from_us = rows[-1]["time_us"]
            self._store.end_archive(self._plan.before_us)
            self._note.clear()
            return Archived(self._moved, opened.byte_count, file)

    def _oldest(self, from_us: int) -> list[Values]:
        return self._store.oldest_rows(
            from_us=from_us, before_us=self._plan.before_us, limit=self._plan.batch_rows
        )

    def _move(self, file: "ArchiveFile", rows: list[Values]) -> None:
        """One batch. Where the store fails it is not known whether it deleted: the note stays."""
        before = file.byte_count
        try:
            file.append(rows)
        except SettingInvalid:
            if file.is_whole():  # what could not be written was taken back
                self._note.clear()
            raise
        try:
            self._store.drop_rows(rows)
        except StoreRefused:
            file.cut(before)  # another run has moved them
            raise
        self._count(len(rows))

    def _settle(self, file: "ArchiveFile", *, may_be_torn: bool) -> None:
        """Delete from the store what *file* holds: of a run cut off, or of a store put back."""
        for archived in file.members(may_be_torn=may_be_torn):
            # Whole rows are compared: SQLite gives a sequence again once all later rows are gone.
            here = self._store.rows_numbered([row["sequence"] for row in archived])
            if both := [row for row in here if row in archived]:
                self._store.drop_rows(both)
                self._count(len(both))

    def _count(self, rows: int) -> None:
        self._moved += rows
        self._told(self._moved)


class ArchiveJournal:
    """Name of the file of a run that has begun and not ended. Raises `SettingInvalid`."""

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / NOTE

    def read(self) -> Path | None:
        with self._explained():
            return Path(os.fsdecode(self.path.read_bytes())) if self.path.exists() else None

    def write(self, file: Path) -> None:
        """Whole or not at all, and on disk."""
        draft = self.path.with_name(f"{NOTE}.draft")
        with self._explained():
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                out.write(os.fsencode(file))
                out.flush()
                os.fsync(out.fileno())
            draft.replace(self.path)
            sync_folder(self.path.parent)

    def clear(self) -> None:
        with self._explained():
            self.path.unlink(missing_ok=True)
            sync_folder(self.path.parent)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as fault:
            raise SettingInvalid(
                f"{self.path} cannot be read or written: {fault.strerror}; make the data folder "
                "writable and make room in it"
            ) from fault


class ArchiveFile:
    """One file, open and locked. Raises `SettingInvalid`, in one line, for what is wrong with it."""

    def __init__(self, path: Path) -> None:
        """Make it (mode 0600) where it is absent. Raises `StoreRefused` where a run has it open."""
        self.path = path
        is_new = not path.exists()
        with self._explained():
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        try:
            with self._explained():
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_new:
                    sync_folder(path.parent)
        except BaseException:
            self.close()
            raise
        self.byte_count = 0  # up to the end of the last sound member that `members` has read

    def members(self, *, may_be_torn: bool) -> Iterator[list[Values]]:
        """The rows of each member; to be read to the end before anything is appended.

        *may_be_torn*: a run into this file was cut off, and an incomplete last member is cut away.
        """
        size = os.fstat(self._file.fileno()).st_size
        while self.byte_count < size:
            found = self._member()
            if found is None:
                self._cut_rest(may_be_torn=may_be_torn)
                return
            content, self.byte_count = found
            try:
                rows: list[Values] = [json.loads(line) for line in content.splitlines()]
            except ValueError as fault:
                raise SettingInvalid(
                    f"{self.path} is no archive of the ledger; name another file with --to"
                ) from fault
            for row in rows:
                row.pop("replayed", None)  # a column that the ledger had up to schema 0004
            yield rows

    def append(self, rows: Sequence[Values]) -> None:
        """On disk when it returns. A member that cannot be written whole is taken back."""
        content = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
        deflating = zlib.compressobj(6, zlib.DEFLATED, -15)
        deflated = deflating.compress(content) + deflating.flush()
        trailer = zlib.crc32(content).to_bytes(4, "little") + len(content).to_bytes(4, "little")
        member = memoryview(HEADER + deflated + trailer)
        with self._explained():
            try:
                self._file.seek(self.byte_count)
                written = 0
                while written < len(member):
                    written += self._file.write(member[written:]) or 0
                os.fsync(self._file.fileno())
            except OSError:
                self.cut(self.byte_count)
                raise
        self.byte_count += len(member)

    def cut(self, byte_count: int) -> None:
        """Keep the first *byte_count* bytes."""
        with self._explained():
            self._file.truncate(byte_count)
            os.fsync(self._file.fileno())
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
        """Cut an incomplete last member away. One that another follows was not cut off by a crash."""
        with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            is_followed = mapped.find(HEADER, self.byte_count + 1) >= 0
        if not may_be_torn or is_followed:
            raise SettingInvalid(
                f"{self.path} is damaged from byte {self.byte_count} on, or no archive of the "
                "ledger; nothing was changed in it: name another file with --to"
            )
        self.cut(self.byte_count)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as fault:
            raise StoreRefused(
                f"another run writes to {self.path}; wait until it has ended"
            ) from fault
        except OSError as fault:
            raise SettingInvalid(
                f"{self.path} cannot be written: {fault.strerror}; make room or the folder "
                "writable, or name another file with --to"
            ) from fault


@contextmanager
def _only_run_in(data_dir: Path) -> Iterator[None]:
    """Keep a second run of this machine out; the system frees the lock of one that was killed."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(data_dir, os.O_RDONLY)
    except OSError as fault:
        raise SettingInvalid(
            f"data_dir {data_dir} cannot be used: {fault.strerror}; choose another with --data-dir"
        ) from fault
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            raise StoreRefused(
                "another trivec db archive is at work in this data folder; wait until it has ended"
            ) from fault
        yield
    finally:
        os.close(folder)
