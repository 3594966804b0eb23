"""Keys, their allowances, and a ledger that nobody can edit."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

SQLITE_REFUSALS = (
    "CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
POSTGRES_REFUSALS = (
    "CREATE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$",
    "CREATE TRIGGER ledger_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON ledger "
    "FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse()",
)


def upgrade() -> None:
    _create_keys()
    _create_buckets_and_ledger()
    refusals = SQLITE_REFUSALS if op.get_bind().dialect.name == "sqlite" else POSTGRES_REFUSALS
    for refusal in refusals:
        op.execute(refusal)


def _create_keys() -> None:
    op.create_table(
        "keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(64), nullable=False),
        sa.Column("models", sa.String),
        sa.Column("requests_per_minute", sa.BigInteger),
        sa.Column("tokens_per_minute", sa.BigInteger),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger),
        sa.Column("revoked_us", sa.BigInteger),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_keys_revision", "keys", ["revision"])
    op.create_index(
        "ix_keys_name_live",
        "keys",
        ["name"],
        unique=True,
        sqlite_where=sa.text("revoked_us IS NULL"),
        postgresql_where=sa.text("revoked_us IS NULL"),
    )
    op.create_table(
        "secrets",
        sa.Column("digest", sa.LargeBinary(32), primary_key=True),
        sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), nullable=False),
        sa.Column("first", sa.String(8), nullable=False),
        sa.Column("last", sa.String(4), nullable=False),
        sa.Column("created_us", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger),
    )
    op.create_index("ix_secrets_key_id", "secrets", ["key_id"])
    keyring = op.create_table(
        "keyring",
        sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("revision", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(keyring, [{"id": 1, "revision": 0}])


def _create_buckets_and_ledger() -> None:
    op.create_table(
        "buckets",
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("requests_debt", sa.BigInteger, nullable=False),
        sa.Column("tokens_debt", sa.BigInteger, nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "ledger",
        sa.Column(
            "sequence",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column("time_us", sa.BigInteger, nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False, unique=True),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("model", sa.String),
        sa.Column("input_count", sa.BigInteger, nullable=False),
        sa.Column("token_count", sa.BigInteger, nullable=False),
        sa.Column("status", sa.SmallInteger, nullable=False),
        sa.Column("duration_us", sa.BigInteger, nullable=False),
        sa.Column("user_digest", sa.String(32)),
    )
    op.create_index("ix_ledger_time_us", "ledger", ["time_us"])
