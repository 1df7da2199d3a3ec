"""What a model's policy says beside the two bounds: windows, and how warm the model is kept."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"


def upgrade() -> None:
    """Adds it, of which models that are there say nothing."""
    op.add_column("models", sa.Column("scaling", sa.String, nullable=False, server_default="{}"))
