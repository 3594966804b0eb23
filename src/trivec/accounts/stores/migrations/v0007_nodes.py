"""What several nodes need: notices of changed keys, a bucket for each key, daily totals in parts."""

import sqlalchemy as sa
from alembic import op

from trivec.accounts.stores.tables import key, whole

revision = "0007"
down_revision = "0006"

FILL_BUCKETS = (
    "INSERT INTO buckets (key_id, requests_debt, tokens_debt, at_us) SELECT id, 0, 0, 0 FROM keys "
    "WHERE NOT EXISTS (SELECT 1 FROM buckets WHERE buckets.key_id = keys.id)"
)
COPY_DAILY = (
    "INSERT INTO daily_in_parts (key_id, model, day, part, requests, failed, tokens) "
    "SELECT key_id, model, day, 0, requests, failed, tokens FROM daily"
)
NOTIFY = (
    "CREATE FUNCTION keys_notify() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN NOTIFY trivec_keys; RETURN NULL; END $$",
    "CREATE TRIGGER keys_changed AFTER UPDATE ON keyring "
    "FOR EACH STATEMENT EXECUTE FUNCTION keys_notify()",
)


def upgrade() -> None:
    op.execute(FILL_BUCKETS)
    op.create_table(
        "daily_in_parts",
        key("key_id", sa.String(32)),
        key("model", sa.String),
        key("day", sa.BigInteger),
        key("part", sa.SmallInteger),
        *map(whole, ("requests", "failed", "tokens")),
    )
    op.execute(COPY_DAILY)
    op.drop_table("daily")
    op.rename_table("daily_in_parts", "daily")
    if op.get_bind().dialect.name == "postgresql":
        for statement in NOTIFY:
            op.execute(statement)
