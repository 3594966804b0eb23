"""Tables of the SQL stores, their migrations, and the rows of keys.

Instants are integers: microseconds since the epoch (`*_us`). No column ever holds a client's text.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa

from trivec.accounts.types import Key, RateLimits, Scope, Secret
from trivec.core.errors import StoreRefused

if TYPE_CHECKING:  # imported where it is used: it takes as long as all of SQLAlchemy
    from alembic.script import ScriptDirectory

Values: TypeAlias = dict[str, Any]  # the columns of one row, by name
UPGRADE_LOCK = 7_472_697_665  # any number of ours: Postgres' advisory lock for migrations

metadata = sa.MetaData()

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(64), nullable=False),  # in alphabetical order, a blank between
    sa.Column("models", sa.String),  # a JSON array in alphabetical order; null: every model
    sa.Column("requests_per_minute", sa.BigInteger),
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("created_us", sa.BigInteger, nullable=False),
    sa.Column("expires_us", sa.BigInteger),
    sa.Column("revoked_us", sa.BigInteger),
    sa.Column("revision", sa.BigInteger, nullable=False, index=True),  # at its last change
    sa.Column("truncate", sa.String(8)),  # none, end or start; null: the server's default
)
sa.Index(
    "ix_keys_name_live",
    keys.c.name,
    unique=True,
    sqlite_where=keys.c.revoked_us.is_(None),
    postgresql_where=keys.c.revoked_us.is_(None),
)

secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("digest", sa.LargeBinary(32), primary_key=True),
    sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), nullable=False, index=True),
    sa.Column("first", sa.String(8), nullable=False),
    sa.Column("last", sa.String(4), nullable=False),
    sa.Column("created_us", sa.BigInteger, nullable=False),
    sa.Column("expires_us", sa.BigInteger),
)

key_revision = sa.Table(
    "keyring",
    metadata,
    sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),  # always 1
    sa.Column("revision", sa.BigInteger, nullable=False),  # grows with every change to any key
    sa.Column("secret_check", sa.LargeBinary(16)),  # tells another server secret from ours
)

buckets = sa.Table(
    "buckets",
    metadata,
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("requests_debt", sa.BigInteger, nullable=False),
    sa.Column("tokens_debt", sa.BigInteger, nullable=False),
    sa.Column("at_us", sa.BigInteger, nullable=False),
)

ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column(
        "sequence",
        sa.BigInteger().with_variant(sa.Integer, "sqlite"),
        primary_key=True,
        autoincrement=True,
    ),
    sa.Column("time_us", sa.BigInteger, nullable=False, index=True),
    sa.Column("request_id", sa.String(64), nullable=False, unique=True),
    sa.Column("key_id", sa.String(32), nullable=False),
    sa.Column("model", sa.String),
    sa.Column("input_count", sa.BigInteger, nullable=False),
    sa.Column("token_count", sa.BigInteger, nullable=False),  # billed
    sa.Column("status", sa.SmallInteger, nullable=False),
    sa.Column("duration_us", sa.BigInteger, nullable=False),
    sa.Column("user_digest", sa.String(32)),
)

counts = sa.Table(  # of requests that cost no tokens
    "counts",
    metadata,
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("model", sa.String, primary_key=True),  # empty: no model
    sa.Column("status", sa.SmallInteger, primary_key=True, autoincrement=False),
    sa.Column("minute", sa.BigInteger, primary_key=True, autoincrement=False),  # since the epoch
    sa.Column("requests", sa.BigInteger, nullable=False),
)

daily = sa.Table(  # sums of ledger and counts, kept when their rows are archived
    "daily",
    metadata,
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("model", sa.String, primary_key=True),  # empty: no model
    sa.Column("day", sa.BigInteger, primary_key=True, autoincrement=False),  # since the epoch
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("failed", sa.BigInteger, nullable=False),
    sa.Column("tokens", sa.BigInteger, nullable=False),
)

archive = sa.Table(
    "archive",
    metadata,
    sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),  # always 1
    sa.Column("before_us", sa.BigInteger, nullable=False),  # rows before it may be deleted
)

probe = sa.Table(  # written by an idle process, which so learns whether it can
    "probe",
    metadata,
    sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),  # always 1
    sa.Column("at_us", sa.BigInteger, nullable=False),
)


def revision(connection: sa.Connection) -> str | None:
    """The schema's present revision; None for an empty database."""
    from alembic.runtime.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: sa.Connection, target: str = "head") -> None:
    """Run the migrations that are missing, in the caller's transaction. Raises `StoreRefused`."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": UPGRADE_LOCK})
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


def check_latest(connection: sa.Connection) -> None:
    """Raise `StoreRefused` unless the schema is the one this version reads."""
    found = revision(connection)
    if found != _migrations(connection).get_current_head():
        raise StoreRefused(
            f"the database's schema is {'absent' if found is None else f'of revision {found}'}, "
            "older than this version reads; run: trivec db upgrade"
        )


def _migrations(connection: sa.Connection) -> "ScriptDirectory":
    """All that this version knows. Raises `StoreRefused` where the schema is of a newer one."""
    from alembic.script import ScriptDirectory

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


def read_keys(connection: sa.Connection, are_meant: sa.ColumnElement[bool]) -> list[Key]:
    """The keys whose row fits *are_meant*, with their secrets."""
    found = connection.execute(sa.select(keys).where(are_meant)).all()
    by_key: dict[str, list[Secret]] = {row.id: [] for row in found}
    if found:
        theirs = sa.select(secrets).join(keys).where(are_meant).order_by(secrets.c.created_us)
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
