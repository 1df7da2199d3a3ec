"""Settings of the registry process."""

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from helios.mesh.settings import CLOSE_SECONDS, ProcessSettings
from helios.registry.follow.settings import FollowSettings
from helios.registry.push.settings import PushSettings
from helios.registry.sources.settings import SourceSettings
from helios.registry.sync.settings import SyncSettings
from helios.registry.usage.settings import UsageSettings


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


class BlobStoreSettings(BaseModel):
    """Where blobs are kept."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    url: str = ""
    """``s3://bucket/prefix``, ``gs://bucket/prefix``, ``az://container/prefix``, or an absolute directory. Empty: the
    directory ``blobs`` of the state directory. A prefix belongs to one database, which its ``owner.json`` names: what
    that database does not name is collected, whoever put it there. Credentials, endpoint and region come from the
    environment, by the names that obstore and the clouds' own tools have: ``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL`` (any S3), ``AWS_ALLOW_HTTP``;
    ``GOOGLE_APPLICATION_CREDENTIALS``; ``AZURE_STORAGE_ACCOUNT_NAME``, ``AZURE_STORAGE_ACCOUNT_KEY``,
    ``AZURE_STORAGE_SAS_KEY``, ``AZURE_STORAGE_ENDPOINT``."""
    take_over_from: str = ""
    """Name of the database that the blob store belongs to and that is in use no more: the store becomes this one's. A
    registry that finds another database's store does not start, and says that name. It may stay set: it is of no
    meaning for any other owner. Empty: nothing is taken over."""
    options: dict[str, SecretStr] = Field(default_factory=dict)
    """The same settings, by the same names in lower case (``aws_region``); they go before the environment's. Shown by
    no one, whatever they are; not for the command line, which other users of the machine can read."""
    part_bytes: int = Field(default=16 << 20, ge=5 << 20, le=1 << 30)
    """Blobs above this are uploaded in parts of this size (larger ones where that were more than 10,000), and a crash
    costs at most the parts that were on their way. 16 MiB: best in the measurements; S3 takes none below 5 MiB."""
    concurrency: int = Field(default=4, ge=1, le=64)
    """Parts of a blob that are on their way at once; memory is this times ``part_bytes`` for each ingest. 4: fills 1
    Gbit/s at 50 ms."""
    request_seconds: float = Field(default=60.0, gt=0)
    """A request that takes longer has failed, and is tried again. 60: a part of 16 MiB at 0.3 MB/s."""
    retry_seconds: float = Field(default=60.0, ge=0)
    """How long a request other than an upload's is tried again, with growing pauses, before it fails. 60: a store that
    restarts. Uploads are tried a few times, within seconds; the next ingest goes on with what arrived."""


class CollectionSettings(BaseModel):
    """When blobs that nothing refers to go. Those of a deleted model go at once; this is for what a crash left."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    interval_seconds: float = Field(default=6 * 3600.0, ge=0)
    """Pause between collections; each lists the whole store. 0: only when somebody asks (``helios models gc``)."""
    grace_seconds: float = Field(default=24 * 3600.0, ge=0)
    """What was stored less than this ago stays, and so do uploads that were begun since. A day: longer than the longest
    ingest of another registry that has the same store, whose ingests this one can't see."""


class ProfileSettings(BaseModel):
    """Bounds of profiles."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    plan_timeout_seconds: float = Field(default=120.0, gt=0)
    """A process that lists a model's modules for longer is killed, and the profile comes without them. 120: importing
    torch and building the largest model without weights takes 5 to 20 seconds, several times that on a busy machine."""


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
    blob_store: BlobStoreSettings = Field(default_factory=BlobStoreSettings)
    """Where blobs are kept."""
    collection: CollectionSettings = Field(default_factory=CollectionSettings)
    """When blobs that nothing refers to go."""
    sources: SourceSettings = Field(default_factory=SourceSettings)
    """Places that models are pulled from."""
    follow: FollowSettings = Field(default_factory=FollowSettings)
    """Bounds of looking at sources that models follow."""
    profiles: ProfileSettings = Field(default_factory=ProfileSettings)
    """Bounds of profiles."""
    push: PushSettings = Field(default_factory=PushSettings)
    """Pushes to OCI registries."""
    sync: SyncSettings = Field(default_factory=SyncSettings)
    """Sessions with storage agents."""

    usage: UsageSettings = Field(default_factory=UsageSettings)
    """Usage of models, and forecasts of it."""

    @property
    def stop_limit_seconds(self) -> float:
        """How long the whole stop may take: the server drains first."""
        return max(self.stop_seconds, self.drain_seconds + CLOSE_SECONDS)
