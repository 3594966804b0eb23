"""Archive of old ledger rows: moved out of the store into a file; a crash loses and doubles none.

The file holds JSON lines, in a gzip member for each batch. A batch is synced to the file before it is
deleted from the store. A note in the data folder names the file of a run that was interrupted; the
next run, to whichever file, first deletes from the store what that file holds.
"""

import fcntl
import gzip
import io
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from trivec.accounts.keys import sync_folder, write_whole
from trivec.accounts.stores.sql import ALREADY_ARCHIVING, SqlStore
from trivec.accounts.stores.tables import Values, archive, counts, ledger
from trivec.accounts.utc import MINUTE_US
from trivec.core.errors import SettingInvalid, StoreRefused

BATCH_ROWS = 2_000  # deleted in some ten milliseconds; other writers get the lock after each
COUNTS_AT_ONCE = 5_000  # deleted in one transaction
COUNT_KEY = sa.tuple_(*counts.primary_key.columns)
NOTE = "archive-unfinished"
FILE_NAME = "ledger.jsonl"  # in each member's header
# gzip: deflate, with a name, without a time, of an unknown system; and the name. Bytes after the last
# sound member that begin with it are the start of one of ours.
HEADER = b"\x1f\x8b\x08\x08\0\0\0\0\0\xff" + FILE_NAME.encode() + b"\0"
GZIP_WINDOW = 31  # for zlib: a gzip header and trailer around it
CHUNK_BYTES = 256 * 1024
WRITABLE = "make the data folder writable and make room in it"
ANOTHER_FILE = "make room or the folder writable, or name another file with --to"


@dataclass(frozen=True, slots=True)
class Archived:
    """The outcome of a run."""

    rows: int  # moved out of the store
    byte_count: int  # of the whole file
    file: Path | None  # None: there was no row, and no file


@dataclass(slots=True)
class ArchiveRun:
    """One run, from what an earlier one left unfinished to the last batch."""

    store: SqlStore
    before_us: int  # the beginning of a UTC day, microseconds since the epoch
    file: Path
    data_dir: Path  # holds the note
    told: Callable[[int], None]  # called with the rows moved so far
    batch_rows: int = BATCH_ROWS
    moved: int = 0

    def run(self) -> Archived:
        """Move every row before `before_us`.

        Raises `SettingInvalid` for a file that cannot be used, `StoreRefused` where another run is
        at work, `StoreUnavailable`; also after some batches, and then the next run goes on.
        """
        with _explained(self.data_dir, "choose another with --data-dir"):
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(self.data_dir, os.O_RDONLY)
        try:
            with _explained(self.data_dir, WRITABLE):  # the lock ends with the process
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self.store.archiving():
                return self._move_all()
        finally:
            os.close(folder)

    @property
    def note(self) -> Path:
        return self.data_dir / NOTE

    def _move_all(self) -> Archived:
        file = self.file.absolute()
        unfinished = None
        with _explained(self.note, WRITABLE):
            if self.note.exists():
                unfinished = Path(os.fsdecode(self.note.read_bytes()))
        if unfinished is not None and not unfinished.exists():
            raise SettingInvalid(
                f"the last run wrote to {unfinished} and was cut off, and that file is gone: put it "
                f"back, or, if it is lost for good, delete {self.note}"
            )
        if unfinished is not None and unfinished != file:
            with closing(ArchiveFile(unfinished)) as opened:
                self._settle(opened, may_be_torn=True)
            self._clear_note()
        if not file.exists() and not self._oldest(0):
            self._end()
            return Archived(self.moved, 0, None)
        with closing(ArchiveFile(file)) as opened:
            self._settle(opened, may_be_torn=unfinished == file)
            with _explained(self.note, WRITABLE):
                write_whole(self.note, os.fsencode(file), replaces=True)
            rows = self._oldest(0)
            while rows:
                self._move(opened, rows)
                rows = self._oldest(rows[-1]["time_us"])
            self._end()
            self._clear_note()
            return Archived(self.moved, opened.byte_count, file)

    def _move(self, file: "ArchiveFile", rows: list[Values]) -> None:
        """One batch. Where the store fails it is not known whether it deleted: the note stays."""
        before = file.byte_count
        try:
            file.append(rows)
        except SettingInvalid:
            if file.is_whole():  # what could not be written was taken back
                self._clear_note()
            raise
        try:
            self._drop(rows)
        except StoreRefused:
            file.cut(before)  # another run has moved them
            raise

    def _settle(self, file: "ArchiveFile", *, may_be_torn: bool) -> None:
        """Delete from the store what *file* holds: of a run cut off, or of a store put back."""
        for archived in file.members(may_be_torn=may_be_torn):
            sequences = [row["sequence"] for row in archived]
            here = self._read(sa.select(ledger).where(ledger.c.sequence.in_(sequences)))
            # Whole rows are compared: SQLite gives a sequence again once all later rows are gone.
            if both := [row for row in here if row in archived]:
                self._drop(both)

    # The mark `archive.before_us` only grows. Triggers refuse to delete a row at or after it, and
    # rows before it are deleted in the transaction that moves it: a sum that reads the mark after
    # the rows knows what is missing.

    def _oldest(self, from_us: int) -> list[Values]:
        """The next rows to move, by time and sequence.

        *from_us* spares Postgres a walk over the index entries of rows that were just deleted.
        """
        is_old = sa.and_(ledger.c.time_us >= from_us, ledger.c.time_us < self.before_us)
        oldest = sa.select(ledger).where(is_old).order_by(ledger.c.time_us, ledger.c.sequence)
        return self._read(oldest.limit(self.batch_rows))

    def _read(self, statement: sa.Select[Any]) -> list[Values]:
        with self.store.reading() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def _drop(self, rows: list[Values]) -> None:
        """Delete *rows*, which are in the file, all or none."""
        with self.store.writing() as connection:
            _move_mark(connection, max(row["time_us"] for row in rows) + 1)
            sequences = [row["sequence"] for row in rows]
            deleted = connection.execute(sa.delete(ledger).where(ledger.c.sequence.in_(sequences)))
            if deleted.rowcount != len(rows):
                raise StoreRefused(ALREADY_ARCHIVING)
        self.moved += len(rows)
        self.told(self.moved)

    def _end(self) -> None:
        """Move the mark to `before_us` and delete the counts before it, some at a time."""
        with self.store.writing() as connection:
            _move_mark(connection, self.before_us)
        is_old = counts.c.minute < self.before_us // MINUTE_US
        next_keys = sa.select(*counts.primary_key.columns).where(is_old)
        next_keys = next_keys.order_by(*counts.primary_key.columns).limit(COUNTS_AT_ONCE)
        while True:
            with self.store.reading() as connection:
                found = connection.execute(next_keys).all()
            if not found:
                return
            last = tuple(found[-1])
            with self.store.writing() as connection:
                connection.execute(sa.delete(counts).where(is_old, last >= COUNT_KEY))
            next_keys = next_keys.where(last < COUNT_KEY)

    def _clear_note(self) -> None:
        with _explained(self.note, WRITABLE):
            self.note.unlink(missing_ok=True)
            sync_folder(self.note.parent)


