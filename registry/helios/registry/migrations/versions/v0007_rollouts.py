"""Rollouts: a share of a model's requests for another revision, and what was done to it."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Makes the tables."""
    op.create_table(
        "rollouts",
        sa.Column("model", _text(), primary_key=True),
        sa.Column("revision", _text(71), nullable=False),
        sa.Column("weight_percent", sa.Integer, nullable=False),
        sa.Column("started_at_us", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(
            ["model", "revision"], ["model_revisions.model", "model_revisions.revision"], ondelete="CASCADE"
        ),
    )
    op.create_table(
        "rollout_steps",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("model", _text(), sa.ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
        sa.Column("revision", _text(71), nullable=False),
        sa.Column("weight_percent", sa.Integer, nullable=False),
        sa.Column("act", sa.String(31), nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
    )
    op.create_index("rollout_steps_by_model", "rollout_steps", ["model", "version"])


def _text(length: int | None = None) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
