"""The tables, once for SQLite and Postgres. What they look like on disk is made by `migrations`.

Instants are integers: microseconds since the epoch (`*_us`), on the wall clock for keys and the
ledger, on the store's own timeline for buckets and claims. No column ever holds text of a client's.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
)

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
    Column("revision", BigInteger, nullable=False, index=True),  # the keyring's, at its last change
    Column("truncate", String(8)),  # none, end or start; null: as the server does
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

keyring = Table(
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
    Column("replayed", Boolean, nullable=False),
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

claims = Table(
    "claims",
    metadata,
    Column("key_id", String(32), primary_key=True),
    Column("digest", LargeBinary(16), primary_key=True),
    Column("body_digest", LargeBinary, nullable=False),
    Column("owner", String(36), nullable=False),
    Column("held_until_us", BigInteger, nullable=False),
    Column("expires_us", BigInteger, nullable=False, index=True),
    Column("done", Boolean, nullable=False),
    Column("token_count", BigInteger, nullable=False),
)

timelines = Table(
    "timelines",
    metadata,
    Column("boot_id", String(36), primary_key=True),
    Column("offset_us", BigInteger, nullable=False),
    Column("seen_us", BigInteger, nullable=False),
)
