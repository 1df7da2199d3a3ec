"""The registry's tables, in SQLAlchemy Core, for SQLite and PostgreSQL alike.

Core rather than the ORM: every query is visible, rows become frozen records at once, and nothing loads lazily. What a
table is comes from the steps in ``migrations/versions``; a test holds these definitions to them.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
)

metadata = MetaData()


def text(length: int | None = None) -> Any:
    """Returns the type of a column that is sorted or compared: by bytes, in whatever language a database was made."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


# What a Helios from before Alembic looks at: it refuses a database whose number it does not know.
schema_version = Table("schema_version", metadata, Column("version", Integer, primary_key=True, autoincrement=False))

# One row: the number of the last change of a model. Writers queue, so numbers are in the order in which changes become
# visible.
head = Table(
    "head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("version", BigInteger, nullable=False),
)

# One row: which database this is, from the moment it was made. A blob store that names it is this database's.
identity = Table(
    "identity",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("database_id", String(32), nullable=False),
)

# A row says that the blob is complete on disk: rows are written after the rename, in the transaction that uses them.
blobs = Table(
    "blobs",
    metadata,
    Column("hash", text(64), primary_key=True),
    Column("size_bytes", BigInteger, nullable=False),
    CheckConstraint("size_bytes >= 0", name="blobs_size"),
    Index("blobs_by_size", "size_bytes"),
)

# How a blob is cut into chunks; computed from it. Packed, because an index is read whole and never searched.
chunk_indexes = Table(
    "chunk_indexes",
    metadata,
    Column("blob", ForeignKey("blobs.hash", ondelete="CASCADE"), primary_key=True),
    # Big-endian 32-bit numbers.
    Column("lengths", LargeBinary, nullable=False),
    # 32 bytes a chunk.
    Column("blake3", LargeBinary, nullable=False),
)

