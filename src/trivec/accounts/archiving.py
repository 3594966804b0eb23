"""Moves old ledger rows out of the store into a file, so that a crash loses and doubles none.

Each batch is on disk in the file before the store lets go of it. Whatever the file holds already is
deleted from the store first; a note in the data folder names the file of a run that was cut off, so
that the next run settles it whichever file it writes to.
"""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from trivec.accounts.archive_file import ArchiveFile, Row, sync_folder
from trivec.core.errors import SettingInvalid, StoreRefused

BATCH_ROWS = 2_000  # deleted in some ten milliseconds, and other writers get their turn after each
NOTE = "archive-unfinished"


class OldLedger(Protocol):
    """What is asked of a store; each call is one transaction. Raises `StoreUnavailable`."""

    def archiving(self) -> AbstractContextManager[None]: ...
    def oldest_rows(self, *, from_us: int, before_us: int, limit: int) -> list[Row]: ...
    def rows_numbered(self, sequences: Sequence[int]) -> list[Row]: ...
    def drop_rows(self, archived: Sequence[Row]) -> None: ...
    def end_archive(self, before_us: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to move, and where to."""

    before_us: int  # a UTC day's begin, microseconds since the epoch
    file: Path
    data_dir: Path  # holds the note
    batch_rows: int = BATCH_ROWS


@dataclass(frozen=True, slots=True)
class Archived:
    """What a run came to."""

    rows: int  # moved out of the store
    byte_count: int  # of the whole file
    file: Path | None  # None: there was no row, and no file


def archive(store: OldLedger, plan: Plan, *, told: Callable[[int], None]) -> Archived:
    """Move every row before `plan.before_us`; *told* is called with the rows moved so far.

    Raises `SettingInvalid` for a file that cannot be used, `StoreRefused` where another run is at
    work, `StoreUnavailable`. Each of them may come after some batches: the next run goes on.
    """
    with _alone(plan.data_dir), store.archiving():
        return _Run(store, plan, told).all()


class _Run:
    def __init__(self, store: OldLedger, plan: Plan, told: Callable[[int], None]) -> None:
        self._store = store
        self._plan = plan
        self._told = told
        self._note = Note(plan.data_dir)
        self._moved = 0

    def all(self) -> Archived:
        file = self._plan.file.absolute()
        unfinished = self._note.read()
        if unfinished is not None:
            self._check_is_there(unfinished)
            if unfinished != file:
                self._settle_other(unfinished)
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

    def _oldest(self, from_us: int) -> list[Row]:
        return self._store.oldest_rows(
            from_us=from_us, before_us=self._plan.before_us, limit=self._plan.batch_rows
        )

    def _move(self, file: ArchiveFile, rows: list[Row]) -> None:
        """One batch. Where the store fails nobody knows whether it let go: the note stays."""
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

    def _settle(self, file: ArchiveFile, *, may_be_torn: bool) -> None:
        """Delete from the store what *file* holds: of a run cut off, or of a store put back."""
        for archived in file.members(may_be_torn=may_be_torn):
            # Whole rows are compared: SQLite gives a number again once all later rows are gone.
            here = self._store.rows_numbered([row["sequence"] for row in archived])
            if both := [row for row in here if row in archived]:
                self._store.drop_rows(both)
                self._count(len(both))

    def _check_is_there(self, unfinished: Path) -> None:
        if not unfinished.exists():
            raise SettingInvalid(
                f"the last run wrote to {unfinished} and was cut off, and that file is gone: put it "
                f"back, or, if it is lost for good, delete {self._note.path}"
            )

    def _settle_other(self, unfinished: Path) -> None:
        with closing(ArchiveFile(unfinished)) as file:
            self._settle(file, may_be_torn=True)
        self._note.clear()

    def _count(self, rows: int) -> None:
        self._moved += rows
        self._told(self._moved)


class Note:
    """Names the file of a run that has begun and not ended. Raises `SettingInvalid`."""

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


@contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """Keep a second run of this machine out; the system lets go of the lock of one that was killed."""
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
