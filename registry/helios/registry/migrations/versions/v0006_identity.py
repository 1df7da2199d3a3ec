"""Which database this is, for blob stores to say whose they are; and what large registries are searched by."""

from uuid import uuid4

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Makes the row and the indexes."""
    identity = op.create_table(
        "identity",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("database_id", sa.String(32), nullable=False),
    )
    op.bulk_insert(identity, [{"id": 1, "database_id": uuid4().hex}])
    op.create_index("blobs_by_size", "blobs", ["size_bytes"])
    op.create_index("conversions_by_revision", "conversions", ["revision"])
