"""A statement that every request runs: turned into SQL once, then only bound.

SQLAlchemy's own path costs as much again as SQLite's work each time, for choices that never change.
Values are still bound by the driver, never written into the text.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, CursorResult, Dialect
from sqlalchemy.sql import ClauseElement

from trivec.accounts.stores.rows import Values


class Compiled:
    """One statement in one dialect; *names* are those of the values that will be bound."""

    def __init__(self, statement: ClauseElement, dialect: Dialect, names: Sequence[str]) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=list(names))
        self._sql = str(compiled)
        self._positions: Sequence[str] | None = getattr(compiled, "positiontup", None)

    def run(self, connection: Connection, values: Sequence[Values]) -> CursorResult[Any]:
        """Once for each of *values*; the rows found, where there is but one."""
        bound: list[Any] = list(values)
        if self._positions is not None:
            bound = [tuple(one[name] for name in self._positions) for one in values]
        return connection.exec_driver_sql(self._sql, bound if len(bound) > 1 else bound[0])
