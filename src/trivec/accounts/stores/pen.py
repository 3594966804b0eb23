"""The one connection that writes: kept open, and used without SQLAlchemy's machinery.

Taking it from a pool and beginning there cost three times what SQLite does for a row. Whoever writes
holds it for one transaction; after a fault the next one begins with a new connection.
"""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from threading import Lock
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from trivec.accounts.stores.connect import Engines


class Pen:
    """Usable from any thread, by one at a time."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._turn = Lock()
        self._connection: Connection | None = None

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction through SQLAlchemy, committed at the end; nothing is kept open for it."""
        with self._turn:
            if self._connection is None:
                with self._engines.writing.begin() as connection:
                    yield connection
            else:
                with self._connection.begin():
                    yield self._connection

    @contextmanager
    def quickly(self, *, notes_only: bool) -> Iterator[Any]:
        """A transaction on the driver's own cursor, for `Compiled`; raises the driver's errors.

        *notes_only*: it survives this process, but perhaps not a power cut.
        """
        with self._turn:
            raw = self._held().connection.driver_connection
            assert raw is not None
            try:
                self._engines.begin(raw, notes_only=notes_only)
                with closing(raw.cursor()) as cursor:  # an open one keeps a closed file in use
                    yield cursor
                raw.commit()
            except BaseException:
                with suppress(self._engines.writing.dialect.loaded_dbapi.Error):
                    raw.rollback()
                raise

    def drop(self) -> None:
        """Close the connection, whatever state it is in; the next transaction makes another."""
        with self._turn:
            connection, self._connection = self._connection, None
            if connection is not None:
                with suppress(SQLAlchemyError):
                    connection.invalidate()
                connection.close()

    def _held(self) -> Connection:
        if self._connection is None:
            self._connection = self._engines.writing.connect()
        return self._connection
