"""Leases, and cordons, which each proxy kept for itself."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "leases",
        sa.Column("name", _text(63), primary_key=True),
        sa.Column("holder", _text(128), nullable=False),
        sa.Column("address", sa.String(256), nullable=False),
        sa.Column("epoch", sa.BigInteger, nullable=False),
        sa.Column("begins_at_us", sa.BigInteger, nullable=False),
        sa.Column("ends_at_us", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "cordons",
        sa.Column("worker_id", _text(128), primary_key=True),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
    )


def _text(length: int) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
