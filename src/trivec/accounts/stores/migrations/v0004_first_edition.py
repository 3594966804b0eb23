"""The first edition's: keys, buckets, a ledger that nobody can edit, totals, idempotency keys."""

import sqlalchemy as sa
from alembic import op

from trivec.accounts.stores.tables import key, serial, whole

revision = "0004"
down_revision = None

ARCHIVED_BEFORE = "COALESCE((SELECT before_us FROM archive WHERE id = 1), 0)"
SQLITE_REFUSALS = (
    "CREATE TRIGGER ledger_no_update BEFORE UPDATE ON ledger "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
    "CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger "
    f"WHEN OLD.time_us >= {ARCHIVED_BEFORE} "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
POSTGRES_REFUSALS = (
    "CREATE FUNCTION ledger_refuse() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN RAISE EXCEPTION 'the ledger is append-only'; END $$",
    "CREATE TRIGGER ledger_append_only BEFORE UPDATE OR TRUNCATE ON ledger "
    "FOR EACH STATEMENT EXECUTE FUNCTION ledger_refuse()",
    "CREATE FUNCTION ledger_keep() RETURNS trigger LANGUAGE plpgsql AS "
    f"$$ BEGIN IF OLD.time_us >= {ARCHIVED_BEFORE} THEN "
    "RAISE EXCEPTION 'the ledger is append-only'; END IF; RETURN OLD; END $$",
    "CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger "
    "FOR EACH ROW EXECUTE FUNCTION ledger_keep()",
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
        sa.Column("truncate", sa.String(8)),
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
    check = sa.Column("secret_check", sa.LargeBinary(16))
    op.create_table("keyring", key("id", sa.SmallInteger), whole("revision"), check)
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
        sa.Column("replayed", sa.Boolean, nullable=False, server_default=sa.false()),
    )
    op.create_index("ix_ledger_time_us", "ledger", ["time_us"])
    whose = {"key_id": sa.String(32), "model": sa.String}
    of_minute = {**whose, "status": sa.SmallInteger, "minute": sa.BigInteger}
    of_day = {**whose, "day": sa.BigInteger}
    sums = map(whole, ("requests", "failed", "tokens"))
    op.create_table("counts", *(key(*one) for one in of_minute.items()), whole("requests"))
    op.create_table("daily", *(key(*one) for one in of_day.items()), *sums)
    op.create_table("archive", key("id", sa.SmallInteger), whole("before_us"))
    op.create_table(
        "claims",
        key("key_id", sa.String(32)),
        key("digest", sa.LargeBinary(16)),
        sa.Column("body_digest", sa.LargeBinary, nullable=False),
        sa.Column("owner", sa.String(36), nullable=False),
        whole("held_until_us"),
        whole("expires_us"),
        sa.Column("done", sa.Boolean, nullable=False),
        whole("token_count"),
    )
    op.create_index("ix_claims_expires_us", "claims", ["expires_us"])
    boot = key("boot_id", sa.String(36))
    op.create_table("timelines", boot, whole("offset_us"), whole("seen_us"))
    op.execute("INSERT INTO keyring (id, revision) VALUES (1, 0)")
    op.execute("INSERT INTO archive (id, before_us) VALUES (1, 0)")
    # The environment's key has no row among the keys.
    op.execute("INSERT INTO buckets VALUES ('TRIVEC_API_KEY', 0, 0, 0)")
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for refusal in SQLITE_REFUSALS if is_sqlite else POSTGRES_REFUSALS:
        op.execute(refusal)
