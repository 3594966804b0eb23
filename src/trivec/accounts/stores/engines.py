"""SQLAlchemy engines of the two databases, with the durability and time-outs that we promise.

Each store has three: one that writes, over a single connection; one that reads beside it; and one
for long sums, so that these never hold a connection that keys are checked over.
"""

import logging
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

from sqlalchemy import Connection, Dialect, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool

from trivec.accounts.keys import write_whole
from trivec.core.errors import SettingInvalid

LOCK_STEP_S = 0.0003
LOCK_WAIT_S = 3.0  # others hold it for a commit, as long as the disk takes; longer is a fault
READERS_MAX = 4
SQLITE_FILE = "trivec.sqlite3"
POSTGRES_DRIVER = "postgresql+psycopg"
POSTGRES_ARGUMENTS: dict[str, Any] = {
    "connect_timeout": 3,  # less than `CALL_S_MAX`: before, there is nothing to break off
    "application_name": "trivec",
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 5_000,  # milliseconds
    "autocommit": True,  # what begins a transaction says what holds in it
}
# Durable whatever the server's default is. A node that is cut off or stopped inside a transaction
# would otherwise keep its rows locked for hours; the other nodes wait a little longer than its limit.
# Set in each transaction, since behind pgbouncer the next one has another session.
BEGIN_WRITING = (
    "BEGIN; SET LOCAL lock_timeout = 2000; SET LOCAL statement_timeout = 10000; "
    "SET LOCAL idle_in_transaction_session_timeout = 1500; SET LOCAL synchronous_commit = "
)
BEGIN_DURABLE, BEGIN_FORGETFUL = BEGIN_WRITING + "on", BEGIN_WRITING + "off"
BEGIN_READING = "BEGIN READ ONLY; SET LOCAL statement_timeout = 60000"


@dataclass(frozen=True, slots=True)
class Engines:
    """Every way into one database."""

    writing: Engine  # a commit is on disk when it returns
    reading: Engine
    summing: Engine  # reads too, one sum at a time
    begin: Callable[[Any, bool], None]  # on the driver's connection of `writing`; whether durable
    interrupt: Callable[[], None]  # the calls of other threads
    listening: Engine | None = None  # for notices of changed keys, where the database sends them

    def dispose(self) -> None:
        """Drop every idle connection but the listening one; the next use makes new ones."""
        for engine in (self.writing, self.reading, self.summing):
            engine.dispose()


def is_pooled(raw: Any) -> bool:
    """Whether a connection to Postgres has another session behind it from time to time."""
    return raw.prepare_threshold is None


def sqlite_engines(file: Path) -> Engines:
    """One file in WAL mode, readable by its owner only."""
    url = URL.create("sqlite+pysqlite", database=str(file))
    writing = _engine(url, 1, timeout=0, isolation_level=None)  # waits in `_with_lock` instead
    reading = _engine(url, READERS_MAX, timeout=LOCK_WAIT_S, isolation_level=None)
    summing = _engine(url, 1, timeout=LOCK_WAIT_S, isolation_level=None)

    def make_private(*_: object) -> None:
        # An existing file is not opened: a process that closes it loses every lock it holds on it,
        # those of SQLite's connections included. Another process that leaves then takes itself for
        # the last one and deletes the journal, and later commits are lost.
        with suppress(OSError):  # SQLite's own message on the folder is better
            if not file.exists():
                write_whole(file, b"", replaces=False)

    is_durable: bool | None = None  # as last set on the writing connection

    def open_for_writing(raw: sqlite3.Connection, _: object) -> None:
        nonlocal is_durable
        is_durable = None
        try:
            _with_lock(lambda: raw.execute("PRAGMA journal_mode=WAL"))
            raw.execute("PRAGMA foreign_keys=ON")
            raw.execute("PRAGMA journal_size_limit=67108864")  # 64 MiB of it are kept
        except sqlite3.Error:
            raw.close()  # otherwise the next connection finds the file as this one did
            raise

    def begin(raw: Any, durable: bool) -> None:
        def with_lock() -> None:
            # The pragma may read the file, and so need the lock too. The driver by itself would
            # begin with a shared lock, and take the one for writing too late.
            nonlocal is_durable
            if durable is not is_durable:
                raw.execute("PRAGMA synchronous=FULL" if durable else "PRAGMA synchronous=NORMAL")
                is_durable = durable
            raw.execute("BEGIN IMMEDIATE")

        _with_lock(with_lock)

    event.listen(writing, "connect", open_for_writing)
    event.listen(writing, "begin", lambda made: begin(made.connection.driver_connection, True))
    for engine in (reading, summing):
        event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA query_only=ON"))
        event.listen(engine, "begin", lambda made: made.exec_driver_sql("BEGIN"))
    for engine in (writing, reading, summing):
        event.listen(engine, "do_connect", make_private)
    # Waiting for a lock has a bound of its own, and a wait for the disk cannot be interrupted.
    return Engines(writing, reading, summing, begin, interrupt=lambda: None)


