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
    bindparam,
    delete,
    insert,
    select,
    tuple_,
    update,
)
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    NotSupportedError,
    ProgrammingError,
    TimeoutError,
)

from trivec.accounts.allowance import Bucket
from trivec.accounts.entries import Claim, ClaimName, Committed, Entry, Reserve, Upkeep
from trivec.accounts.page import CLAIM_HELD_US, Page, claims_touched, keys_touched
from trivec.accounts.store import KeyChanges, name_taken, unavailable
from trivec.accounts.stores import migrate, rows
from trivec.accounts.stores.compiled import Compiled
from trivec.accounts.stores.connect import Engines
from trivec.accounts.stores.schema import (
    buckets,
    claims,
    keyring,
    keys,
    ledger,
    secrets,
    timelines,
)
from trivec.accounts.stores.usage import usage_lines, usage_statement
from trivec.accounts.types import Key, UsageLine, UsageQuery
from trivec.core.errors import ResourceUnknown, StoreRefused

OURS = (IntegrityError, DataError, ProgrammingError, NotSupportedError)  # never the store's fault

OF_BUCKET = ("requests_debt", "tokens_debt", "at_us")
LOCK_BUCKET = select(buckets).where(buckets.c.key_id == bindparam("of_key")).with_for_update()
READ_CLAIMS = select(claims).where(
    tuple_(claims.c.key_id, claims.c.digest).in_(bindparam("names", expanding=True))
)
WRITE_BUCKET = (
    update(buckets)
    .where(buckets.c.key_id == bindparam("of_key"))
    .values({name: bindparam(name) for name in OF_BUCKET})
)
APPEND = insert(ledger).inline()  # the row's number is nobody's business here
DROP_CLAIM = delete(claims).where(
    claims.c.key_id == bindparam("of_key"), claims.c.digest == bindparam("of_digest")
)
NEXT_REVISION = (
    update(keyring).values(revision=keyring.c.revision + 1).returning(keyring.c.revision)
)


class SqlStore:
    """Connects when it is first used, and again after every failure."""

    def __init__(self, engines: Engines, *, upgrades_itself: bool) -> None:
        self._engines = engines
        dialect = engines.writing.dialect
        self._read_bucket = Compiled(LOCK_BUCKET, dialect, ["of_key"])
        self._write_bucket = Compiled(WRITE_BUCKET, dialect, ["of_key", *OF_BUCKET])
        self._append = Compiled(APPEND, dialect, rows.LEDGER_NAMES)
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
        with self._mapped(), self._engines.writing.connect() as connection:
            return migrate.revision(connection)

    def upgrade(self) -> None:
        """Run the migrations that are missing, all or none."""
        with self._mapped():
            with self._engines.writing.connect() as connection:
                if migrate.is_latest(connection):
                    return
            with self._engines.writing.begin() as connection:
                migrate.upgrade(connection)

    def commit(self, entries: Sequence[Entry], *, now_us: int) -> Committed:
        notes_only = all(isinstance(entry, Reserve) for entry in entries)
        with self._writing(notes_only=notes_only) as connection:
            page = Page(
                now_us=now_us,
                buckets=self._buckets(connection, keys_touched(entries)),
                claims=_claims(connection, claims_touched(entries)),
            )
            outcomes = [page.take(entry) for entry in entries]
            self._write(connection, page)
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
        with self._reading() as connection:
            return usage_lines(connection.execute(usage_statement(query)), query.by)

    def close(self) -> None:
        self._engines.dispose()

    def _buckets(self, connection: Connection, key_ids: Sequence[str]) -> dict[str, Bucket]:
        """Locked one by one, in the order that all processes take."""
        found = {}
        for key_id in key_ids:
            for row in self._read_bucket.run(connection, [{"of_key": key_id}]):
                found[key_id] = Bucket(row.requests_debt, row.tokens_debt, row.at_us)
        return found

    def _write(self, connection: Connection, page: Page) -> None:
        if page.buckets_changed:
            changed = page.buckets_changed.items()
            values = [rows.bucket_values(key, bucket) | {"of_key": key} for key, bucket in changed]
            self._write_bucket.run(connection, values)
        if page.claims_changed:
            _write_claims(connection, page)
        if page.rows:
            self._append.run(connection, [rows.ledger_values(row) for row in page.rows])
        if page.upkeep is not None:
            _keep_up(connection, page.upkeep, now_us=page.now_us)

    @contextmanager
    def _writing(self, *, notes_only: bool = False) -> Iterator[Connection]:
        """Only what was billed must outlive a power cut; a reservation is forgotten in a minute."""
        self._ensure_prepared()
        engine = self._engines.noting if notes_only else self._engines.writing
        with self._mapped(), engine.begin() as connection:
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
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except DBAPIError as fault:
            if isinstance(fault, OURS):
                raise
            self._engines.dispose()  # a file that was read-only stays so for an open connection
            raise unavailable() from fault.orig
        except TimeoutError as fault:  # every reading connection is taken
            raise unavailable() from fault


def _claims(connection: Connection, names: Sequence[ClaimName]) -> dict[ClaimName, Claim]:
    if not names:
        return {}
    found = connection.execute(READ_CLAIMS, {"names": [tuple(name) for name in names]})
    return {ClaimName(row.key_id, bytes(row.digest)): rows.claim_of(row) for row in found}


def _write_claims(connection: Connection, page: Page) -> None:
    names = [{"of_key": n.key_id, "of_digest": n.digest} for n in page.claims_changed]
    connection.execute(DROP_CLAIM, names)
    made = [rows.claim_values(n, c) for n, c in page.claims_changed.items() if c is not None]
    if made:
        connection.execute(insert(claims), made)


def _keep_up(connection: Connection, upkeep: Upkeep, *, now_us: int) -> None:
    ours = timelines.c.boot_id == upkeep.boot_id
    connection.execute(update(timelines).where(ours).values(seen_us=now_us))
    running = (claims.c.owner == upkeep.owner) & claims.c.done.is_(False)
    connection.execute(update(claims).where(running).values(held_until_us=now_us + CLAIM_HELD_US))
    connection.execute(delete(claims).where(claims.c.expires_us <= now_us))
