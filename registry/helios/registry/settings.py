"""Settings of the registry process."""

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from helios.mesh.settings import CLOSE_SECONDS, ProcessSettings


class IngestSettings(BaseModel):
    """Bounds of ingests."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_concurrent: int = Field(default=2, ge=1, le=64)
    """Ingests that run at once; more are refused (UNAVAILABLE). 2: one that converts (CPU), one that copies (disk)."""
    convert_timeout_seconds: float = Field(default=1800.0, gt=0)
    """A conversion that takes longer is killed. Half an hour: a 70 B model on a slow disk takes some twenty minutes."""
    reserve_bytes: int = Field(default=1 << 30, ge=0)
    """An ingest must leave this much of the disk free: 1 GiB, for the database, logs and neighbours. 0: none."""


class ArtifactSettings(BaseModel):
    """Bounds of start-up artifacts (compiled code, for one), which are kept as long as there is room."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    quota_bytes: int = Field(default=16 << 30, ge=0)
    """What all of them may take together, in bytes; the ones used longest ago go first. 16 GiB: compiled code of
    thousands of models. 0: none are kept."""
    max_bytes: int = Field(default=2 << 30, ge=0)
    """The largest one that is taken, in bytes. 2 GiB: graphs and kernels of a large model for many batch sizes."""
    max_concurrent: int = Field(default=2, ge=1, le=64)
    """Uploads at once; more are refused (UNAVAILABLE), and their makers try again. 2: one disk."""
    upload_seconds: float = Field(default=600.0, gt=0)
    """An upload that takes longer is given up. 600: the largest one at 4 MB/s."""


class RegistrySettings(ProcessSettings):
    """Everything that can be set for ``python -m helios.registry``."""

    process_name: ClassVar[str] = "registry"

    listen: str = "127.0.0.1:0"
    """``host:port`` or ``unix:/path`` for gRPC; port 0 takes a free one."""
    state_directory: Path
    """Where the database and the blobs are; made on first use. One registry at a time runs on it."""
    database_url: SecretStr = SecretStr("")
    """A PostgreSQL database, which must exist: ``postgresql://user:password@host:5432/name``, with libpq's parameters
    after ``?``. Not for the command line, which other users of the machine can read. Empty: SQLite, ``registry.db`` in
    the state directory, which is right for one registry; several need a database and blobs that all of them reach."""
    watch_poll_seconds: float = Field(default=0.5, gt=0)
    """How often PostgreSQL is asked whether another registry has changed a model, which watchers of this one are then
    told. 0.5: one row, twice a second. Of no meaning for SQLite, which has one registry."""
    watch_queue_size: int = Field(default=256, ge=1, le=1_000_000)
    """Changes that a watcher may lag behind before it is sent away to start over. 256: far more than people make."""
    drain_seconds: float = Field(default=5.0, ge=0)
    """How long running calls may go on when the process stops; ingests are cancelled at once, and start over later."""
    ingest: IngestSettings = Field(default_factory=IngestSettings)
    """Bounds of ingests."""
    artifacts: ArtifactSettings = Field(default_factory=ArtifactSettings)
    """Bounds of start-up artifacts."""

    @property
    def stop_limit_seconds(self) -> float:
        """How long the whole stop may take: the server drains first."""
        return max(self.stop_seconds, self.drain_seconds + CLOSE_SECONDS)
