"""A statement that every request runs: turned into SQL once, then handed to the driver as it is.

SQLAlchemy's own path costs several times SQLite's work each time, for choices that never change.
Values are still bound by the driver, never written into the text.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Dialect, Table, bindparam, insert
from sqlalchemy.sql import ClauseElement

from trivec.accounts.stores.rows import Values

ROWS_MAX = 32  # of one INSERT
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


class Append:
    """Rows for the end of *table*, many in one statement.

    A driver lets go of the interpreter's lock for each statement, and waits for the event loop to
    have it back: one statement a row made a crowd's commit slower the larger it was.
    """

    def __init__(self, table: Table, dialect: Dialect, names: Sequence[str]) -> None:
        self._table = table
        self._dialect = dialect
        self._names = names
        self._of_count: dict[int, Compiled] = {}

    def run(self, cursor: Any, rows: Sequence[Values]) -> None:
        """In their order. Powers of two, so that few statements ever have to be made."""
        start = 0
        while start < len(rows):
            count = min(ROWS_MAX, 1 << ((len(rows) - start).bit_length() - 1))
            some = rows[start : start + count]
            values = {
                f"{name}_{i}": row[name] for i, row in enumerate(some) for name in self._names
            }
            self._statement(count).run(cursor, [values])
            start += count

    def _statement(self, count: int) -> Compiled:
        if count not in self._of_count:
            rows = [{name: f"{name}_{i}" for name in self._names} for i in range(count)]
            bound: list[dict[str, Any]] = [
                {name: bindparam(label) for name, label in row.items()} for row in rows
            ]
            statement = insert(self._table).inline().values(bound)
            names = [label for row in rows for label in row.values()]
            self._of_count[count] = Compiled(statement, self._dialect, names)
        return self._of_count[count]
