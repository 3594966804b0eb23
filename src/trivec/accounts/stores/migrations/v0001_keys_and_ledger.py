"""Keys, their rate limits, and a ledger that nobody can edit."""

import sqlalchemy as sa
from alembic import op

from trivec.accounts.stores.tables import key, serial, whole

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
    op.create_table(
        "keys",
        key("id", sa.String(32)),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("scopes", sa.String(64), nullable=False),
        sa.Column("models", sa.String),
        whole("requests_per_minute", nullable=True),
        whole("tokens_per_minute", nullable=True),
        whole("created_us"),
        whole("expires_us", nullable=True),
        whole("revoked_us", nullable=True),
        whole("revision"),
    )
    op.create_index("ix_keys_revision", "keys", ["revision"])
    is_live = sa.text("revoked_us IS NULL")
    op.create_index(
        "ix_keys_name_live",
        "keys",
        ["name"],
        unique=True,
        sqlite_where=is_live,
        postgresql_where=is_live,
    )
    op.create_table(
        "secrets",
        key("digest", sa.LargeBinary(32)),
        sa.Column("key_id", sa.String(32), sa.ForeignKey("keys.id"), nullable=False),
        sa.Column("first", sa.String(8), nullable=False),
        sa.Column("last", sa.String(4), nullable=False),
        whole("created_us"),
        whole("expires_us", nullable=True),
    )
    op.create_index("ix_secrets_key_id", "secrets", ["key_id"])
    op.create_table("keyring", key("id", sa.SmallInteger), whole("revision"))
    op.execute("INSERT INTO keyring (id, revision) VALUES (1, 0)")
    debts = map(whole, ("requests_debt", "tokens_debt", "at_us"))
    op.create_table("buckets", key("key_id", sa.String(32)), *debts)
    op.create_table(
        "ledger",
        serial("sequence"),
        whole("time_us"),
        sa.Column("request_id", sa.String(64), nullable=False, unique=True),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("model", sa.String),
        whole("input_count"),
        whole("token_count"),
        sa.Column("status", sa.SmallInteger, nullable=False),
        whole("duration_us"),
        sa.Column("user_digest", sa.String(32)),
    )
    op.create_index("ix_ledger_time_us", "ledger", ["time_us"])
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for refusal in SQLITE_REFUSALS if is_sqlite else POSTGRES_REFUSALS:
        op.execute(refusal)
