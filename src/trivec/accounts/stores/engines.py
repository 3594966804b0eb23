"""SQLAlchemy engines of the two databases, with the durability and time-outs that we promise.

Each store has three: one that writes, over a single connection; one that reads beside it; and one
for long sums, so that these never hold a connection that keys are checked over.
"""

import os
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

from sqlalchemy import Dialect, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from trivec.accounts.keys import write_whole
from trivec.core.errors import SettingInvalid

LOCK_STEP_S = 0.0003
LOCK_WAIT_S = 3.0  # others hold it for a commit, as long as the disk takes; longer is a fault
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
    # Begin on the driver's connection of `writing`; a commit that is not durable may be lost in a
    # power cut.
    begin: Callable[[Any, bool], None]
    interrupt: Callable[[], None]  # break off what other threads wait for

    def dispose(self) -> None:
        """Drop every idle connection; the next use makes new ones."""
        self.writing.dispose()
        self.reading.dispose()
        self.summing.dispose()


def sqlite_engines(file: Path) -> Engines:
    """One file in WAL mode."""
    url = URL.create("sqlite+pysqlite", database=str(file))
    writing = _engine(url, {"timeout": 0}, size=1)  # waits in `_with_lock` instead
    reading = _engine(url, {"timeout": LOCK_WAIT_S}, size=READERS_MAX)
    summing = _engine(url, {"timeout": LOCK_WAIT_S}, size=1)

    def make_private(*_: object) -> None:
        with suppress(OSError):  # SQLite says better what is wrong with the folder
            _make_private(file)

    def open_for_writing(raw: sqlite3.Connection, _: object) -> None:
        try:
            _with_lock(lambda: _pragmas(raw, "journal_mode=WAL"))
            _pragmas(raw, "foreign_keys=ON", f"journal_size_limit={WAL_BYTES_KEPT}")
        except sqlite3.Error:
            raw.close()  # the next connection would else find the file as this one did
            raise

    def open_for_reading(raw: sqlite3.Connection, _: object) -> None:
        _pragmas(raw, "query_only=ON")

    for engine in (writing, reading, summing):  # only its owner reads the ledger
        event.listen(engine, "do_connect", make_private)
    event.listen(writing, "connect", open_for_writing)
    event.listen(
        writing, "begin", lambda made: _begin_sqlite(made.connection.driver_connection, True)
    )
    for engine in (reading, summing):
        event.listen(engine, "connect", open_for_reading)
        # Python's own driver begins no transaction for reading.
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    # Waiting for a lock has its own bound, and what waits for a disk cannot be broken off.
    return Engines(writing, reading, summing, _begin_sqlite, interrupt=lambda: None)


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
        # A backend that hangs still has a kernel that acknowledges what it is sent, so no time-out of
        # TCP's ever ends the wait.
        with opening:
            connections = list(opened)
        for raw in connections:
            with (
                suppress(OSError, raw.OperationalError),  # it is closed already
                socket.socket(fileno=os.dup(raw.fileno())) as duplicate,
            ):
                duplicate.shutdown(socket.SHUT_RDWR)

    def begin(raw: Any, durable: bool) -> None:
        if not durable:  # else the driver begins with the first statement
            raw.execute("SET LOCAL synchronous_commit = off")

    for engine in (writers, readers, summers):
        event.listen(engine, "do_connect", connect)
    return Engines(writers, readers, summers, begin, interrupt)


def is_the_stores(fault: Exception, dialect: Dialect) -> bool:
    """Whether the store failed, and not a statement of ours. A damaged file is `DatabaseError`."""
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
            url,
            connect_args=connect_args,
            hide_parameters=True,
            pool_size=size,
            max_overflow=0,
            pool_timeout=LOCK_WAIT_S,
            paramstyle="qmark" if url.get_backend_name() == "sqlite" else "format",  # positional
        )
    except ModuleNotFoundError as missing:
        raise SettingInvalid(
            "database_url needs the Postgres driver; run: pip install 'trivec[postgres]'"
        ) from missing


def _postgres_url(database_url: str) -> URL:
    """With our driver, whichever way *database_url* is spelt; no error shows its password."""
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


def _make_private(file: Path) -> None:
    """Make an empty file that only its owner reads. One that is there is not opened.

    A process that closes a file loses every lock it holds on it, also those of SQLite's connections.
    Another process that leaves then takes itself for the last one and deletes the journal, and what
    is committed to it afterwards is lost.
    """
    if not file.exists():
        write_whole(file, b"", replaces=False)


def _begin_sqlite(raw: sqlite3.Connection, durable: bool) -> None:
    """Take the lock that all processes write under; the driver by itself would take it too late."""

    def begin() -> None:
        # The pragma may read the file, and so meet a lock as well.
        _pragmas(raw, "synchronous=FULL" if durable else "synchronous=NORMAL")
        raw.execute("BEGIN IMMEDIATE").close()

    _with_lock(begin)


def _with_lock(work: Callable[[], None]) -> None:
    """Do *work* as soon as no other connection holds the lock it needs, for up to `LOCK_WAIT_S`.

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
