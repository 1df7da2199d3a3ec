"""What replicas were measured to hold."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "measures",
        sa.Column("revision", _text(71), sa.ForeignKey("revisions.digest", ondelete="CASCADE"), primary_key=True),
        sa.Column("settings_sha256", _text(64), primary_key=True),
        sa.Column("is_gpu", sa.Boolean, primary_key=True),
        sa.Column("fixed_bytes", sa.BigInteger, nullable=False),
        sa.Column("measured_at_us", sa.BigInteger, nullable=False),
    )


def _text(length: int | None = None) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