class ArchiveFile:
    """One file, open and locked. Raises `SettingInvalid`, in one line, for what is wrong with it."""

    def __init__(self, path: Path) -> None:
        """Make it (mode 0600) where it is absent. Raises `StoreRefused` where a run has it open."""
        self.path = path
        self.byte_count = 0  # up to the end of the last sound member that `members` has read
        is_new = not path.exists()
        with _explained(path):
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        try:
            with _explained(path):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_new:
                    sync_folder(path.parent)
        except BaseException:
            self.close()
            raise

    def members(self, *, may_be_torn: bool) -> Iterator[list[Values]]:
        """The rows of each member; to be read to the end before anything is appended.

        *may_be_torn*: a run into this file was cut off, and an incomplete last member is cut away.
        """
        while not self.is_whole():
            content = self._next_member()
            if content is None:
                # A member that another follows was not cut off by a crash.
                with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    is_last = mapped.find(HEADER, self.byte_count + 1) < 0
                if may_be_torn and is_last:
                    self.cut(self.byte_count)
                    return
                raise SettingInvalid(
                    f"{self.path} is damaged from byte {self.byte_count} on, or no archive of the "
                    "ledger; nothing was changed in it: name another file with --to"
                )
            rows: list[Values] = [json.loads(line) for line in content.splitlines()]
            for row in rows:
                row.pop("replayed", None)  # a column that the ledger had up to schema 0004
            yield rows

    def append(self, rows: Sequence[Values]) -> None:
        """On disk when it returns. A member that cannot be written whole is taken back."""
        member = io.BytesIO()
        with gzip.GzipFile(FILE_NAME, "wb", 6, member, mtime=0) as packed:
            packed.writelines(
                json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows
            )
        left = member.getbuffer()
        with _explained(self.path):
            try:
                self._file.seek(self.byte_count)
                while left:
                    left = left[self._file.write(left) or 0 :]
                os.fsync(self._file.fileno())
            except OSError:
                self.cut(self.byte_count)
                raise
        self.byte_count += member.tell()

    def cut(self, byte_count: int) -> None:
        """Keep the first *byte_count* bytes."""
        with _explained(self.path):
            self._file.truncate(byte_count)
            os.fsync(self._file.fileno())
        self.byte_count = byte_count

    def is_whole(self) -> bool:
        """Whether it ends where its last sound member does."""
        return os.fstat(self._file.fileno()).st_size == self.byte_count

    def close(self) -> None:
        self._file.close()

    def _next_member(self) -> bytes | None:
        """The content of the member at `byte_count`, which moves to its end; None: it is unsound."""
        self._file.seek(self.byte_count)
        unpacking = zlib.decompressobj(GZIP_WINDOW)
        packed = self._file.read(CHUNK_BYTES)
        if not packed.startswith(HEADER):
            return None
        pieces = []
        try:
            while packed:
                pieces.append(unpacking.decompress(packed))
                if unpacking.eof:
                    self.byte_count = self._file.tell() - len(unpacking.unused_data)
                    return b"".join(pieces)
                packed = self._file.read(CHUNK_BYTES)
        except zlib.error:
            pass
        return None


def _move_mark(connection: sa.Connection, before_us: int) -> None:
    """To *before_us*, unless it is further on."""
    earlier = archive.c.before_us < before_us
    connection.execute(sa.update(archive).where(earlier).values(before_us=before_us))


@contextmanager
def _explained(path: Path, next_step: str = ANOTHER_FILE) -> Iterator[None]:
    """Raise `StoreRefused` where another run has locked *path*, `SettingInvalid` for other faults."""
    try:
        yield
    except BlockingIOError as fault:
        raise StoreRefused(
            f"another trivec db archive is at work on {path}; wait until it has ended"
        ) from fault
    except OSError as fault:
        raise SettingInvalid(f"{path} cannot be used: {fault.strerror}; {next_step}") from fault
