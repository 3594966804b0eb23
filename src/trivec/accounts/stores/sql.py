"""The books in SQLite or Postgres: the same statements on both, through SQLAlchemy Core.

What is decided is decided by `Page`; this reads the rows it needs, locks them, writes what changed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

from sqlalchemy import (
    Connection,
    Row,
    delete,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError

from trivec.accounts.allowance import Bucket
from trivec.accounts.entries import Committed, Entry, Reserve, Settle
from trivec.accounts.page import Page, claims_touched, keys_touched
from trivec.accounts.store import KeyChanges, name_taken, unavailable
from trivec.accounts.stores import migrate, old_rows, rows
from trivec.accounts.stores.connect import Engines, is_the_stores
from trivec.accounts.stores.pen import Pen
from trivec.accounts.stores.quick import QuickStatements
from trivec.accounts.stores.schema import (
    buckets,
    keyring,
    keys,
    secrets,
    timelines,
)
from trivec.accounts.stores.usage import check_not_archived, usage_lines, usage_statements
from trivec.accounts.types import Key, UsageLine, UsageQuery
from trivec.core.errors import ResourceUnknown, StoreRefused

NEXT_REVISION = (
    update(keyring).values(revision=keyring.c.revision + 1).returning(keyring.c.revision)
)
ONE_ARCHIVER = 7_472_697_666  # Postgres' advisory lock, beside that for upgrades
ALREADY_ARCHIVING = (
    "another trivec db archive is at work on this store; wait until it has ended, then try again"
)


class SqlStore:
    """Connects when it is first used, and again after every failure."""

    def __init__(self, engines: Engines, *, upgrades_itself: bool) -> None:
        self._engines = engines
        self._pen = Pen(engines)
        self._quick = QuickStatements(engines.writing.dialect)
        self._driver_error = engines.writing.dialect.loaded_dbapi.Error
        self._upgrades_itself = upgrades_itself
        self._prepared = False
        self._preparing = Lock()

    def prepare(self) -> None:
        """Bring the schema up to date, or check that it is. Raises `StoreRefused`."""
        with self._preparing:
            if self._prepared:
                return
            with self._mapped():
                if self._upgrades_itself:
                    self.upgrade()
                else:
                    with self._engines.reading.connect() as connection:
                        migrate.check(connection)
            self._prepared = True

    def revision(self) -> str | None:
        """The schema's; None for an empty database."""
        with self._mapped(), self._pen.writing() as connection:
            return migrate.revision(connection)

    def upgrade(self) -> None:
        """Run the migrations that are missing, all or none."""
        with self._mapped():
            with self._pen.writing() as connection:
                if migrate.is_latest(connection):
                    return
            with self._pen.writing() as connection:
                migrate.upgrade(connection)

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        # Only what was billed must outlive a power cut; a reservation is forgotten in a minute.
        notes_only = all(
            isinstance(entry, Reserve) or (isinstance(entry, Settle) and entry.row.is_counted)
            for entry in entries
        )
        self._ensure_prepared()
        with self._mapped(), self._pen.quickly(notes_only=notes_only) as cursor:
            page = Page(
                now_us=now_us,
                buckets=self._quick.buckets(cursor, keys_touched(entries)),
                claims=self._quick.claims(cursor, claims_touched(entries)),
            )
            outcomes = [page.take(entry) for entry in entries]
            self._quick.write(cursor, page)
        return Committed(outcomes, page.now_us)

    def agree_offset_us(self, boot_id: str, *, proposed_us: int) -> int:
        agreed = select(timelines.c.offset_us).where(timelines.c.boot_id == boot_id)
        with self._reading() as connection:
            found: int | None = connection.scalar(agreed)
        if found is not None:
            return found
        row = {"boot_id": boot_id, "offset_us": proposed_us, "seen_us": 0}
        try:
            with self._writing() as connection:
                connection.execute(insert(timelines), row)
        except IntegrityError:  # another process of this boot was quicker
            return self.agree_offset_us(boot_id, proposed_us=proposed_us)
        return proposed_us

    def agree_secret_check(self, proposed: bytes) -> bytes:
        agreed = select(keyring.c.secret_check)
        with self._reading() as connection:
            found = connection.scalar(agreed)
        if found is None:
            with self._writing() as connection:
                unset = keyring.c.secret_check.is_(None)
                connection.execute(update(keyring).where(unset).values(secret_check=proposed))
                found = connection.scalar(agreed)
        return bytes(found or b"")

    def keys_since(self, revision: int) -> KeyChanges:
        changed = keys.c.revision > revision
        with self._reading() as connection:
            found = connection.execute(select(keys).where(changed)).all()
            if not found:
                return KeyChanges(revision, ())
            theirs = connection.execute(select(secrets).join(keys).where(changed)).all()
        by_key: dict[str, list[Row[Any]]] = {row.id: [] for row in found}
        for secret in theirs:
            by_key.setdefault(secret.key_id, []).append(secret)
        return KeyChanges(
            max(row.revision for row in found),
            tuple(rows.key_of(row, by_key[row.id]) for row in found),
        )

    def add_key(self, key: Key) -> None:
        try:
            with self._writing() as connection:
                revision = connection.execute(NEXT_REVISION).scalar_one()
                connection.execute(insert(keys), rows.key_values(key, revision=revision))
                connection.execute(insert(secrets), rows.secret_values(key))
                connection.execute(insert(buckets), rows.bucket_values(key.id, Bucket()))
        except IntegrityError as taken:
            raise name_taken(key.name) from taken

    def change_key(self, key_id: str, change: Callable[[Key], Key]) -> Key:
        with self._writing() as connection:
            revision = connection.execute(NEXT_REVISION).scalar_one()  # locks the keyring
            found = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
            if found is None:
                raise ResourceUnknown(f"There is no key {key_id}.")
            its_secrets = secrets.c.key_id == key_id
            key = change(rows.key_of(found, connection.execute(select(secrets).where(its_secrets))))
            values = rows.key_values(key, revision=revision)
            connection.execute(update(keys).where(keys.c.id == key_id), values)
            connection.execute(delete(secrets).where(its_secrets))
            if key.secrets:
                connection.execute(insert(secrets), rows.secret_values(key))
        return key

    def usage(self, query: UsageQuery) -> list[UsageLine]:
        self._ensure_prepared()
        letting_go = self._engines.summing.dispose  # nothing of who writes and who checks keys
        with self._mapped(letting_go), self._engines.summing.begin() as connection:
            statements = usage_statements(query)
            found = [row for one in statements for row in connection.execute(one)]
            # Last: Postgres lets a row go between two statements, and then moves the mark with it.
            check_not_archived(query, before_us=old_rows.archived_before_us(connection))
        return usage_lines(found, query.by)

    @contextmanager
    def archiving(self) -> Iterator[None]:
        """The only one that archives this store. Raises `StoreRefused` where another does.

        On SQLite, which one machine uses, whoever calls sees to it.
        """
        self._ensure_prepared()
        if self._engines.writing.dialect.name == "sqlite":
            yield
            return
        with self._mapped(), self._engines.summing.connect() as connection:
            taken = connection.scalar(select(func.pg_try_advisory_lock(ONE_ARCHIVER)))
            connection.commit()  # the lock is the session's; an open transaction would hold up vacuum
            if not taken:
                raise StoreRefused(ALREADY_ARCHIVING)
            try:
                yield
            finally:
                connection.invalidate()  # ends the session, and with it the lock

    def oldest_rows(self, *, from_us: int, before_us: int, limit: int) -> list[rows.Values]:
        """At most *limit* ledger rows of [from_us, before_us), by time and sequence."""
        with self._reading() as connection:
            return old_rows.oldest(connection, from_us=from_us, before_us=before_us, limit=limit)

    def rows_numbered(self, sequences: Sequence[int]) -> list[rows.Values]:
        """Those ledger rows that are there."""
        with self._reading() as connection:
            return old_rows.numbered(connection, sequences)

    def drop_rows(self, archived: Sequence[rows.Values]) -> None:
        """Delete rows that are safe elsewhere, all or none. Raises `StoreRefused` if some are gone."""
        with self._writing() as connection:
            if old_rows.drop(connection, archived) != len(archived):
                raise StoreRefused(ALREADY_ARCHIVING)

    def end_archive(self, before_us: int) -> None:
        """Nothing before *before_us* may be asked for but whole days: drop its counts, bit by bit."""
        with self._writing() as connection:
            old_rows.move_mark(connection, before_us)
        upto: tuple[object, ...] | None = None
        while True:
            with self._reading() as connection:
                upto = old_rows.next_counts(connection, upto, before_us=before_us)
            if upto is None:
                return
            with self._writing() as connection:
                old_rows.drop_counts(connection, upto, before_us=before_us)

    def interrupt(self) -> None:
        self._engines.interrupt()

    def close(self) -> None:
        self._pen.drop()
        self._engines.dispose()

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        self._ensure_prepared()
        with self._mapped(), self._pen.writing() as connection:
            yield connection

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        self._ensure_prepared()
        with self._mapped(), self._engines.reading.begin() as connection:
            yield connection

    def _ensure_prepared(self) -> None:
        if self._prepared:
            return
        try:
            self.prepare()
        except StoreRefused as refused:
            raise unavailable() from refused

    @contextmanager
    def _mapped(self, letting_go: Callable[[], None] | None = None) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, self._driver_error) as fault:
            said = fault.orig if isinstance(fault, DBAPIError) else fault
            if said is None or not is_the_stores(said, self._engines.writing.dialect):
                raise
            (letting_go or self._let_go)()
            raise unavailable() from said
        except TimeoutError as fault:  # every reading connection is taken
            raise unavailable() from fault

    def _let_go(self) -> None:
        """A file that was read-only stays so for an open connection."""
        self._pen.drop()
        self._engines.dispose()
