"""Store in SQLite or Postgres: the same statements on both, through SQLAlchemy Core.

A `Transaction` decides; this reads and locks the rows that it needs, and writes what has changed.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from random import randrange
from threading import Event, Lock
from typing import Any, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError
from sqlalchemy.sql.compiler import SQLCompiler

from trivec.accounts import rate_limits
from trivec.accounts.ledger import (
    ERROR_FROM,
    Answer,
    Committed,
    Entry,
    KeyChanges,
    LedgerRow,
    Outcome,
    RecordUsage,
    Reserve,
    Transaction,
    keys_touched,
    name_taken,
    unavailable,
)
from trivec.accounts.rate_limits import AHEAD_SHARE, LEFT_SHARE, Bucket, Cost, Grant
from trivec.accounts.stores import tables
from trivec.accounts.stores.engines import Engines, is_pooled
from trivec.accounts.stores.tables import (
    archive,
    buckets,
    counts,
    daily,
    key_revision,
    keys,
    ledger,
    probe,
    secrets,
)
from trivec.accounts.types import Key, UsageBy, UsageLine, UsageQuery
from trivec.accounts.utc import DAY_US, MINUTE_US, day, moment
from trivec.core.errors import (
    FieldInvalid,
    RateLimitExceeded,
    ResourceUnknown,
    StoreRefused,
    StoreUnavailable,
)

MINUTES_A_DAY = DAY_US // MINUTE_US
FOREVER_US = 3_000_000 * DAY_US  # whole days, beyond the year 9999
PARTS = 64  # of a daily total on a store that nodes share
ROWS_MAX = 32  # of one bulk statement
ARCHIVE_LOCK = 7_472_697_666  # Postgres' advisory lock, beside the one for migrations
ALREADY_ARCHIVING = (
    "another trivec db archive is at work on this store; wait until it has ended, then try again"
)
NO_SESSION = (
    "an archive run holds a lock for as long as it takes, which pgbouncer's transaction mode cannot; "
    "set TRIVEC_DATABASE_URL to Postgres itself for it"
)
NEXT_REVISION = (  # locks the row until the end of the transaction
    sa.update(key_revision)
    .values(revision=key_revision.c.revision + 1)
    .returning(key_revision.c.revision)
)
KEY_CHANGES = "LISTEN trivec_keys"  # a trigger notifies it: migration 0007
LISTEN_S = 1.0  # between two checks whether to stop
LISTEN_AGAIN_S = 1.0  # after a connection was lost
KEY_NAMES = sa.select(keys.c.id, keys.c.name)
Rows: TypeAlias = Sequence[Sequence[Any]]
Merge: TypeAlias = Callable[[sa.ColumnElement[Any], sa.ColumnElement[Any]], sa.ColumnElement[Any]]
_log = logging.getLogger("trivec.accounts")


class BulkStatement:
    """One statement for many rows, on the driver's own cursor; compiled once for each row count.

    SQLAlchemy's execution costs several times what SQLite does for a row. And a driver releases the
    interpreter's lock for each statement, and then waits for the event loop: one statement a row
    made large groups slow.
    """

    def __init__(
        self, build: Callable[[Rows], sa.ClauseElement], width: int, dialect: sa.Dialect
    ) -> None:
        """*build* makes the statement from rows of *width* parameters, bound in their order."""
        self._build = build
        self._width = width
        self._dialect = dialect
        self._compiled: dict[int, str] = {}

    def run(self, cursor: Any, rows: Rows) -> list[Sequence[Any]]:
        """The rows it returns, if any. Raises the driver's errors."""
        found: list[Sequence[Any]] = []
        for start in range(0, len(rows), ROWS_MAX):
            some = rows[start : start + ROWS_MAX]
            sql = self._compiled.get(len(some)) or self._compile(len(some))
            cursor.execute(sql, [value for row in some for value in row])
            if cursor.description is not None:
                found += cursor.fetchall()
        return found

    def _compile(self, count: int) -> str:
        names = [[f"{row}_{column}" for column in range(self._width)] for row in range(count)]
        statement = self._build([[sa.bindparam(name) for name in row] for row in names])
        compiled = statement.compile(dialect=self._dialect)
        assert isinstance(compiled, SQLCompiler)
        assert compiled.positiontup == [name for row in names for name in row]
        self._compiled[count] = str(compiled)
        return self._compiled[count]


