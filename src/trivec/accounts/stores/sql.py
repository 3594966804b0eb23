"""Store in SQLite or Postgres: the same statements on both, through SQLAlchemy Core.

A `Transaction` decides; this reads and locks the rows that it needs, and writes what has changed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from threading import Lock
from typing import Any, TypeAlias

from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Dialect,
    Row,
    Select,
    Table,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal_column,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError
from sqlalchemy.sql.dml import Insert

from trivec.accounts.ledger import (
    ERROR_FROM,
    Committed,
    Entry,
    KeyChanges,
    LedgerRow,
    RecordUsage,
    Reserve,
    Total,
    Transaction,
    keys_touched,
    name_taken,
    unavailable,
)
from trivec.accounts.rate_limits import Bucket
from trivec.accounts.stores import tables
from trivec.accounts.stores.engines import NO_SYNC, Engines, is_the_stores
from trivec.accounts.stores.tables import (
    Values,
    archive,
    buckets,
    counts,
    daily,
    key_of,
    key_revision,
    key_values,
    keys,
    ledger,
    probe,
    secret_values,
    secrets,
)
from trivec.accounts.types import Key, UsageBy, UsageLine, UsageQuery
from trivec.accounts.utc import DAY_US, MINUTE_US, day, moment
from trivec.core.errors import FieldInvalid, ResourceUnknown, StoreRefused

MINUTES_A_DAY = DAY_US // MINUTE_US
COUNTS_AT_ONCE = 5_000  # deleted in one transaction
ARCHIVE_LOCK = 7_472_697_666  # Postgres' advisory lock, beside the one for migrations
ALREADY_ARCHIVING = (
    "another trivec db archive is at work on this store; wait until it has ended, then try again"
)
NEXT_REVISION = (
    update(key_revision)
    .values(revision=key_revision.c.revision + 1)
    .returning(key_revision.c.revision)
)
LOCK_BUCKETS = (
    select(buckets.c.key_id, buckets.c.requests_debt, buckets.c.tokens_debt, buckets.c.at_us)
    .where(buckets.c.key_id.in_(bindparam("key_ids", expanding=True)))
    .order_by(buckets.c.key_id)  # one order for all processes, so that none waits in a circle
    .with_for_update()
)
WRITE_BUCKET = (
    update(buckets)
    .where(buckets.c.key_id == bindparam("of_key"))
    .values({name: bindparam(name) for name in ("requests_debt", "tokens_debt", "at_us")})
)
APPEND_ROWS = insert(ledger)
LEDGER_FIELDS = LedgerRow.__slots__  # named as the columns are
COUNT_KEY = tuple_(*counts.primary_key.columns)
Sums: TypeAlias = Select[tuple[Any, ...]]


class SqlStore:
    """Connects when it is first used, and again after every failure."""

    def __init__(self, engines: Engines, *, upgrades_itself: bool) -> None:
        self._engines = engines
        self._writing_no_sync = engines.writing.execution_options(**{NO_SYNC: True})
        dialect = engines.writing.dialect
        self._driver_error = dialect.loaded_dbapi.Error
        self._add_to_daily = _adding(daily, dialect)
        self._add_to_counts = _adding(counts, dialect)
        self._upgrades_itself = upgrades_itself
        self._is_prepared = False
        self._preparing = Lock()

    def prepare(self) -> None:
        """Bring the schema up to date, or check that it is. Raises `StoreRefused`."""
        with self._preparing:
            if self._is_prepared:
                return
            if self._upgrades_itself:
                self.upgrade()
            else:
                with self._translated(), self._engines.reading.connect() as connection:
                    tables.check_latest(connection)
            self._is_prepared = True

    def revision(self) -> str | None:
        """The schema's; None for an empty database."""
        with self._translated(), self._engines.writing.begin() as connection:
            return tables.revision(connection)

    def upgrade(self) -> None:
        """Run the migrations that are missing, all or none."""
        with self._translated():
            with self._engines.writing.begin() as connection:
                if tables.is_latest(connection):
                    return
            with self._engines.writing.begin() as connection:
                tables.upgrade(connection)

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        # Only what was billed must outlive a power cut; a reservation is forgotten in a minute.
        no_sync = all(
            isinstance(entry, Reserve)
            or (isinstance(entry, RecordUsage) and entry.row.token_count == 0)
            for entry in entries
        )
        self._ensure_prepared()
        engine = self._writing_no_sync if no_sync else self._engines.writing
        with self._translated(), engine.begin() as connection:
            key_ids = keys_touched(entries)
            locked = connection.execute(LOCK_BUCKETS, {"key_ids": key_ids}) if key_ids else ()
            transaction = Transaction(
                now_us=now_us,
                buckets={key_id: Bucket(*debts) for key_id, *debts in locked},
            )
            outcomes = [transaction.apply(entry) for entry in entries]
            self._write(connection, transaction)
        return Committed(outcomes, transaction.now_us)

    def _write(self, connection: Connection, transaction: Transaction) -> None:
        if transaction.buckets_changed:
            connection.execute(
                WRITE_BUCKET,
                [
                    asdict(bucket) | {"of_key": key_id}
                    for key_id, bucket in transaction.buckets_changed.items()
                ],
            )
        if transaction.rows:
            rows = [
                {name: getattr(row, name) for name in LEDGER_FIELDS} for row in transaction.rows
            ]
            connection.execute(APPEND_ROWS, rows)
        # Sorted: processes that add to the same rows would else wait for each other.
        if totals := transaction.totals():
            values = [
                key_day._asdict() | {"model": key_day.model or ""} | asdict(total)
                for key_day, total in totals.items()
            ]
            values.sort(key=lambda row: (row["key_id"], row["model"], row["day"]))
            connection.execute(self._add_to_daily, values)
        if transaction.counts:
            values = [
                count._asdict() | {"model": count.model or "", "requests": requests}
                for count, requests in transaction.counts.items()
            ]
            values.sort(key=lambda row: [row[column.name] for column in counts.primary_key])
            connection.execute(self._add_to_counts, values)
        if transaction.has_probe:
            connection.execute(update(probe).values(at_us=transaction.now_us))

    def agree_secret_check(self, proposed: bytes) -> bytes:
        agreed = select(key_revision.c.secret_check)
        with self._reading() as connection:
            found = connection.scalar(agreed)
        if found is None:
            with self._writing() as connection:
                unset = key_revision.c.secret_check.is_(None)
                connection.execute(update(key_revision).where(unset).values(secret_check=proposed))
                found = connection.scalar(agreed)
        return bytes(found or b"")

    def keys_since(self, revision: int) -> KeyChanges:
        changed = keys.c.revision > revision
        with self._reading() as connection:
            found = connection.execute(select(keys).where(changed)).all()
            if not found:
                return KeyChanges(revision, ())
            their_secrets = connection.execute(select(secrets).join(keys).where(changed)).all()
        by_key: dict[str, list[Row[Any]]] = {row.id: [] for row in found}
        for secret in their_secrets:
            by_key.setdefault(secret.key_id, []).append(secret)
        return KeyChanges(
            max(row.revision for row in found),
            tuple(key_of(row, by_key[row.id]) for row in found),
        )

    def add_key(self, key: Key) -> None:
        try:
            with self._writing() as connection:
                revision = connection.execute(NEXT_REVISION).scalar_one()
                connection.execute(insert(keys), key_values(key, revision=revision))
                connection.execute(insert(secrets), secret_values(key))
                empty = {"key_id": key.id, "requests_debt": 0, "tokens_debt": 0, "at_us": 0}
                connection.execute(insert(buckets), empty)
        except IntegrityError as taken:
            raise name_taken(key.name) from taken

    def change_key(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        with self._writing() as connection:
            revision = connection.execute(
                NEXT_REVISION
            ).scalar_one()  # locks the row of `key_revision`
            found = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
            if found is None:
                raise ResourceUnknown(f"There is no key {key_id}.")
            its_secrets = secrets.c.key_id == key_id
            key = change(key_of(found, connection.execute(select(secrets).where(its_secrets))))
            values = key_values(key, revision=revision)
            connection.execute(update(keys).where(keys.c.id == key_id), values)
            connection.execute(delete(secrets).where(its_secrets))
            if key.secrets:
                connection.execute(insert(secrets), secret_values(key))
        return key

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        self._ensure_prepared()
        # A failure here drops no connection that the writer or the checks of keys use.
        with (
            self._translated(self._engines.summing.dispose),
            self._engines.summing.begin() as connection,
        ):
            found = [row for one in _usage_sums(query) for row in connection.execute(one)]
            # Last: Postgres may delete a row between two statements, and moves the mark with it.
            archived_before_us = int(connection.scalar(select(archive.c.before_us)) or 0)
        _check_not_archived(query, before_us=archived_before_us)
        return _usage_lines(found, query.by)

    # What `trivec db archive` asks for; each call is one transaction. The mark `archive.before_us`
    # only grows: triggers refuse to delete a row at or after it, and rows before it are deleted in
    # the transaction that moves it, so a sum that reads the mark last knows what is missing.

    @contextmanager
    def archiving(self) -> Iterator[None]:
        """Keep other archive runs out. Raises `StoreRefused` where one is at work.

        On SQLite, which one machine uses, a lock on the data folder does it instead.
        """
        self._ensure_prepared()
        if self._engines.writing.dialect.name == "sqlite":
            yield
            return
        with self._translated(), self._engines.summing.connect() as connection:
            is_taken = connection.scalar(select(func.pg_try_advisory_lock(ARCHIVE_LOCK)))
            connection.commit()  # the lock is the session's; an open transaction holds up vacuum
            if not is_taken:
                raise StoreRefused(ALREADY_ARCHIVING)
            try:
                yield
            finally:
                # Unlocked by name: a closed session ends some time later, and until then the lock
                # would refuse the next run.
                try:
                    connection.execute(select(func.pg_advisory_unlock(ARCHIVE_LOCK)))
                finally:
                    connection.invalidate()

    def oldest_rows(self, *, from_us: int, before_us: int, limit: int) -> list[Values]:
        """At most *limit* ledger rows of [from_us, before_us), by time and sequence.

        *from_us* spares Postgres a walk over the index entries of rows that were just deleted.
        """
        statement = (
            select(ledger)
            .where(ledger.c.time_us >= from_us, ledger.c.time_us < before_us)
            .order_by(ledger.c.time_us, ledger.c.sequence)
            .limit(limit)
        )
        with self._reading() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def rows_numbered(self, sequences: Sequence[int]) -> list[Values]:
        """The ledger rows with these sequences, where they are there."""
        statement = select(ledger).where(ledger.c.sequence.in_(sequences))
        with self._reading() as connection:
            return [dict(row) for row in connection.execute(statement).mappings()]

    def drop_rows(self, archived: Sequence[Values]) -> None:
        """Delete rows that are safe elsewhere, all or none. Raises `StoreRefused` if some are gone."""
        with self._writing() as connection:
            _move_mark(connection, max(row["time_us"] for row in archived) + 1)
            sequences = [row["sequence"] for row in archived]
            deleted = connection.execute(delete(ledger).where(ledger.c.sequence.in_(sequences)))
            if deleted.rowcount != len(archived):
                raise StoreRefused(ALREADY_ARCHIVING)

    def end_archive(self, before_us: int) -> None:
        """Move the mark to *before_us* and delete the counts before it, some at a time."""
        with self._writing() as connection:
            _move_mark(connection, before_us)
        is_old = counts.c.minute < before_us // MINUTE_US
        next_keys = select(*counts.primary_key.columns).where(is_old)
        next_keys = next_keys.order_by(*counts.primary_key.columns).limit(COUNTS_AT_ONCE)
        while True:
            with self._reading() as connection:
                found = connection.execute(next_keys).all()
            if not found:
                return
            last = tuple(found[-1])
            with self._writing() as connection:
                connection.execute(delete(counts).where(is_old, last >= COUNT_KEY))
            next_keys = next_keys.where(last < COUNT_KEY)

    def interrupt(self) -> None:
        self._engines.interrupt()

    def close(self) -> None:
        self._engines.dispose()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        self._ensure_prepared()
        with self._translated(), self._engines.writing.begin() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._ensure_prepared()
        with self._translated(), self._engines.reading.begin() as connection:
            yield connection

    def _ensure_prepared(self) -> None:
        if self._is_prepared:
            return
        try:
            self.prepare()
        except StoreRefused as refused:
            raise unavailable() from refused

    @contextmanager
    def _translated(self, disconnect: Callable[[], None] | None = None) -> Iterator[None]:
        """Raise `StoreUnavailable` for a failure of the store, and connect anew afterwards.

        A file that was read-only stays so for an open connection.
        """
        try:
            yield
        except (DBAPIError, self._driver_error) as fault:
            cause = fault.orig if isinstance(fault, DBAPIError) else fault
            if cause is None or not is_the_stores(cause, self._engines.writing.dialect):
                raise
            (disconnect or self._engines.dispose)()
            raise unavailable() from cause
        except TimeoutError as fault:  # every connection is taken
            raise unavailable() from fault


def _adding(table: Table, dialect: Dialect) -> Insert:
    """Insert a row, or add its values to those of the row with the same primary key."""
    insert_into = sqlite.insert if dialect.name == "sqlite" else postgresql.insert
    statement: sqlite.Insert | postgresql.Insert = insert_into(table)
    key = [column.name for column in table.primary_key]
    sums = {c.name: c + statement.excluded[c.name] for c in table.c if c.name not in key}
    return statement.on_conflict_do_update(index_elements=key, set_=sums)


def _move_mark(connection: Connection, before_us: int) -> None:
    """To *before_us*, unless it is further on."""
    earlier = archive.c.before_us < before_us
    connection.execute(update(archive).where(earlier).values(before_us=before_us))


def _usage_sums(query: UsageQuery) -> list[Sums]:
    """Statements whose sums together are what was asked for.

    Whole days come from their totals, parts of days from ledger and counts.
    """
    first, end = _whole_days(query)
    statements = []
    if first is None or end is None or first <= end:
        days = _grouped(
            query,
            daily,
            day_number=daily.c.day,
            requests=func.sum(daily.c.requests),
            failed=func.sum(daily.c.failed),
            tokens=func.sum(daily.c.tokens),
        )
        statements = [_within(days, daily.c.day, first, end)]
    for since_us, until_us in _parts_of_days(query):
        rows = _grouped(
            query,
            ledger,
            day_number=ledger.c.time_us // DAY_US,
            requests=func.count(),
            failed=func.sum(case((ledger.c.status >= ERROR_FROM, 1), else_=0)),
            tokens=func.sum(ledger.c.token_count),
        )
        statements.append(_within(rows, ledger.c.time_us, since_us, until_us))
        counted = _grouped(
            query,
            counts,
            day_number=counts.c.minute // MINUTES_A_DAY,
            requests=func.sum(counts.c.requests),
            failed=func.sum(case((counts.c.status >= ERROR_FROM, counts.c.requests), else_=0)),
            tokens=literal_column("0"),
        )
        # A count belongs to the part that its minute begins in.
        minutes = -(-since_us // MINUTE_US), -(-until_us // MINUTE_US)
        statements.append(_within(counted, counts.c.minute, *minutes))
    return statements


def _whole_days(query: UsageQuery) -> tuple[int | None, int | None]:
    """The first one asked for and the one after the last, since the epoch; None: no bound."""
    since_us, until_us = query.since_us, query.until_us
    first = None if since_us is None else -(-since_us // DAY_US)
    return first, None if until_us is None else until_us // DAY_US


def _parts_of_days(query: UsageQuery) -> list[tuple[int, int]]:
    """What is asked for beside whole days: from when to when, each within a day."""
    since_us, until_us = query.since_us, query.until_us
    first, end = _whole_days(query)
    parts = []
    if since_us is not None and first is not None and since_us != first * DAY_US:
        parts.append((since_us, first * DAY_US))
    if until_us is not None and end is not None:
        if first is not None and since_us is not None and first > end:  # both within a day
            return [(since_us, until_us)]
        if until_us != end * DAY_US:
            parts.append((end * DAY_US, until_us))
    return parts


def _grouped(
    query: UsageQuery,
    table: Table,
    *,
    day_number: ColumnElement[Any],
    requests: ColumnElement[Any],
    failed: ColumnElement[Any],
    tokens: ColumnElement[Any],
) -> Sums:
    group: dict[UsageBy, ColumnElement[Any]] = {
        UsageBy.KEY: table.c.key_id,
        UsageBy.MODEL: table.c.model,
        UsageBy.DAY: day_number,
    }
    statement = select(
        group[query.by].label("grouped_by"),
        requests.label("requests"),
        failed.label("failed"),
        tokens.label("tokens"),
    ).group_by(group[query.by])
    return statement if query.key_id is None else statement.where(table.c.key_id == query.key_id)


def _within(statement: Sums, column: Column[Any], first: int | None, end: int | None) -> Sums:
    if first is not None:
        statement = statement.where(column >= first)
    return statement if end is None else statement.where(column < end)


def _check_not_archived(query: UsageQuery, *, before_us: int) -> None:
    """Raise `FieldInvalid` where a part of a day is asked for whose rows are not all here any more.

    Of rows before *before_us* only the totals of their days are left.
    """
    for since_us, until_us in _parts_of_days(query):
        if since_us < min(until_us, before_us):
            is_since = since_us == query.since_us
            raise FieldInvalid(
                f"Usage before {moment(before_us):%Y-%m-%d %H:%M} UTC is known for whole UTC days "
                f"only: its rows are archived. Give {'since' if is_since else 'until'} as a date, "
                f"such as {day(since_us // DAY_US)}.",
                param="since" if is_since else "until",
            )


def _usage_lines(found: Iterable[Row[Any]], by: UsageBy) -> list[UsageLine]:
    totals: dict[str | None, Total] = {}
    for row in found:
        group = day(row.grouped_by) if by is UsageBy.DAY else row.grouped_by or None
        total = totals.setdefault(group, Total())
        total.requests += int(row.requests)  # Postgres sums to a decimal
        total.failed += int(row.failed)
        total.tokens += int(row.tokens)
    return [
        UsageLine(group, None, total.requests, total.failed, total.tokens)
        for group, total in sorted(totals.items(), key=lambda item: item[0] or "")
    ]
