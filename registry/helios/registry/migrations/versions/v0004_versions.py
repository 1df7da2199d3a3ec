"""Tags, pins, the history of both and of what is served, numbered changes, and requests that are known again.

What a model has served is in its history from the start: the order is known, and the time at which each revision was
made. Nobody knows who did it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Makes the tables, and a history of what there is."""
    op.create_table(
        "head",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("version", sa.BigInteger, nullable=False),
    )
    op.add_column("models", sa.Column("version", sa.BigInteger, nullable=False, server_default="0"))
    _make_pointers()
    _make_changes()
    op.execute(
        "INSERT INTO moves (version, model, tag, revision, cause, actor, at_us) "
        "SELECT row_number() OVER (ORDER BY served.ordinal, served.model), served.model, '', served.revision, "
        "'ingest', '', revisions.created_at_us FROM model_revisions AS served "
        "JOIN revisions ON revisions.digest = served.revision"
    )
    op.execute("INSERT INTO head (id, version) SELECT 1, count(*) FROM moves")
    op.execute("UPDATE models SET version = (SELECT max(version) FROM moves WHERE moves.model = models.name)")
    # An older Helios refuses the database by this number.
    op.execute("DELETE FROM schema_version")
    op.execute("INSERT INTO schema_version (version) VALUES (4)")


def _make_pointers() -> None:
    for name, columns in (
        ("tags", [sa.Column("tag", _text(63), primary_key=True), sa.Column("revision", _text(71), nullable=False)]),
        ("pins", [sa.Column("revision", _text(71), primary_key=True), sa.Column("reason", sa.String, nullable=False)]),
    ):
        op.create_table(
            name,
            sa.Column("model", _text(), primary_key=True),
            *columns,
            sa.Column("moved_at_us" if name == "tags" else "created_at_us", sa.BigInteger, nullable=False),
            sa.ForeignKeyConstraint(
                ["model", "revision"], ["model_revisions.model", "model_revisions.revision"], ondelete="CASCADE"
            ),
        )
    op.create_index("tags_by_revision", "tags", ["model", "revision"])


def _make_changes() -> None:
    op.create_table(
        "moves",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("model", _text(), sa.ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
        sa.Column("tag", _text(63), nullable=False),
        sa.Column("revision", _text(71)),
        sa.Column("cause", sa.String(31), nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
    )
    op.create_index("moves_by_pointer", "moves", ["model", "tag", "version"])
    op.create_table(
        "events",
        sa.Column("version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(31), nullable=False),
        sa.Column("model", _text(), nullable=False),
        sa.Column("detail", sa.String, nullable=False),
        sa.Column("actor", sa.String, nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "requests",
        sa.Column("request_id", _text(128), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("at_us", sa.BigInteger, nullable=False),
    )
    op.create_index("requests_by_time", "requests", ["at_us"])


def _text(length: int | None = None) -> sa.types.TypeEngine[str]:
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")
