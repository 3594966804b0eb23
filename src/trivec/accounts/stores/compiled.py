"""A statement that every request runs: turned into SQL once, then handed to the driver as it is.

SQLAlchemy's own path costs several times SQLite's work each time, for choices that never change.
Values are still bound by the driver, never written into the text.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.sql import ClauseElement

from trivec.accounts.stores.rows import Values

FoundRow = tuple[Any, ...]  # the columns in the order in which the statement names them


class Compiled:
    """One statement in one dialect; *names* are those of the values that will be bound.

    A cursor is the driver's own, and so are the errors that are raised.
    """

    def __init__(self, statement: ClauseElement, dialect: Dialect, names: Sequence[str]) -> None:
        compiled = statement.compile(dialect=dialect, column_keys=list(names))
        self._sql = str(compiled)
        self._positions: Sequence[str] | None = getattr(compiled, "positiontup", None)

    def run(self, cursor: Any, values: Sequence[Values]) -> None:
        """Once for each of *values*."""
        if len(values) == 1:
            cursor.execute(self._sql, self._bound(values[0]))
        else:
            cursor.executemany(self._sql, [self._bound(one) for one in values])

    def find(self, cursor: Any, values: Values) -> list[FoundRow]:
        """Every row it finds."""
        cursor.execute(self._sql, self._bound(values))
        return list(cursor.fetchall())

    def _bound(self, values: Values) -> Any:
        if self._positions is None:
            return values
        return tuple([values[name] for name in self._positions])
