"""Tables of the SQL stores, their migrations, the rows of keys, and Postgres' reservation.

Instants are integers: microseconds since the epoch (`*_us`). No column holds a text to embed; the
only words of clients are the names of files and the metadata of batch jobs.
"""

import json
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeAlias

import sqlalchemy as sa

from trivec.accounts.types import Key, RateLimits, Scope, Secret
from trivec.core.errors import StoreRefused

if TYPE_CHECKING:  # imported where it is used: it takes as long as all of SQLAlchemy
    from alembic.script import ScriptDirectory

Values: TypeAlias = dict[str, Any]  # the columns of one row, by name
UPGRADE_LOCK = 7_472_697_665  # any number of ours: Postgres' advisory lock for migrations
_upgrading = Lock()  # in this process

metadata = sa.MetaData()


def whole(name: str, *, nullable: bool = False, **more: Any) -> "sa.Column[int]":
    """A column of 64-bit integers."""
    return sa.Column(name, sa.BigInteger, nullable=nullable, **more)


def key(name: str, kind: Any) -> "sa.Column[Any]":
    """A column of the primary key; we give the values."""
    return sa.Column(name, kind, primary_key=True, autoincrement=False)


def serial(name: str) -> "sa.Column[int]":
    """The primary key; the database gives the values, from 1."""
    kind = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    return sa.Column(name, kind, primary_key=True, autoincrement=True)


keys = sa.Table(
    "keys",
    metadata,
    key("id", sa.String(32)),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(64), nullable=False),  # in alphabetical order, a blank between
    sa.Column("models", sa.String),  # a JSON array in alphabetical order; null: every model
    whole("requests_per_minute", nullable=True),
    whole("tokens_per_minute", nullable=True),
    whole("created_us"),
    whole("expires_us", nullable=True),
    whole("revoked_us", nullable=True),
    whole("revision", index=True),  # at its last change
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
    key("digest", sa.LargeBinary(32)),
    sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), nullable=False, index=True),
    sa.Column("first", sa.String(8), nullable=False),
    sa.Column("last", sa.String(4), nullable=False),
    whole("created_us"),
    whole("expires_us", nullable=True),
)

key_revision = sa.Table(
    "keyring",
    metadata,
    key("id", sa.SmallInteger),  # always 1
    whole("revision"),  # grows with every change to any key
    sa.Column("secret_check", sa.LargeBinary(16)),  # of the server's secret
)

buckets = sa.Table(
    "buckets",
    metadata,
    key("key_id", sa.String(32)),
    *map(whole, ("requests_debt", "tokens_debt", "at_us")),
)

ledger = sa.Table(
    "ledger",
    metadata,
    serial("sequence"),
    whole("time_us", index=True),
    sa.Column("request_id", sa.String(64), nullable=False, unique=True),
    sa.Column("key_id", sa.String(32), nullable=False),
    sa.Column("model", sa.String),
    whole("input_count"),
    whole("token_count"),  # billed
    sa.Column("status", sa.SmallInteger, nullable=False),
    whole("duration_us"),
    sa.Column("user_digest", sa.String(32)),
)

counts = sa.Table(  # of requests that cost no tokens
    "counts",
    metadata,
    key("key_id", sa.String(32)),
    key("model", sa.String),  # empty: no model
    key("status", sa.SmallInteger),
    key("minute", sa.BigInteger),  # since the epoch
    whole("requests"),
)

daily = sa.Table(  # sums of ledger and counts, kept when their rows are archived
    "daily",
    metadata,
    key("key_id", sa.String(32)),
    key("model", sa.String),  # empty: no model
    key("day", sa.BigInteger),  # since the epoch
    # Nodes have rows of their own, so that those that serve a busy key need not wait for each other.
    key("part", sa.SmallInteger),
    *map(whole, ("requests", "failed", "tokens")),
)

