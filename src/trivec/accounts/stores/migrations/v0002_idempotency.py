"""Idempotency keys, a timeline that outlives a moved wall clock, a check of the server's secret."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column(
        "ledger", sa.Column("replayed", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.add_column("keyring", sa.Column("secret_check", sa.LargeBinary(16)))
    # The environment's key has no row among the keys; this one is what its claims are locked by.
    buckets = sa.table(
        "buckets",
        sa.column("key_id"),
        sa.column("requests_debt"),
        sa.column("tokens_debt"),
        sa.column("at_us"),
    )
    fixed = {"key_id": "TRIVEC_API_KEY", "requests_debt": 0, "tokens_debt": 0, "at_us": 0}
    op.bulk_insert(buckets, [fixed])
    op.create_table(
        "claims",
        sa.Column("key_id", sa.String(32), primary_key=True),
        sa.Column("digest", sa.LargeBinary(16), primary_key=True),
        sa.Column("body_digest", sa.LargeBinary, nullable=False),
        sa.Column("owner", sa.String(36), nullable=False),
        sa.Column("held_until_us", sa.BigInteger, nullable=False),
        sa.Column("expires_us", sa.BigInteger, nullable=False),
        sa.Column("done", sa.Boolean, nullable=False),
        sa.Column("token_count", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_claims_expires_us", "claims", ["expires_us"])
    op.create_table(
        "timelines",
        sa.Column("boot_id", sa.String(36), primary_key=True),
        sa.Column("offset_us", sa.BigInteger, nullable=False),
        sa.Column("seen_us", sa.BigInteger, nullable=False),
    )