def memory_engines() -> Engines:
    """A database that ends with the process: one connection, which all threads take in turn."""
    url = URL.create("sqlite+pysqlite")
    engine = _engine(url, 1, isolation_level=None, check_same_thread=False)
    event.listen(engine, "begin", lambda made: made.exec_driver_sql("BEGIN"))
    return Engines(engine, engine, engine, lambda raw, _: raw.execute("BEGIN"), lambda: None)


def postgres_engines(database_url: str) -> Engines:
    """A server that may go away and come back. Raises `SettingInvalid` for an unfit URL."""
    try:
        url = make_url(database_url)
    except ArgumentError:  # whose message shows the password
        raise SettingInvalid(
            "database_url is not a URL; it looks like postgresql://USER:PASSWORD@HOST:PORT/DATABASE"
        ) from None
    if url.drivername not in ("postgres", "postgresql", POSTGRES_DRIVER):
        raise SettingInvalid(
            f"database_url begins with {url.drivername}; only postgresql:// is understood, "
            "and without it the store is a SQLite file in the data folder"
        )
    url = url.set(drivername=POSTGRES_DRIVER)
    # It warns of errors it ignores while cleaning up after one that it raises, which we log.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    writing, reading, summing, listening = (
        _engine(url, connections_max, **POSTGRES_ARGUMENTS)
        for connections_max in (1, READERS_MAX, 1, 1)
    )
    opened: WeakSet[Any] = WeakSet()
    opening = Lock()

    def connect(dialect: Dialect, _: object, given: Sequence[Any], named: dict[str, Any]) -> Any:
        raw = dialect.connect(*given, **named)
        with opening:
            opened.add(raw)
        (session,) = raw.execute("SELECT pg_backend_pid()").fetchone()
        if session != raw.info.backend_pid:  # through pgbouncer, where no statement stays prepared
            raw.prepare_threshold = None
        return raw

    def interrupt() -> None:
        # The kernel of a server that hangs acknowledges what it is sent, so no time-out of TCP's
        # ends the wait.
        with opening:
            connections = list(opened)
        for raw in connections:
            with (
                suppress(OSError, raw.OperationalError),  # it is closed already
                socket.socket(fileno=os.dup(raw.fileno())) as duplicate,
            ):
                duplicate.shutdown(socket.SHUT_RDWR)

    def begin(raw: Any, durable: bool) -> None:
        raw.execute(BEGIN_DURABLE if durable else BEGIN_FORGETFUL, prepare=False)

    def begin_reading(made: Connection) -> None:
        raw: Any = made.connection.driver_connection
        raw.execute(BEGIN_READING, prepare=False)

    event.listen(writing, "begin", lambda made: begin(made.connection.driver_connection, True))
    event.listen(reading, "begin", begin_reading)
    event.listen(summing, "begin", begin_reading)
    for engine in (writing, reading, summing, listening):
        event.listen(engine, "do_connect", connect)
    return Engines(writing, reading, summing, begin, interrupt, listening)


def _engine(url: URL, connections_max: int, **connect_args: Any) -> Engine:
    try:
        return create_engine(
            url,
            poolclass=QueuePool,
            connect_args=connect_args,
            hide_parameters=True,
            pool_size=connections_max,
            max_overflow=0,
            pool_timeout=LOCK_WAIT_S,
            paramstyle="qmark" if url.get_backend_name() == "sqlite" else "format",  # positional
        )
    except ModuleNotFoundError as missing:
        raise SettingInvalid(
            "database_url needs the Postgres driver; run: pip install 'trivec[postgres]'"
        ) from missing


def _with_lock(work: Callable[[], object]) -> object:
    """Try *work* until no other connection holds the lock it needs, for up to `LOCK_WAIT_S`.

    SQLite's busy handler backs off to a tenth of a second, so that one busy process starves another
    for seconds; steps shorter than a commit do not. And it does not wait at all where two processes
    turn a new file to WAL.
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