archive = sa.Table(
    "archive",
    metadata,
    key("id", sa.SmallInteger),  # always 1
    whole("before_us"),  # rows before it may be deleted
)

probe = sa.Table(  # written by an idle process, to find out whether it can
    "probe",
    metadata,
    key("id", sa.SmallInteger),  # always 1
    whole("at_us"),
)

files = sa.Table(
    "files",
    metadata,
    key("id", sa.String(64)),
    sa.Column("key_id", sa.String(32), nullable=False),
    sa.Column("purpose", sa.String(16), nullable=False),  # batch or batch_output
    sa.Column("filename", sa.String(255), nullable=False),  # as the client calls it
    sa.Column("state", sa.String(8), nullable=False),  # pending, stored or deleted
    whole("byte_count"),
    whole("created_us"),
    whole("expires_us", nullable=True),
    sa.Index("ix_files_key_id", "key_id", "id"),
)

batches = sa.Table(
    "batches",
    metadata,
    key("id", sa.String(64)),
    sa.Column("key_id", sa.String(32), nullable=False),
    sa.Column("endpoint", sa.String(32), nullable=False),
    sa.Column("model", sa.String),  # as its lines name it; null until they are validated
    sa.Column("input_file_id", sa.String(64), nullable=False),
    sa.Column("output_file_id", sa.String(64)),
    sa.Column("error_file_id", sa.String(64)),
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("ends_as", sa.String(16), nullable=False),  # its status once its files are there
    sa.Column("metadata", sa.String),  # a JSON object
    sa.Column("errors", sa.String),  # a JSON array: what was wrong with its lines
    whole("output_expires_s", nullable=True),
    whole("created_us"),
    whole("expires_us"),
    whole("in_progress_us", nullable=True),
    whole("finalizing_us", nullable=True),
    whole("completed_us", nullable=True),
    whole("failed_us", nullable=True),
    whole("expired_us", nullable=True),
    whole("cancelling_us", nullable=True),
    whole("cancelled_us", nullable=True),
    whole("total", default=0),  # lines, as are completed and failed
    whole("completed", default=0),
    whole("failed", default=0),
    whole("token_count", default=0),  # billed
    whole("served_us", default=0),  # when a shard was last leased
    sa.Index("ix_batches_key_id", "key_id", "id"),
)

