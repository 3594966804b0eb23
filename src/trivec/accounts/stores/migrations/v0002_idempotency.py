"""Idempotency keys, a timeline that outlives a moved wall clock, a check of the server's secret."""

import sqlalchemy as sa
from alembic import op

from trivec.accounts.stores.tables import key, whole

revision = "0002"
down_revision = "0001"

# The environment's key has no row among the keys; this one was what its claims were locked by.
FIXED_BUCKET = (
    "INSERT INTO buckets (key_id, requests_debt, tokens_debt, at_us) "
    "VALUES ('TRIVEC_API_KEY', 0, 0, 0)"
)


def upgrade() -> None:
    is_replayed = sa.Column("replayed", sa.Boolean, nullable=False, server_default=sa.false())
    op.add_column("ledger", is_replayed)
    op.add_column("keyring", sa.Column("secret_check", sa.LargeBinary(16)))
    op.execute(FIXED_BUCKET)
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
    op.create_table(
        "timelines", key("boot_id", sa.String(36)), whole("offset_us"), whole("seen_us")
    )
