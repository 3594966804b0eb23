"""How the two databases are reached: engines whose transactions and time-outs are what we promise.

Each store has three: one that writes, over a single connection, one that reads beside it, and one
for long sums, so that these never hold a connection that a key is checked over.
"""

import os
import secrets
import socket
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakSet

from sqlalchemy import Connection, Dialect, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError

from trivec.core.errors import SettingInvalid

LOCK_STEP_S = 0.0003
LOCK_WAIT_S = 3.0  # others hold it for a commit, each as long as the disk takes; longer is a fault
CONNECT_S = 3  # less than `CALL_S_MAX`: nothing can be broken off before there is a connection
READERS_MAX = 4
WAL_BYTES_KEPT = 64 * 1024 * 1024
SQLITE_FILE = "trivec.sqlite3"
POSTGRES_DRIVER = "postgresql+psycopg"


@dataclass(frozen=True, slots=True)
class Engines:
    """Every way into one database."""

    writing: Engine  # a commit is on disk when it returns
    reading: Engine
    summing: Engine  # reads too, one sum at a time
    begin: Callable[..., None]  # (driver's connection, notes_only=): how a transaction begins
    interrupt: Callable[[], None]  # break off what other threads wait for

    def dispose(self) -> None:
        """Drop every idle connection; the next use makes new ones."""
        self.writing.dispose()
        self.reading.dispose()
        self.summing.dispose()


def sqlite_engines(file: Path) -> Engines:
    """One file in WAL mode."""
    url = URL.create("sqlite+pysqlite", database=str(file))
    writing = _engine(url, {"timeout": 0}, size=1)  # whoever writes waits in `patiently`
    reading = _engine(url, {"timeout": LOCK_WAIT_S}, size=READERS_MAX)
    summing = _engine(url, {"timeout": LOCK_WAIT_S}, size=1)

    def make_private(*_: object) -> None:
        with suppress(OSError):  # SQLite says better what is wrong with the folder
            _make_private(file)

    def open_for_writing(raw: sqlite3.Connection, _: object) -> None:
        try:
            _patiently(lambda: _pragmas(raw, "journal_mode=WAL"))
            _pragmas(raw, "foreign_keys=ON", f"journal_size_limit={WAL_BYTES_KEPT}")
        except sqlite3.Error:
            raw.close()  # the next connection of this process would find the file as this one did
            raise

    def open_for_reading(raw: sqlite3.Connection, _: object) -> None:
        _pragmas(raw, "query_only=ON")

    for engine in (writing, reading, summing):  # only its owner reads the ledger
        event.listen(engine, "do_connect", make_private)
    event.listen(writing, "connect", open_for_writing)
    event.listen(writing, "begin", _begin_sqlite_through_sqlalchemy)
    for engine in (reading, summing):
        event.listen(engine, "connect", open_for_reading)
        event.listen(engine, "begin", _begin_reading)
    # Waiting for a lock has its own bound, and what waits for a disk cannot be broken off.
    return Engines(writing, reading, summing, begin_sqlite, interrupt=lambda: None)


def postgres_engines(database_url: str) -> Engines:
    """A server that may go away and come back. Raises `SettingInvalid` for an unfit URL."""
    url = _postgres_url(database_url)
    # Durable whatever the server's own default is; and nothing that hangs, hangs for long.
    writing = "-c synchronous_commit=on -c lock_timeout=2000 -c statement_timeout=10000"
    reading = "-c default_transaction_read_only=on -c statement_timeout=60000"
    writers = _engine(url, _postgres_arguments(writing), size=1)
    readers = _engine(url, _postgres_arguments(reading), size=READERS_MAX)
    summers = _engine(url, _postgres_arguments(reading), size=1)
    opened: WeakSet[Any] = WeakSet()
    opening = Lock()

    def connect(dialect: Dialect, _: object, given: Sequence[Any], named: dict[str, Any]) -> Any:
        raw = dialect.connect(*given, **named)
        with opening:
            opened.add(raw)
        return raw

    def interrupt() -> None:
        with opening:
            connections = list(opened)
        _shut(connections)

    for engine in (writers, readers, summers):
        event.listen(engine, "do_connect", connect)
    return Engines(writers, readers, summers, begin_postgres, interrupt)


def is_the_stores(fault: Exception, dialect: Dialect) -> bool:
    """Whether the driver means the store by it, and not the statement.

    A damaged file is plain `DatabaseError`.
    """
    driver = dialect.loaded_dbapi
    ours = (
        driver.IntegrityError,
        driver.DataError,
        driver.ProgrammingError,
        driver.NotSupportedError,
    )
    return isinstance(fault, driver.Error) and not isinstance(fault, ours)


