"""The ledger's old rows, as SQL: found in order, and deleted under the mark that allows it.

The mark is `archive.before_us`: triggers refuse to delete a row at or after it. It only grows, and
in the same transaction as the rows before it go, so whoever reads it last knows what is missing.
"""

from collections.abc import Sequence

from sqlalchemy import Connection, delete, select, tuple_, update

from trivec.accounts.allowance import MINUTE_US
from trivec.accounts.stores.rows import Values
from trivec.accounts.stores.schema import archive, counts, ledger

COUNTS_AT_ONCE = 5_000  # of one transaction
count_key = tuple_(*counts.primary_key.columns)


def archived_before_us(connection: Connection) -> int:
    """The mark, in microseconds since the epoch; 0 where nothing was ever archived."""
    return int(connection.scalar(select(archive.c.before_us)) or 0)


def oldest(connection: Connection, *, from_us: int, before_us: int, limit: int) -> list[Values]:
    """At most *limit* rows from *from_us* on and before *before_us*, by time and sequence.

    *from_us* spares Postgres a walk over the index entries of rows that were just deleted.
    """
    statement = (
        select(ledger)
        .where(ledger.c.time_us >= from_us, ledger.c.time_us < before_us)
        .order_by(ledger.c.time_us, ledger.c.sequence)
        .limit(limit)
    )
    return [dict(row) for row in connection.execute(statement).mappings()]


def numbered(connection: Connection, sequences: Sequence[int]) -> list[Values]:
    """Those rows that are there."""
    statement = select(ledger).where(ledger.c.sequence.in_(sequences))
    return [dict(row) for row in connection.execute(statement).mappings()]


def move_mark(connection: Connection, before_us: int) -> None:
    """To *before_us*, unless it is further on."""
    earlier = archive.c.before_us < before_us
    connection.execute(update(archive).where(earlier).values(before_us=before_us))


def drop(connection: Connection, rows: Sequence[Values]) -> int:
    """Move the mark past *rows* and delete them; how many of them were there."""
    move_mark(connection, max(row["time_us"] for row in rows) + 1)
    sequences = [row["sequence"] for row in rows]
    return connection.execute(delete(ledger).where(ledger.c.sequence.in_(sequences))).rowcount


def next_counts(
    connection: Connection, after: tuple[object, ...] | None, *, before_us: int
) -> tuple[object, ...] | None:
    """The primary key of the last of the next counts to drop together; None: there are none."""
    statement = (
        select(*counts.primary_key.columns)
        .where(counts.c.minute < before_us // MINUTE_US)
        .order_by(*counts.primary_key.columns)
        .limit(COUNTS_AT_ONCE)
    )
    if after is not None:
        statement = statement.where(count_key > after)
    found = connection.execute(statement).all()
    return tuple(found[-1]) if found else None


def drop_counts(connection: Connection, upto: tuple[object, ...], *, before_us: int) -> None:
    """Delete the counts of minutes before *before_us* whose key is at most *upto*."""
    is_old = counts.c.minute < before_us // MINUTE_US
    connection.execute(delete(counts).where(is_old, count_key <= upto))
