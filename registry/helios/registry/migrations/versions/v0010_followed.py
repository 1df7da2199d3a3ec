"""Sources that models follow."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Makes the table."""
    op.create_table(
        "followed",
        sa.Column("model", _text(), sa.ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("patterns", sa.String, nullable=False),
        sa.Column("interval_seconds", sa.Float, nullable=False),
        sa.Column("policy", sa.String(31), nullable=False),
        sa.Column("weight_percent", sa.Integer, nullable=False),
        sa.Column("fingerprint", sa.String, nullable=False),
        sa.Column("checked_at_us", sa.BigInteger),
        sa.Column("changed_at_us", sa.BigInteger),
        sa.Column("error", sa.String, nullable=False),
        sa.Column("error_reason", sa.String, nullable=False),
        sa.Column("failure_count", sa.Integer, nullable=False),
        sa.Column("next_at_us", sa.BigInteger, nullable=False),
    )
    op.create_index("followed_by_next", "followed", ["next_at_us"])


def _text(length: int | None = None) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