def _engine(url: URL, connect_args: dict[str, Any], *, size: int) -> Engine:
    try:
        return create_engine(
            url, connect_args=connect_args, hide_parameters=True, pool_size=size, max_overflow=0
        )
    except ModuleNotFoundError as missing:
        raise SettingInvalid(
            "database_url needs the Postgres driver; run: pip install 'trivec[postgres]'"
        ) from missing


def _postgres_url(database_url: str) -> URL:
    """Also takes the spellings that hosts hand out; never shows the password that is in it."""
    try:
        url = make_url(database_url)
    except ArgumentError:
        raise SettingInvalid(
            "database_url is not a URL; it looks like postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        ) from None
    if url.drivername not in ("postgres", "postgresql", POSTGRES_DRIVER):
        raise SettingInvalid(
            f"database_url begins with {url.drivername}; only postgresql:// is understood, "
            "and without it the store is a SQLite file in the data folder"
        )
    return url.set(drivername=POSTGRES_DRIVER)


def _postgres_arguments(options: str) -> dict[str, Any]:
    return {
        "connect_timeout": CONNECT_S,
        "application_name": "trivec",
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
        "tcp_user_timeout": 5_000,  # milliseconds
        "options": options,
    }


def _shut(connections: Sequence[Any]) -> None:
    """End psycopg's *connections* under whoever waits on them: a backend that hangs still has a
    kernel that acknowledges what it is sent, so no time-out of TCP's ever ends the wait.
    """
    for raw in connections:
        with (
            suppress(OSError, raw.OperationalError),  # it is closed already
            socket.socket(fileno=os.dup(raw.fileno())) as ours,
        ):
            ours.shutdown(socket.SHUT_RDWR)


def _make_private(file: Path) -> None:
    """An empty file that only its owner reads, where there is none; one that is there is not opened.

    A process that closes a file loses every lock it holds on it, those of SQLite's connections too.
    Another process that leaves then takes itself for the last one and deletes the journal, and what
    is committed to it afterwards is lost.
    """
    if file.exists():
        return
    draft = file.with_name(f"{file.name}.{secrets.token_hex(8)}")
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        with suppress(FileExistsError):  # another process was quicker
            os.link(draft, file)
    finally:
        draft.unlink()


def _begin_reading(connection: Connection) -> None:
    """Python's own driver begins no transaction for reading, and one for writing too late."""
    connection.exec_driver_sql("BEGIN")


def begin_postgres(raw: Any, *, notes_only: bool = False) -> None:
    """The driver begins by itself. *notes_only*: the commit may be lost in a power cut."""
    if notes_only:
        raw.execute("SET LOCAL synchronous_commit = off").close()


def begin_sqlite(raw: sqlite3.Connection, *, notes_only: bool = False) -> None:
    """Take the lock that all processes write under; sync the disk at the end unless it is a note.

    Raises `sqlite3.DatabaseError`.
    """
    level = "synchronous=NORMAL" if notes_only else "synchronous=FULL"

    def begin() -> None:
        _pragmas(raw, level)  # may read the file, and so meet a lock as well
        raw.execute("BEGIN IMMEDIATE").close()

    _patiently(begin)


def _begin_sqlite_through_sqlalchemy(connection: Connection) -> None:
    raw = connection.connection.driver_connection
    assert isinstance(raw, sqlite3.Connection)
    try:
        begin_sqlite(raw)
    except sqlite3.DatabaseError as fault:  # damaged, too
        raise DatabaseError("BEGIN IMMEDIATE", None, fault) from fault


def _patiently(work: Callable[[], None]) -> None:
    """Do *work* as soon as no other connection holds what it needs, for up to `LOCK_WAIT_S`.

    SQLite's own way of waiting backs off to a tenth of a second, and one busy process then starves
    another for seconds; steps shorter than a commit do not. Nor does it wait at all where it might
    wait for ever, as when two processes that open a new file both turn it to WAL.
    """
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            return work()
        except sqlite3.OperationalError as fault:
            is_busy = fault.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not is_busy or time.monotonic() >= deadline_s:
                raise
        time.sleep(LOCK_STEP_S)


def _pragmas(raw: sqlite3.Connection, *pragmas: str) -> None:
    """Before any transaction; the driver begins none on its own from here on."""
    raw.isolation_level = None
    for pragma in pragmas:
        raw.execute("PRAGMA " + pragma).close()
