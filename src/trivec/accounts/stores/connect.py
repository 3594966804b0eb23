"""How the two databases are reached: engines whose transactions and time-outs are what we promise.

Each store has two: one that writes, over a single connection, and one that reads beside it.
"""

import os
import sqlite3
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from trivec.core.errors import SettingInvalid

NOTES_ONLY = "trivec_notes_only"
LOCK_STEP_S = 0.0003
LOCK_WAIT_S = 3.0  # others hold it for a commit, each as long as the disk takes; longer is a fault
CONNECT_S = 5
READERS_MAX = 4
WAL_BYTES_KEPT = 64 * 1024 * 1024
SQLITE_FILE = "trivec.sqlite3"
POSTGRES_DRIVER = "postgresql+psycopg"


@dataclass(frozen=True, slots=True)
class Engines:
    """Every way into one database."""

    writing: Engine  # a commit is on disk when it returns
    noting: Engine  # the same connection; a commit survives our death, perhaps not a power cut
    reading: Engine

    def dispose(self) -> None:
        """Drop every idle connection; the next use makes new ones."""
        self.writing.dispose()
        self.reading.dispose()


def sqlite_engines(file: Path) -> Engines:
    """One file in WAL mode."""
    url = URL.create("sqlite+pysqlite", database=str(file))
    wait = {"timeout": LOCK_WAIT_S}
    writing = _engine(url, wait, size=1)
    reading = _engine(url, wait, size=READERS_MAX)

    def make_private(*_: object) -> None:
        with suppress(OSError):  # SQLite says better what is wrong with the folder
            os.close(os.open(file, os.O_CREAT | os.O_RDWR, 0o600))

    def open_for_writing(raw: sqlite3.Connection, _: object) -> None:
        _pragmas(raw, "journal_mode=WAL", "foreign_keys=ON")
        _pragmas(raw, f"journal_size_limit={WAL_BYTES_KEPT}", "busy_timeout=0")

    def open_for_reading(raw: sqlite3.Connection, _: object) -> None:
        _pragmas(raw, "query_only=ON")

    for engine in (writing, reading):  # only its owner reads the ledger
        event.listen(engine, "do_connect", make_private)
    event.listen(writing, "connect", open_for_writing)
    event.listen(writing, "begin", _begin_writing)
    event.listen(reading, "connect", open_for_reading)
    event.listen(reading, "begin", _begin_reading)
    return _engines(writing, reading)


def postgres_engines(database_url: str) -> Engines:
    """A server that may go away and come back. Raises `SettingInvalid` for an unfit URL."""
    url = _postgres_url(database_url)
    # Durable whatever the server's own default is; and nothing that hangs, hangs for long.
    writing = "-c synchronous_commit=on -c lock_timeout=2000 -c statement_timeout=10000"
    reading = "-c default_transaction_read_only=on -c statement_timeout=60000"
    engines = _engines(
        _engine(url, _postgres_arguments(writing), size=1),
        _engine(url, _postgres_arguments(reading), size=READERS_MAX),
    )
    event.listen(engines.noting, "begin", _begin_noting)
    return engines


def _engines(writing: Engine, reading: Engine) -> Engines:
    return Engines(writing, writing.execution_options(**{NOTES_ONLY: True}), reading)


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
        "tcp_user_timeout": 10_000,  # milliseconds
        "options": options,
    }


def _begin_reading(connection: Connection) -> None:
    """Python's own driver begins no transaction for reading, and one for writing too late."""
    connection.exec_driver_sql("BEGIN")


def _begin_noting(connection: Connection) -> None:
    if connection.get_execution_options().get(NOTES_ONLY, False):
        connection.exec_driver_sql("SET LOCAL synchronous_commit = off")


def _begin_writing(connection: Connection) -> None:
    """Take the lock that all processes write under; sync the disk at the end unless it is a note.

    SQLite's own way of waiting backs off to a tenth of a second, and one busy process then starves
    another for seconds; steps shorter than a commit do not.
    """
    raw = connection.connection.driver_connection
    assert isinstance(raw, sqlite3.Connection)
    notes_only = connection.get_execution_options().get(NOTES_ONLY, False)
    level = "NORMAL" if notes_only else "FULL"
    deadline_s = time.monotonic() + LOCK_WAIT_S
    while time.monotonic() < deadline_s:
        try:
            _pragmas(raw, f"synchronous={level}")  # reads the file, so it may meet a lock as well
            raw.execute("BEGIN IMMEDIATE").close()
        except sqlite3.OperationalError as fault:
            if fault.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                break
            time.sleep(LOCK_STEP_S)
        else:
            return
    connection.exec_driver_sql("BEGIN IMMEDIATE")  # raises what SQLAlchemy would


def _pragmas(raw: sqlite3.Connection, *pragmas: str) -> None:
    """Before any transaction; the driver begins none on its own from here on."""
    raw.isolation_level = None
    for pragma in pragmas:
        raw.execute("PRAGMA " + pragma).close()
