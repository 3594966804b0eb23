"""Postgres tells whoever listens of each change to a key; and every key has its bucket."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0005"

FILL_BUCKETS = (
    "INSERT INTO buckets (key_id, requests_debt, tokens_debt, at_us) SELECT id, 0, 0, 0 FROM keys "
    "WHERE NOT EXISTS (SELECT 1 FROM buckets WHERE buckets.key_id = keys.id)"
)
NOTIFY = (
    "CREATE FUNCTION keys_notify() RETURNS trigger LANGUAGE plpgsql AS "
    "$$ BEGIN NOTIFY trivec_keys; RETURN NULL; END $$",
    "CREATE TRIGGER keys_changed AFTER UPDATE ON keyring "
    "FOR EACH STATEMENT EXECUTE FUNCTION keys_notify()",
)


def upgrade() -> None:
    op.execute(sa.text(FILL_BUCKETS))
    if op.get_bind().dialect.name == "postgresql":
        for statement in NOTIFY:
            op.execute(statement)
