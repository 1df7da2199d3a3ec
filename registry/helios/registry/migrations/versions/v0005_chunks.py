"""Chunk indexes. They are computed from the blobs, so there is nothing to convert."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "chunk_indexes",
        sa.Column("blob", _text(64), sa.ForeignKey("blobs.hash", ondelete="CASCADE"), primary_key=True),
        sa.Column("lengths", sa.LargeBinary, nullable=False),
        sa.Column("blake3", sa.LargeBinary, nullable=False),
    )


def _text(length: int | None = None) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
