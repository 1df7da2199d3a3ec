"""Start-up artifacts, whose blobs an older registry would take for unused."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Makes the tables of artifacts."""
    op.create_table(
        "artifacts",
        sa.Column("kind", _text(63), primary_key=True),
        sa.Column("key", _text(64), primary_key=True),
        sa.Column("inputs", sa.String, nullable=False),
        sa.Column("revision", _text(71), sa.ForeignKey("revisions.digest", ondelete="CASCADE"), nullable=False),
        sa.Column("digest", _text(71), nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("producer", sa.String, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("used_at_us", sa.BigInteger, nullable=False),
    )
    op.create_index("artifacts_by_revision", "artifacts", ["revision"])
    op.create_index("artifacts_by_digest", "artifacts", ["digest"])
    op.create_table(
        "artifact_entries",
        sa.Column("kind", _text(63), primary_key=True),
        sa.Column("key", _text(64), primary_key=True),
        sa.Column("path", _text(), primary_key=True),
        sa.Column("blob", _text(64), sa.ForeignKey("blobs.hash"), nullable=False),
        sa.Column("media_type", sa.String, nullable=False),
        sa.ForeignKeyConstraint(["kind", "key"], ["artifacts.kind", "artifacts.key"], ondelete="CASCADE"),
    )
    op.create_index("artifact_entries_by_blob", "artifact_entries", ["blob"])


def _text(length: int | None = None) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
