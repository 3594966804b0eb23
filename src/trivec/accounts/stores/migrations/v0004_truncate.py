"""What becomes of texts that are too long, by default, in the requests of a key."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("keys", sa.Column("truncate", sa.String(8)))
