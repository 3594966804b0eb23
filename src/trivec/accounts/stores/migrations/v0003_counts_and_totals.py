"""Counts of requests that cost no tokens, daily totals, and a ledger whose old rows may move out."""

import sqlalchemy as sa
from alembic import op

from trivec.accounts.stores.tables import key, whole

revision = "0003"
down_revision = "0002"

FILL_DAILY = (
    "INSERT INTO daily (key_id, model, day, requests, failed, tokens) "
    "SELECT key_id, COALESCE(model, ''), time_us / 86400000000, count(*), "
    "SUM(CASE WHEN status >= 400 THEN 1 ELSE 0 END), SUM(token_count) "
    "FROM ledger GROUP BY 1, 2, 3"
)
ARCHIVED_BEFORE = "COALESCE((SELECT before_us FROM archive WHERE id = 1), 0)"
SQLITE_REFUSALS = (
    "DROP TRIGGER ledger_no_delete",
    "CREATE TRIGGER ledger_no_delete BEFORE DELETE ON ledger "
    f"WHEN OLD.time_us >= {ARCHIVED_BEFORE} "
    "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END",
)
POSTGRES_REFUSALS = (
    "DROP TRIGGER ledger_append_only ON ledger",
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
        "counts",
        key("key_id", sa.String(32)),
        key("model", sa.String),
        key("status", sa.SmallInteger),
        key("minute", sa.BigInteger),
        whole("requests"),
    )
    op.create_table(
        "daily",
        key("key_id", sa.String(32)),
        key("model", sa.String),
        key("day", sa.BigInteger),
        *map(whole, ("requests", "failed", "tokens")),
    )
    op.create_table("archive", key("id", sa.SmallInteger), whole("before_us"))
    op.execute("INSERT INTO archive (id, before_us) VALUES (1, 0)")
    op.execute(FILL_DAILY)
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for refusal in SQLITE_REFUSALS if is_sqlite else POSTGRES_REFUSALS:
        op.execute(refusal)
