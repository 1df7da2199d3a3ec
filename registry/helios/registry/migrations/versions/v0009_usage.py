"""Usage of models by the hour, and forecasts of it."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Makes the tables."""
    _make_usage()
    op.create_table(
        "usage_reporters",
        sa.Column("reporter", _text(128), primary_key=True),
        sa.Column("sequence", sa.BigInteger, nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
    )
    op.create_index("usage_reporters_by_time", "usage_reporters", ["at_us"])
    op.create_table(
        "forecasts",
        sa.Column("model", _text(), sa.ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("made_at_us", sa.BigInteger, nullable=False),
        sa.Column("method", sa.String(31), nullable=False),
        sa.Column("history_hours", sa.Integer, nullable=False),
        sa.Column("first_hour", sa.Integer, nullable=False),
        sa.Column("hours", sa.String, nullable=False),
    )
    runs = op.create_table(
        "forecast_runs",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("hour", sa.Integer, nullable=False),
    )
    op.bulk_insert(runs, [{"id": 1, "hour": 0}])


def _make_usage() -> None:
    counts = ("requests", "prompt_tokens", "completion_tokens", "cold_starts", "busy_ms")
    op.create_table(
        "usage_hours",
        sa.Column("model", _text(), sa.ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("hour", sa.Integer, primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.BigInteger, nullable=False, server_default="0") for name in counts),
        *(sa.Column(name, sa.Double) for name in ("expected", "expected_low", "expected_high")),
    )
    op.create_index("usage_hours_by_hour", "usage_hours", ["hour"])


def _text(length: int | None = None) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
