"""Models, their revisions and blobs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Makes the first tables."""
    op.create_table("schema_version", sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
    op.create_table(
        "blobs",
        sa.Column("hash", _text(64), primary_key=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.CheckConstraint("size_bytes >= 0", name="blobs_size"),
    )
    op.create_table(
        "revisions",
        sa.Column("digest", _text(71), primary_key=True),
        sa.Column("source", sa.String, nullable=False),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
        sa.Column("profile", sa.String, nullable=False),
    )
    op.create_table(
        "conversions",
        sa.Column("source_sha256", _text(64), primary_key=True),
        sa.Column("converter", _text(), primary_key=True),
        sa.Column("revision", _text(71), sa.ForeignKey("revisions.digest", ondelete="CASCADE"), nullable=False),
    )
    op.create_table(
        "entries",
        sa.Column("revision", _text(71), sa.ForeignKey("revisions.digest", ondelete="CASCADE"), primary_key=True),
        sa.Column("path", _text(), primary_key=True),
        sa.Column("blob", _text(64), sa.ForeignKey("blobs.hash"), nullable=False),
        sa.Column("media_type", sa.String, nullable=False),
    )
    op.create_index("entries_by_blob", "entries", ["blob"])
    _make_names()


def _make_names() -> None:
    op.create_table(
        "models",
        sa.Column("name", _text(), primary_key=True),
        sa.Column("revision", _text(71), sa.ForeignKey("revisions.digest"), nullable=False),
        sa.Column("min_replicas", sa.Integer, nullable=False),
        sa.Column("max_replicas", sa.Integer, nullable=False),
        sa.Column("created_at_us", sa.BigInteger, nullable=False),
    )
    op.create_index("models_by_revision", "models", ["revision"])
    op.create_table(
        "model_revisions",
        sa.Column("model", _text(), sa.ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("revision", _text(71), sa.ForeignKey("revisions.digest"), primary_key=True),
        sa.Column("ordinal", sa.Integer, nullable=False),
    )
    op.create_index("model_revisions_by_revision", "model_revisions", ["revision"])
    op.create_table(
        "aliases",
        sa.Column("alias", _text(), primary_key=True),
        sa.Column("model", _text(), sa.ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
    )
    op.create_index("aliases_by_model", "aliases", ["model"])


def _text(length: int | None = None) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