revisions = Table(
    "revisions",
    metadata,
    Column("digest", text(71), primary_key=True),
    Column("source", String, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    # Microseconds since 1970, UTC: the same in every database, and exact.
    Column("created_at_us", BigInteger, nullable=False),
    # JSON of ModelProfile: read whole, never searched.
    Column("profile", String, nullable=False),
)

# What a converted file became, so that the same file is not converted again by the same converter.
conversions = Table(
    "conversions",
    metadata,
    Column("source_sha256", text(64), primary_key=True),
    Column("converter", text(), primary_key=True),
    Column("revision", ForeignKey("revisions.digest", ondelete="CASCADE"), nullable=False),
    Index("conversions_by_revision", "revision"),
)

entries = Table(
    "entries",
    metadata,
    Column("revision", ForeignKey("revisions.digest", ondelete="CASCADE"), primary_key=True),
    Column("path", text(), primary_key=True),
    Column("blob", ForeignKey("blobs.hash"), nullable=False),
    Column("media_type", String, nullable=False),
    Index("entries_by_blob", "blob"),
)

models = Table(
    "models",
    metadata,
    Column("name", text(), primary_key=True),
    Column("revision", ForeignKey("revisions.digest"), nullable=False),
    Column("min_replicas", Integer, nullable=False),
    Column("max_replicas", Integer, nullable=False),
    # JSON of what else the policy says: windows, and how warm the model is kept.
    Column("scaling", String, nullable=False, server_default="{}"),
    # JSON of the contract's EngineSettings: read whole, never searched.
    Column("engine_settings", String, nullable=False, server_default="{}"),
    Column("created_at_us", BigInteger, nullable=False),
    # Number of the last change of the model, its tags, aliases, pins and rollout.
    Column("version", BigInteger, nullable=False, server_default="0"),
    Index("models_by_revision", "revision"),
)

# The revisions that a model has served; `ordinal` grows with each time one becomes the served one.
model_revisions = Table(
    "model_revisions",
    metadata,
    Column("model", ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
    Column("revision", ForeignKey("revisions.digest"), primary_key=True),
    Column("ordinal", Integer, nullable=False),
    Index("model_revisions_by_revision", "revision"),
)

aliases = Table(
    "aliases",
    metadata,
    Column("alias", text(), primary_key=True),
    Column("model", ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
    Index("aliases_by_model", "model"),
)

# API keys; the secret itself is nowhere.
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", text(32), primary_key=True),
    Column("name", text(63), nullable=False),
    Column("sha256", LargeBinary, nullable=False),
    Column("tenant", text(63), nullable=False),
    # JSON array of globs: read whole, never searched.
    Column("models", String, nullable=False),
    Column("requests_per_minute", BigInteger, nullable=False),
    Column("tokens_per_minute", BigInteger, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("weight", Integer, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("expires_at_us", BigInteger),
    Column("revoked_at_us", BigInteger),
    Index("api_keys_by_name", "name"),
)

# Names of revisions within a model, such as `prod`.
tags = Table(
    "tags",
    metadata,
    Column("model", text(), primary_key=True),
    Column("tag", text(63), primary_key=True),
    Column("revision", text(71), nullable=False),
    Column("moved_at_us", BigInteger, nullable=False),
    ForeignKeyConstraint(
        ["model", "revision"], ["model_revisions.model", "model_revisions.revision"], ondelete="CASCADE"
    ),
    Index("tags_by_revision", "model", "revision"),
)

# Revisions that are not to be deleted.
pins = Table(
    "pins",
    metadata,
    Column("model", text(), primary_key=True),
    Column("revision", text(71), primary_key=True),
    Column("reason", String, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    ForeignKeyConstraint(
        ["model", "revision"], ["model_revisions.model", "model_revisions.revision"], ondelete="CASCADE"
    ),
)

# Where a model's served revision (tag "") and its tags have pointed, in order. A revision that was deleted stays here.
moves = Table(
    "moves",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("model", ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
    Column("tag", text(63), nullable=False),
    # Null: the tag was deleted.
    Column("revision", text(71)),
    Column("cause", String(31), nullable=False),
    Column("actor", String, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Index("moves_by_pointer", "model", "tag", "version"),
)

# Revisions that a share of their model's requests goes to instead of the served one; at most one a model.
rollouts = Table(
    "rollouts",
    metadata,
    Column("model", text(), primary_key=True),
    Column("revision", text(71), nullable=False),
    Column("weight_percent", Integer, nullable=False),
    Column("started_at_us", BigInteger, nullable=False),
    ForeignKeyConstraint(
        ["model", "revision"], ["model_revisions.model", "model_revisions.revision"], ondelete="CASCADE"
    ),
)

# What was done to a model's rollouts, in order; the oldest go. A revision that was deleted stays here.
rollout_steps = Table(
    "rollout_steps",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("model", ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
    Column("revision", text(71), nullable=False),
    Column("weight_percent", Integer, nullable=False),
    Column("act", String(31), nullable=False),
    Column("actor", String, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Index("rollout_steps_by_model", "model", "version"),
)

# What replicas of a revision were measured to hold beside KV cache and adapters, at most.
measures = Table(
    "measures",
    metadata,
    Column("revision", ForeignKey("revisions.digest", ondelete="CASCADE"), primary_key=True),
    # Of the engine settings that they ran with.
    Column("settings_sha256", text(64), primary_key=True),
    Column("is_gpu", Boolean, primary_key=True),
    Column("fixed_bytes", BigInteger, nullable=False),
    Column("measured_at_us", BigInteger, nullable=False),
)

# Sources that models follow, and how that went.
followed = Table(
    "followed",
    metadata,
    Column("model", ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
    Column("source", String, nullable=False),
    # JSON: the patterns of files that are taken, and of those that are not.
    Column("patterns", String, nullable=False),
    Column("interval_seconds", Float, nullable=False),
    Column("policy", String(31), nullable=False),
    Column("weight_percent", Integer, nullable=False),
    # Of what the source had when it was ingested last; empty: it was not looked at yet.
    Column("fingerprint", String, nullable=False),
    Column("checked_at_us", BigInteger),
    Column("changed_at_us", BigInteger),
    Column("error", String, nullable=False),
    Column("error_reason", String, nullable=False),
    Column("failure_count", Integer, nullable=False),
    # A look in progress moves it: who dies over one lets another registry have it then.
    Column("next_at_us", BigInteger, nullable=False),
    Index("followed_by_next", "next_at_us"),
)

# Every change of a model, for watchers; the oldest go.
events = Table(
    "events",
    metadata,
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(31), nullable=False),
    Column("model", text(), nullable=False),
    # JSON: what the kind says more.
    Column("detail", String, nullable=False),
    Column("actor", String, nullable=False),
    Column("at_us", BigInteger, nullable=False),
)

# Requests that were carried out, so that one that is sent again changes nothing.
requests = Table(
    "requests",
    metadata,
    Column("request_id", text(128), primary_key=True),
    # sha256 of the call and what it asked for.
    Column("fingerprint", String(64), nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Index("requests_by_time", "at_us"),
)

# What was made of a revision and saves time at a start; ends with it.
artifacts = Table(
    "artifacts",
    metadata,
    Column("kind", text(63), primary_key=True),
    Column("key", text(64), primary_key=True),
    Column("inputs", String, nullable=False),
    Column("revision", ForeignKey("revisions.digest", ondelete="CASCADE"), nullable=False),
    Column("digest", text(71), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("producer", String, nullable=False),
    Column("created_at_us", BigInteger, nullable=False),
    Column("used_at_us", BigInteger, nullable=False),
    Index("artifacts_by_revision", "revision"),
    Index("artifacts_by_digest", "digest"),
)

artifact_entries = Table(
    "artifact_entries",
    metadata,
    Column("kind", text(63), primary_key=True),
    Column("key", text(64), primary_key=True),
    Column("path", text(), primary_key=True),
    Column("blob", ForeignKey("blobs.hash"), nullable=False),
    Column("media_type", String, nullable=False),
    ForeignKeyConstraint(["kind", "key"], ["artifacts.kind", "artifacts.key"], ondelete="CASCADE"),
    Index("artifact_entries_by_blob", "blob"),
)

# What was counted of a model in an hour, and what had been expected of it. An hour of nothing has no row.
usage_hours = Table(
    "usage_hours",
    metadata,
    Column("model", ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
    # Whole hours since 1970, UTC.
    Column("hour", Integer, primary_key=True, autoincrement=False),
    Column("requests", BigInteger, nullable=False, server_default="0"),
    Column("prompt_tokens", BigInteger, nullable=False, server_default="0"),
    Column("completion_tokens", BigInteger, nullable=False, server_default="0"),
    Column("cold_starts", BigInteger, nullable=False, server_default="0"),
    Column("busy_ms", BigInteger, nullable=False, server_default="0"),
    # Requests that were expected before the hour began. Null: no forecast was made for it.
    Column("expected", Double),
    Column("expected_low", Double),
    Column("expected_high", Double),
    Index("usage_hours_by_hour", "hour"),
)

# The last report of each run of a proxy that was taken, so that one that is sent again counts once.
usage_reporters = Table(
    "usage_reporters",
    metadata,
    Column("reporter", text(128), primary_key=True),
    Column("sequence", BigInteger, nullable=False),
    Column("at_us", BigInteger, nullable=False),
    Index("usage_reporters_by_time", "at_us"),
)

# The newest forecast of each model.
forecasts = Table(
    "forecasts",
    metadata,
    Column("model", ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
    Column("made_at_us", BigInteger, nullable=False),
    Column("method", String(31), nullable=False),
    Column("history_hours", Integer, nullable=False),
    Column("first_hour", Integer, nullable=False),
    # JSON: a list of [mean, low, high], read whole.
    Column("hours", String, nullable=False),
)

# One row: the hour that forecasts were made for last, so that of several registries one makes them.
forecast_runs = Table(
    "forecast_runs",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("hour", Integer, nullable=False),
)

# Who may do alone what only one may. A row stays for ever: its epoch must not be granted again.
leases = Table(
    "leases",
    metadata,
    Column("name", text(63), primary_key=True),
    # Empty: nobody's.
    Column("holder", text(128), nullable=False),
    Column("address", String(256), nullable=False),
    Column("epoch", BigInteger, nullable=False),
    # By the database's clock.
    Column("begins_at_us", BigInteger, nullable=False),
    Column("ends_at_us", BigInteger, nullable=False),
)

# Workers that nothing more is to be started on.
cordons = Table(
    "cordons",
    metadata,
    Column("worker_id", text(128), primary_key=True),
    Column("created_at_us", BigInteger, nullable=False),
)
