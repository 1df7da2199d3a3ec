"""How a model's engine is set."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds the settings, of which models that are there have none."""
    op.add_column("models", sa.Column("engine_settings", sa.String, nullable=False, server_default="{}"))