batch_shards = sa.Table(  # the steps of a batch job, each leased by one server at a time
    "batch_shards",
    metadata,
    serial("id"),
    sa.Column("batch_id", sa.String(64), sa.ForeignKey("batches.id"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),  # validate, run or join
    whole("first_line", default=0),  # of its file, from 1
    whole("line_count", default=0),
    whole("byte_start", default=0),
    whole("byte_count", default=0),
    sa.Column("lease", sa.String(128), index=True),  # of the server that works on it, or did
    whole("lease_until_us", default=0),
    whole("done_us", nullable=True, index=True),
    whole("completed", default=0),
    whole("failed", default=0),
    whole("token_count", default=0),
    sa.UniqueConstraint("batch_id", "number", name="uq_batch_shards_number"),
)


def revision(connection: sa.Connection) -> str | None:
    """The schema's present revision; None for an empty database."""
    from alembic.runtime.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision()


def upgrade(connection: sa.Connection, target: str = "head") -> None:
    """Run the migrations that are missing, in the caller's transaction. Raises `StoreRefused`."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext

    if connection.dialect.name == "postgresql":  # it takes as long as the tables are large
        connection.execute(sa.text("SET LOCAL statement_timeout = 0"))
        connection.execute(sa.text("SET LOCAL idle_in_transaction_session_timeout = 0"))
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
    # Alembic's `op` is one for the whole process, and files may have a store of their own.
    with _upgrading, Operations.context(context):
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
    plain = ("id", "name", "created_us", "expires_us", "revoked_us", "truncate")
    return {
        **{name: getattr(key, name) for name in plain},
        **asdict(key.limits),
        "scopes": " ".join(sorted(key.scopes)),
        "models": None if key.models is None else json.dumps(sorted(key.models)),
        "revision": revision,
    }


def secret_values(key: Key) -> list[Values]:
    return [asdict(secret) | {"key_id": key.id} for secret in key.secrets]


def read_keys(connection: sa.Connection, are_meant: sa.ColumnElement[bool]) -> list[Key]:
    """The keys whose row fits *are_meant*, with their secrets."""
    found = connection.execute(sa.select(keys).where(are_meant)).all()
    by_key: dict[str, list[Secret]] = {row.id: [] for row in found}
    theirs = sa.select(secrets).join(keys).where(are_meant).order_by(secrets.c.created_us)
    for row in connection.execute(theirs) if found else ():
        secret = Secret(bytes(row.digest), row.first, row.last, row.created_us, row.expires_us)
        by_key.setdefault(row.key_id, []).append(secret)
    return [
        Key(
            row.id,
            row.name,
            frozenset(map(Scope, row.scopes.split())),
            None if row.models is None else frozenset(json.loads(row.models)),
            RateLimits(row.requests_per_minute, row.tokens_per_minute),
            *(row.created_us, row.expires_us, row.revoked_us, tuple(by_key[row.id]), row.truncate),
        )
        for row in found
    ]


# What `Transaction` does for a `Reserve`, in one statement, so that the bucket is locked only while it
# runs: nodes that share a busy key would otherwise wait for each other's round trips. A minute has
# 60,000,000 us. `least` and `greatest` ignore nulls.
RESERVE = """
WITH asked AS (
    SELECT %s::text AS key_id, %s::bigint AS now_us,
        %s::bigint AS requests_limit, %s::bigint AS tokens_limit,
        %s::bigint AS requests, %s::bigint AS tokens,
        %s::bigint AS ahead_requests, %s::bigint AS ahead_tokens,
        %s::bigint AS unused_requests, %s::bigint AS unused_tokens
), refilled AS (
    SELECT asked.*, greatest(now_us, at_us) AS at_us,
        greatest(0, least(requests_debt, requests_limit * 60000000)
            - requests_limit * least(greatest(0, now_us - at_us), 60000000)
            - unused_requests * 60000000) AS requests_debt,
        greatest(0, least(tokens_debt, tokens_limit * 60000000)
            - tokens_limit * least(greatest(0, now_us - at_us), 60000000)
            - unused_tokens * 60000000) AS tokens_debt
    FROM asked JOIN buckets USING (key_id) FOR UPDATE OF buckets
), decided AS (
    SELECT *,
        coalesce(requests_debt + requests * 60000000 <= requests_limit * 60000000, true)
            AND coalesce(tokens_debt + tokens * 60000000 <= tokens_limit * 60000000, true) AS fits,
        greatest(0, least(ahead_requests, requests_limit / %s,
            ((requests_limit * 60000000 - requests_debt) / 60000000 - requests) / %s)) AS more_requests,
        greatest(0, least(ahead_tokens, tokens_limit / %s,
            ((tokens_limit * 60000000 - tokens_debt) / 60000000 - tokens) / %s)) AS more_tokens
    FROM refilled
)
UPDATE buckets SET at_us = decided.at_us,
    requests_debt = decided.requests_debt + CASE WHEN fits AND requests_limit IS NOT NULL
        THEN (requests + more_requests) * 60000000 ELSE 0 END,
    tokens_debt = decided.tokens_debt + CASE WHEN fits AND tokens_limit IS NOT NULL
        THEN (tokens + more_tokens) * 60000000 ELSE 0 END
FROM decided WHERE buckets.key_id = decided.key_id
RETURNING fits, buckets.requests_debt, buckets.tokens_debt, buckets.at_us,
    more_requests, more_tokens, set_config('synchronous_commit', 'off', true)
"""