class SqlStore:
    """The store of keys, buckets and the ledger. Connects when first used, and after each failure."""

    def __init__(self, engines: Engines, *, upgrades_itself: bool) -> None:
        self._engines = engines
        dialect = engines.writing.dialect
        driver = self._driver = dialect.loaded_dbapi
        # Errors in our own statements. A damaged file raises the plain `DatabaseError`.
        self._our_faults: tuple[type[Exception], ...] = (
            driver.IntegrityError,
            driver.DataError,
            driver.ProgrammingError,
            driver.NotSupportedError,
        )
        # All processes, and `_reserve`, lock in the order of the ids' bytes, so that none deadlock.
        is_sqlite = dialect.name == "sqlite"
        by_id = buckets.c.key_id if is_sqlite else buckets.c.key_id.collate("C")
        self._lock_buckets = BulkStatement(
            lambda rows: (
                sa.select(buckets)
                .where(buckets.c.key_id.in_([key_id for (key_id,) in rows]))
                .order_by(by_id)
                .with_for_update()
            ),
            1,
            dialect,
        )
        self._append_rows = _inserting(ledger, dialect, LedgerRow._fields)
        self._put_buckets = _inserting(buckets, dialect, merge=lambda _, new: new)
        self._put_probe = _inserting(probe, dialect, merge=lambda _, new: new)
        self._add_to_daily = _inserting(daily, dialect, merge=lambda old, new: old + new)
        self._add_to_counts = _inserting(counts, dialect, merge=lambda old, new: old + new)
        self._upgrades_itself = upgrades_itself
        self._is_shared = engines.listening is not None  # by several machines
        self._part = randrange(PARTS) if self._is_shared else 0  # noqa: S311
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
                with self._begun(self._engines.reading) as connection:
                    tables.check_latest(connection)
            self._is_prepared = True

    def revision(self) -> str | None:
        """The schema's; None for an empty database."""
        with self._begun(self._engines.reading) as connection:
            return tables.revision(connection)

    def upgrade(self) -> None:
        """Run the migrations that are missing, all or none."""
        with self._begun(self._engines.writing) as connection:
            tables.upgrade(connection)

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        self._ensure_prepared()
        in_two = self._is_shared and any(isinstance(one, Reserve) for one in entries)
        commit = self._commit_in_two if in_two else self._record
        writing = self._engines.writing
        with self._translated(writing), closing(writing.raw_connection()) as pooled:
            raw: Any = pooled.driver_connection
            try:
                with closing(raw.cursor()) as cursor:  # an open one keeps a closed file in use
                    return commit(raw, cursor, entries, now_us=now_us)
            except self._driver.Error:
                pooled.invalidate()
                raise

    def _commit_in_two(
        self, raw: Any, cursor: Any, entries: Sequence[Entry], *, now_us: int
    ) -> Committed:
        """Reservations first, by themselves: their buckets are then locked for a moment only."""
        asked = [one for one in entries if isinstance(one, Reserve)]
        rest = [one for one in entries if isinstance(one, RecordUsage)]
        granted, recorded = _reserve(cursor, asked, now_us=now_us), Committed((), now_us)
        if rest:
            recorded = self._record_apart(raw, cursor, rest, now_us=now_us)
        outcomes = {Reserve: iter(granted.outcomes), RecordUsage: iter(recorded.outcomes)}
        now_us = max(granted.now_us, recorded.now_us)
        return Committed([next(outcomes[type(entry)]) for entry in entries], now_us)

    def _record(self, raw: Any, cursor: Any, entries: Sequence[Entry], *, now_us: int) -> Committed:
        """One transaction over *entries*."""
        # Only billed rows must survive a power cut: a reservation is worth nothing after a minute. A
        # commit without entries is durable on SQLite, where it finds out whether the disk is full.
        durable = any(isinstance(one, RecordUsage) and one.row.token_count for one in entries)
        self._engines.begin(raw, durable or not (entries or self._is_shared))
        found = self._lock_buckets.run(cursor, [[one] for one in keys_touched(entries)])
        held = {key_id: Bucket(*debts) for key_id, *debts in found}
        transaction = Transaction(entries, now_us=now_us, buckets=held)
        self._write(cursor, transaction)
        if not entries:
            self._put_probe.run(cursor, [(1, now_us)])
        raw.commit()
        return transaction.committed

    def _record_apart(
        self, raw: Any, cursor: Any, entries: Sequence[Entry], *, now_us: int
    ) -> Committed:
        """`_record`; where that is at fault, each of *entries* alone, whose outcome is then the error."""
        try:
            return self._record(raw, cursor, entries, now_us=now_us)
        except Exception as fault:  # the writer's loop would reserve again what is reserved already
            if isinstance(fault, self._driver.Error) and not isinstance(fault, self._our_faults):
                raise
            raw.rollback()
            if len(entries) == 1:
                _log.exception("an entry could not be committed")
                return Committed([fault.with_traceback(None)], now_us)
        outcomes: list[Answer] = []
        for entry in entries:
            committed = self._record_apart(raw, cursor, [entry], now_us=now_us)
            outcomes += committed.outcomes
            now_us = committed.now_us
        return Committed(outcomes, now_us)

    def _write(self, cursor: Any, transaction: Transaction) -> None:
        if transaction.buckets:
            changed = [(key_id, *bucket) for key_id, bucket in transaction.buckets.items()]
            self._put_buckets.run(cursor, changed)
        # Sorted, so that processes that add to the same rows do not deadlock.
        if transaction.totals:
            self._append_rows.run(cursor, transaction.rows)
            part, totals = self._part, transaction.totals.items()
            rows = [(key, model or "", day, part, *sums) for (key, model, day), sums in totals]
            self._add_to_daily.run(cursor, sorted(rows))
        if transaction.counts:
            counted = transaction.counts.items()
            rows = [(key, model or "", *of, n) for (key, model, *of), n in counted]
            self._add_to_counts.run(cursor, sorted(rows))

    def agree_secret_check(self, proposed: bytes) -> bytes:
        agreed = sa.select(key_revision.c.secret_check)
        with self._transaction(self._engines.reading) as connection:
            found = connection.scalar(agreed)
        if found is None:
            with self._transaction(self._engines.writing) as connection:
                unset = key_revision.c.secret_check.is_(None)
                connection.execute(
                    sa.update(key_revision).where(unset).values(secret_check=proposed)
                )
                found = connection.scalar(agreed)
        return bytes(found or b"")

    def keys_since(self, revision: int) -> KeyChanges:
        with self._transaction(self._engines.reading) as connection:
            # First: a key that changes between the two statements is read twice, but not missed.
            latest = connection.execute(sa.select(key_revision.c.revision)).scalar_one()
            if latest == revision:
                return KeyChanges(revision, ())
            changed = tables.read_keys(connection, keys.c.revision > revision)
        return KeyChanges(latest, tuple(changed))

    def find_keys(self, reference: str, digest: bytes) -> Sequence[Key]:
        of_secret = sa.select(secrets.c.key_id).where(secrets.c.digest == digest)
        is_meant = sa.or_(
            keys.c.id == reference, keys.c.name == reference, keys.c.id.in_(of_secret)
        )
        with self._transaction(self._engines.reading) as connection:
            return tables.read_keys(connection, is_meant)

    def count_live_keys(self) -> int:
        is_live = keys.c.revoked_us.is_(None)
        with self._transaction(self._engines.reading) as connection:
            found = sa.select(sa.func.count()).select_from(keys).where(is_live)
            return connection.scalar(found) or 0

    def add_key(self, key: Key) -> None:
        try:
            with self._transaction(self._engines.writing) as connection:
                revision = connection.execute(NEXT_REVISION).scalar_one()
                connection.execute(sa.insert(keys), tables.key_values(key, revision=revision))
                connection.execute(sa.insert(secrets), tables.secret_values(key))
                connection.execute(sa.insert(buckets), {"key_id": key.id} | Bucket()._asdict())
        except IntegrityError as taken:
            raise name_taken(key.name) from taken

    def change_key(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        with self._transaction(self._engines.writing) as connection:
            revision = connection.execute(NEXT_REVISION).scalar_one()
            found = tables.read_keys(connection, keys.c.id == key_id)
            if not found:
                raise ResourceUnknown(f"There is no key {key_id}.")
            key = change(found[0])
            values = tables.key_values(key, revision=revision)
            connection.execute(sa.update(keys).where(keys.c.id == key_id), values)
            connection.execute(sa.delete(secrets).where(secrets.c.key_id == key_id))
            if key.secrets:
                connection.execute(sa.insert(secrets), tables.secret_values(key))
        return key

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        with self._transaction(self._engines.summing) as connection:
            found = connection.execute(_usage_sums(query)).all()
            names: dict[str, str] = {}  # not of the environment's key: its id is its name
            if query.by is UsageBy.KEY:
                names = {row.id: row.name for row in connection.execute(KEY_NAMES)}
            # Last: Postgres may delete a row between two statements, and moves the mark with it.
            archived_before_us = int(connection.scalar(sa.select(archive.c.before_us)) or 0)
        _check_not_archived(query, before_us=archived_before_us)
        lines = []
        for group, *sums in found:
            shown = day(group) if query.by is UsageBy.DAY else group or None
            name = names.get(group, group) if query.by is UsageBy.KEY else None
            lines.append(UsageLine(shown, name, *map(int, sums)))  # Postgres sums to a decimal
        return sorted(lines, key=lambda line: line.group or "")

    @contextmanager
    def archiving(self) -> Iterator[None]:
        """Keep other archive runs out. Raises `StoreRefused` where one is at work.

        On SQLite, which one machine uses, the lock on the data folder is enough.
        """
        self._ensure_prepared()
        if self._engines.writing.dialect.name == "sqlite":
            yield
            return
        with self._translated(self._engines.reading), self._engines.summing.connect() as connection:
            if is_pooled(connection.connection.driver_connection):
                raise StoreRefused(NO_SESSION)
            is_taken = connection.scalar(sa.select(sa.func.pg_try_advisory_lock(ARCHIVE_LOCK)))
            connection.commit()  # the lock is the session's; an open transaction holds up vacuum
            if not is_taken:
                raise StoreRefused(ALREADY_ARCHIVING)
            try:
                yield
            finally:
                # Unlocked explicitly: a closed session ends some time later, and until then it would
                # hold the lock.
                try:
                    connection.execute(sa.select(sa.func.pg_advisory_unlock(ARCHIVE_LOCK)))
                finally:
                    connection.invalidate()

    def listen(self, heard: Callable[[], None], is_over: Event) -> None:
        engine = self._engines.listening
        while engine is not None and not is_over.is_set():
            try:
                with self._translated(engine), closing(engine.raw_connection()) as pooled:
                    raw: Any = pooled.driver_connection
                    if is_pooled(raw):  # pgbouncer passes no notices on
                        return
                    try:
                        raw.execute(KEY_CHANGES)
                        heard()  # something may have changed before
                        while not is_over.is_set():
                            for _ in raw.notifies(timeout=LISTEN_S, stop_after=1):
                                heard()
                    except self._driver.Error:
                        pooled.invalidate()
                        raise
            except StoreUnavailable:
                is_over.wait(LISTEN_AGAIN_S)
            finally:
                engine.dispose()

    # For the statements of `archive.py` and of batch jobs, which are in `jobs/records.py`.

    def writing(self) -> AbstractContextManager[sa.Connection]:
        """A transaction that writes; durable once it has ended."""
        return self._transaction(self._engines.writing)

    def reading(self) -> AbstractContextManager[sa.Connection]:
        return self._transaction(self._engines.reading)

    def record(self, connection: sa.Connection, rows: Sequence[LedgerRow]) -> None:
        """Bill *rows* in the transaction of *connection*, which `writing` has begun."""
        transaction = Transaction([RecordUsage(row) for row in rows], now_us=0, buckets={})
        with closing(connection.connection.cursor()) as cursor:
            self._write(cursor, transaction)

    def interrupt(self) -> None:
        self._engines.interrupt()

    def close(self) -> None:
        self._engines.dispose()

    def _transaction(self, engine: sa.Engine) -> AbstractContextManager[sa.Connection]:
        self._ensure_prepared()
        return self._begun(engine)

    @contextmanager
    def _begun(self, engine: sa.Engine) -> Iterator[sa.Connection]:
        with self._translated(engine), engine.begin() as connection:
            yield connection

    def _ensure_prepared(self) -> None:
        if self._is_prepared:
            return
        try:
            self.prepare()
        except StoreRefused as refused:
            raise unavailable() from refused

    @contextmanager
    def _translated(self, engine: sa.Engine) -> Iterator[None]:
        """Raise `StoreUnavailable` for a failure of the store, and drop its connections.

        A file that was read-only stays so for an open connection. A sum that fails leaves the
        connections of the writer and of the key checks alone.
        """
        try:
            yield
        except (DBAPIError, self._driver.Error) as fault:
            cause = fault.orig if isinstance(fault, DBAPIError) else fault
            if cause is None or isinstance(cause, self._our_faults):
                raise
            is_apart = engine in (self._engines.summing, self._engines.listening)
            (engine if is_apart else self._engines).dispose()
            raise unavailable() from cause
        except TimeoutError as fault:  # every connection is taken
            raise unavailable() from fault


def _reserve(cursor: Any, asked: Sequence[Reserve], *, now_us: int) -> Committed:
    """Decide *asked* on Postgres, one statement each, all in one round trip."""
    places = sorted(range(len(asked)), key=lambda at: asked[at].key_id)  # see `_lock_buckets`
    shares = (AHEAD_SHARE, LEFT_SHARE) * 2
    ordered = [(asked[at].limits, asked[at]) for at in places]
    cursor.executemany(
        tables.RESERVE,
        [
            (
                one.key_id,
                now_us,
                limits.requests_per_minute,
                limits.tokens_per_minute,
                *(*one.cost, *one.ahead, *one.unused, *shares),
            )
            for limits, one in ordered
        ],
        returning=True,
    )
    outcomes: dict[int, Outcome] = {}
    for at, (limits, one) in zip(places, ordered, strict=True):
        fits, requests_debt, tokens_debt, at_us, *ahead, _ = cursor.fetchone()
        cursor.nextset()
        bucket = Bucket(requests_debt, tokens_debt, at_us)
        if fits:
            outcomes[at] = Grant(bucket, Cost(*ahead))
        else:
            refused = rate_limits.reserve(bucket, limits, one.cost, now_us=at_us)
            assert isinstance(refused, RateLimitExceeded)
            outcomes[at] = refused
        now_us = max(now_us, at_us)
    return Committed([outcomes[at] for at in range(len(asked))], now_us)


def _inserting(
    table: sa.Table, dialect: sa.Dialect, names: Sequence[str] = (), *, merge: Merge | None = None
) -> BulkStatement:
    """Insert rows of the columns *names*, by default all.

    *merge*: the new value of a column where a row has the same primary key, from its value and ours.
    """
    names = names or [column.name for column in table.columns]
    insert_into = sqlite.insert if dialect.name == "sqlite" else postgresql.insert

    def build(rows: Rows) -> sa.ClauseElement:
        values = [dict(zip(names, row, strict=True)) for row in rows]
        statement: sqlite.Insert | postgresql.Insert = insert_into(table).inline().values(values)
        if merge is None:
            return statement
        key = [column.name for column in table.primary_key]
        new = statement.excluded
        changed = {c.name: merge(c, new[c.name]) for c in table.c if c.name not in key}
        return statement.on_conflict_do_update(index_elements=key, set_=changed)

    return BulkStatement(build, len(names), dialect)


def _usage_sums(query: UsageQuery) -> sa.Select[Any]:
    """Group, requests, failed and tokens: of whole days from their totals, else from each row."""
    days, parts = _days_and_parts(query)
    row, count = ledger.c, counts.c
    columns = [column for column in daily.c if column.name != "part"]
    used = [sa.select(*columns).where(daily.c.day >= days.start, daily.c.day < days.stop)]
    for part in parts:
        used.append(
            sa.select(
                row.key_id,
                sa.func.coalesce(row.model, ""),
                row.time_us // DAY_US,
                sa.literal(1),
                sa.case((row.status >= ERROR_FROM, 1), else_=0),
                row.token_count,
            ).where(row.time_us >= part.start, row.time_us < part.stop)
        )
        # A count belongs to the part that its minute begins in.
        first, end = -(-part.start // MINUTE_US), -(-part.stop // MINUTE_US)
        used.append(
            sa.select(
                count.key_id,
                count.model,
                count.minute // MINUTES_A_DAY,
                count.requests,
                sa.case((count.status >= ERROR_FROM, count.requests), else_=0),
                sa.literal(0),
            ).where(count.minute >= first, count.minute < end)
        )
    summed = sa.union_all(*used).subquery().c
    group = {UsageBy.KEY: summed.key_id, UsageBy.MODEL: summed.model, UsageBy.DAY: summed.day}
    sums = [sa.func.sum(column) for column in (summed.requests, summed.failed, summed.tokens)]
    statement = sa.select(group[query.by], *sums).group_by(group[query.by])
    return statement if query.key_id is None else statement.where(summed.key_id == query.key_id)


def _days_and_parts(query: UsageQuery) -> tuple[range, list[range]]:
    """The whole days asked for, and what is left in microseconds, each part within one day."""
    since_us = query.since_us or 0
    until_us = FOREVER_US if query.until_us is None else query.until_us
    first, end = -(-since_us // DAY_US), until_us // DAY_US
    if first > end:  # both within a day
        return range(0), [range(since_us, until_us)]
    parts = range(since_us, first * DAY_US), range(end * DAY_US, until_us)
    return range(first, end), [part for part in parts if part]


def _check_not_archived(query: UsageQuery, *, before_us: int) -> None:
    """Raise `FieldInvalid` where a part of a day is asked for whose rows are not all here any more.

    Of rows before *before_us* only the totals of their days are left.
    """
    for part in _days_and_parts(query)[1]:
        if part.start < min(part.stop, before_us):
            param = "since" if part.start == query.since_us else "until"
            raise FieldInvalid(
                f"Usage before {moment(before_us):%Y-%m-%d %H:%M} UTC is known for whole UTC days "
                f"only: its rows are archived. Give {param} as a date, such as "
                f"{day(part.start // DAY_US)}.",
                param=param,
            )
