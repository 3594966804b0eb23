"""Files, batches, and the shards that servers lease to work on them."""

import sqlalchemy as sa
from alembic import op

from trivec.accounts.stores.tables import key, serial, whole

revision = "0006"
down_revision = "0005"

_TIMES = "in_progress finalizing completed failed expired cancelling cancelled"
_COUNTS = "total completed failed token_count served_us"


def upgrade() -> None:
    op.create_table(
        "files",
        key("id", sa.String(64)),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        whole("byte_count"),
        whole("created_us"),
        whole("expires_us", nullable=True),
    )
    op.create_index("ix_files_key_id", "files", ["key_id", "id"])
    op.create_table(
        "batches",
        key("id", sa.String(64)),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("model", sa.String),
        sa.Column("input_file_id", sa.String(64), nullable=False),
        sa.Column("output_file_id", sa.String(64)),
        sa.Column("error_file_id", sa.String(64)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("ends_as", sa.String(16), nullable=False),
        sa.Column("metadata", sa.String),
        sa.Column("errors", sa.String),
        whole("output_expires_s", nullable=True),
        whole("created_us"),
        whole("expires_us"),
        *(whole(f"{name}_us", nullable=True) for name in _TIMES.split()),
        *(whole(name) for name in _COUNTS.split()),
    )
    op.create_index("ix_batches_key_id", "batches", ["key_id", "id"])
    op.create_index("ix_batches_status", "batches", ["status"])
    op.create_table(
        "batch_shards",
        serial("id"),
        sa.Column("batch_id", sa.String(64), sa.ForeignKey("batches.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        whole("first_line"),
        whole("line_count"),
        whole("byte_start"),
        whole("byte_count"),
        sa.Column("lease", sa.String(128)),
        whole("lease_until_us"),
        whole("done_us", nullable=True),
        whole("completed"),
        whole("failed"),
        whole("token_count"),
        sa.UniqueConstraint("batch_id", "number", name="uq_batch_shards_number"),
    )
    op.create_index("ix_batch_shards_lease", "batch_shards", ["lease"])
    op.create_index("ix_batch_shards_done_us", "batch_shards", ["done_us"])
