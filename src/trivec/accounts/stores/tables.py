"""Tables of the SQL stores, their migrations, and the rows of keys.

Instants are integers: microseconds since the epoch (`*_us`). No column ever holds a client's text.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    select,
    text,
)

from trivec.accounts.types import Key, RateLimits, Scope, Secret
from trivec.core.errors import StoreRefused

Values: TypeAlias = dict[str, Any]  # the columns of one row, by name
UPGRADE_LOCK = 7_472_697_665  # any number of ours: Postgres' advisory lock for migrations

metadata = MetaData()

keys = Table(
    "keys",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("scopes", String(64), nullable=False),  # in alphabetical order, a blank between
    Column("models", String),  # a JSON array in alphabetical order; null: every model
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
    Column("revoked_us", BigInteger),
    Column("revision", BigInteger, nullable=False, index=True),  # `key_revision` at its last change
    Column("truncate", String(8)),  # none, end or start; null: the server's default
)
Index(
    "ix_keys_name_live",
    keys.c.name,
    unique=True,
    sqlite_where=keys.c.revoked_us.is_(None),
    postgresql_where=keys.c.revoked_us.is_(None),
)

secrets = Table(
    "secrets",
    metadata,
    Column("digest", LargeBinary(32), primary_key=True),
    Column("key_id", String(32), ForeignKey("keys.id"), nullable=False, index=True),
    Column("first", String(8), nullable=False),
    Column("last", String(4), nullable=False),
    Column("created_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger),
)

key_revision = Table(
    "keyring",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),  # always 1
    Column("revision", BigInteger, nullable=False),  # grows with every change to any key
    Column("secret_check", LargeBinary(16)),  # tells another server secret from ours
)

buckets = Table(
    "buckets",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("requests_debt", BigInteger, nullable=False),
    Column("tokens_debt", BigInteger, nullable=False),
    Column("at_us", BigInteger, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column(
        "sequence",
        BigInteger().with_variant(Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    Column("time_us", BigInteger, nullable=False, index=True),
    Column("request_id", String(64), nullable=False, unique=True),
    Column("key_id", String(32), nullable=False),
    Column("model", String),
    Column("input_count", BigInteger, nullable=False),
    Column("token_count", BigInteger, nullable=False),  # billed
    Column("status", SmallInteger, nullable=False),
    Column("duration_us", BigInteger, nullable=False),
    Column("user_digest", String(32)),
)

counts = Table(  # of requests that cost no tokens
    "counts",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("model", String, primary_key=True),  # empty: no model
    Column("status", SmallInteger, primary_key=True, autoincrement=False),
    Column("minute", BigInteger, primary_key=True, autoincrement=False),  # since the epoch
    Column("requests", BigInteger, nullable=False),
)

daily = Table(  # sums of ledger and counts, kept when their rows are archived
    "daily",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("model", String, primary_key=True),  # empty: no model
    Column("day", BigInteger, primary_key=True, autoincrement=False),  # since the epoch, in UTC
    Column("requests", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("tokens", BigInteger, nullable=False),
)

archive = Table(
    "archive",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),  # always 1
    Column("before_us", BigInteger, nullable=False),  # rows before it may be deleted
)

probe = Table(  # written by an idle process, which so learns whether it can
    "probe",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),  # always 1
    Column("at_us", BigInteger, nullable=False),
)


def revision(connection: Connection) -> str | None:
    """The schema's present revision; None for an empty database."""
    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: Connection, target: str = "head") -> None:
    """Run the migrations that are missing, in the caller's transaction. Raises `StoreRefused`."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": UPGRADE_LOCK})
    migrations = _migrations(connection)
    context = MigrationContext.configure(
        connection,
        opts={
            "transactional_ddl": True,
            "script": migrations,
            # As Alembic's own `upgrade` command does; there is no public name for it.
            "fn": lambda found, _: migrations._upgrade_revs(target, found),
        },
    )
    with Operations.context(context):
        context.run_migrations()


def check_latest(connection: Connection) -> None:
    """Raise `StoreRefused` unless the schema is the one this version reads."""
    found = revision(connection)
    if found != _migrations(connection).get_current_head():
        raise StoreRefused(
            f"the database's schema is {'absent' if found is None else f'of revision {found}'}, "
            "older than this version reads; run: trivec db upgrade"
        )


def _migrations(connection: Connection) -> ScriptDirectory:
    """All that this version knows. Raises `StoreRefused` where the schema is of a newer one."""
    folder = Path(__file__).parent / "migrations"
    migrations = ScriptDirectory(folder, version_locations=[folder])
    found = revision(connection)
    if found is not None and found not in {one.revision for one in migrations.walk_revisions()}:
        raise StoreRefused(
            f"the database's schema is of revision {found}, newer than this version of trivec "
            "reads; upgrade trivec, or restore an older copy of the database"
        )
    return migrations


def key_values(key: Key, *, revision: int) -> Values:
    return {
        "id": key.id,
        "name": key.name,
        "scopes": " ".join(sorted(key.scopes)),
        "models": None if key.models is None else json.dumps(sorted(key.models)),
        **asdict(key.limits),
        "created_us": key.created_us,
        "expires_us": key.expires_us,
        "revoked_us": key.revoked_us,
        "revision": revision,
        "truncate": key.truncate,
    }


def secret_values(key: Key) -> list[Values]:
    return [asdict(secret) | {"key_id": key.id} for secret in key.secrets]


def read_keys(connection: Connection, are_meant: ColumnElement[bool]) -> list[Key]:
    """The keys whose row fits *are_meant*, with their secrets."""
    found = connection.execute(select(keys).where(are_meant)).all()
    by_key: dict[str, list[Secret]] = {row.id: [] for row in found}
    if found:
        theirs = select(secrets).join(keys).where(are_meant).order_by(secrets.c.created_us)
        for row in connection.execute(theirs):
            secret = Secret(bytes(row.digest), row.first, row.last, row.created_us, row.expires_us)
            by_key.setdefault(row.key_id, []).append(secret)
    return [
        Key(
            row.id,
            row.name,
            frozenset(map(Scope, row.scopes.split())),
            None if row.models is None else frozenset(json.loads(row.models)),
            RateLimits(row.requests_per_minute, row.tokens_per_minute),
            row.created_us,
            row.expires_us,
            row.revoked_us,
            tuple(by_key[row.id]),
            row.truncate,
        )
        for row in found
    ]
