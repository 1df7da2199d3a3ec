"""What the registry says about models, as values. Other components get these types through ``client``."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from helios.registry.engine_settings import NO_SETTINGS, EngineSettings
from helios.registry.events import PLAIN, Mutation
from helios.registry.manifest import Manifest
from helios.registry.policy import ModelPolicy
from helios.registry.profile import ModelProfile


@dataclass(frozen=True, slots=True)
class Revision:
    """An immutable state of a model. ``digest`` is ``sha256:<hex>`` of its manifest's canonical form."""

    digest: str
    profile: ModelProfile
    source: str
    size_bytes: int
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Tag:
    """A name of a revision within its model, and since when it names that one."""

    name: str
    revision: Revision
    moved_at: datetime


@dataclass(frozen=True, slots=True)
class Pin:
    """A revision, by its digest, that is not to be deleted, and why."""

    revision: str
    reason: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Rollout:
    """A revision, the *canary*, that a share of its model's requests goes to, in percent; since when."""

    revision: Revision
    weight_percent: int
    started_at: datetime


@dataclass(frozen=True, slots=True)
class Model:
    """A named model and its served revision. Aliases are sorted, tags by name, pins by revision.

    ``version`` is the number of its last change. Two models are equal if they say the same, whenever that came to be.
    """

    name: str
    aliases: tuple[str, ...]
    revision: Revision
    policy: ModelPolicy
    created_at: datetime
    engine_settings: EngineSettings = NO_SETTINGS
    tags: tuple[Tag, ...] = ()
    pins: tuple[Pin, ...] = ()
    rollout: Rollout | None = None
    version: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """What a reference means: a model and one of its revisions; ``tag`` is empty where none was named."""

    model: Model
    revision: Revision
    tag: str = ""


@dataclass(frozen=True, slots=True)
class BlobLocation:
    """A store that has blobs: its URL, and how it is reached beyond that, by obstore's names. Holds no secret."""

    url: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LocatedManifest:
    """A manifest; the blob with hash h is at ``<url>/sha256/<first two of h>/<h>`` of every location.

    ``revision`` is None for an artifact's; ``locations`` has at least one, best first.
    """

    manifest: Manifest
    locations: tuple[BlobLocation, ...]
    revision: Revision | None

    @property
    def blob_store_url(self) -> str:
        """The best location's URL."""
        return self.locations[0].url


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """All models, by name: what a watch begins with, unless it goes on from a version that is still known.

    ``version`` is the number of the last change that it shows; a watch that goes on from there misses nothing.
    """

    models: tuple[Model, ...]
    version: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ModelUpserted:
    """A model was made or changed. ``version``: all changes up to this one have been told."""

    model: Model
    version: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class ModelDeleted:
    """The model with this name is gone. ``version`` as above."""

    name: str
    version: int = field(default=0, compare=False)


ModelChange = ModelUpserted | ModelDeleted
WatchEvent = ModelSnapshot | ModelChange


class IngestPhase(StrEnum):
    """What an ingest is doing; phases come in this order, and those that have nothing to do are left out."""

    INSPECT = "inspect"
    FETCH = "fetch"
    CONVERT = "convert"
    STORE = "store"
    COMMIT = "commit"


class PushPhase(StrEnum):
    """What a push is doing; phases come in this order."""

    LOOK = "look"
    SEND = "send"
    COMMIT = "commit"


@dataclass(frozen=True, slots=True)
class IngestSpec:
    """What to ingest.

    ``expected_sha256`` is empty where nothing is expected; without ``engine_settings`` a model keeps those it has.
    ``include`` and ``exclude`` are patterns of files, for sources of several. ``tags`` are to point at the revision;
    with ``keep_served`` a model that exists goes on serving what it serves. ``mutation`` says who asks.
    """

    name: str
    source: str
    aliases: tuple[str, ...] = ()
    expected_sha256: str = ""
    engine_settings: EngineSettings | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    keep_served: bool = False
    # Who follows an ingest that runs asks for the same, under whatever name.
    mutation: Mutation = field(default=PLAIN, compare=False)


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """Where an ingest or a push stands; ``total_bytes`` 0: unknown.

    The rate is of the last seconds, 0 before anything can be said; ``remaining_seconds`` is what is left at that rate.
    """

    phase: IngestPhase | PushPhase
    done_bytes: int = 0
    total_bytes: int = 0
    bytes_per_second: float = field(default=0.0, compare=False)
    remaining_seconds: float | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class IngestDone:
    """The result of an ingest; ``new_bytes`` were not in the blob store before."""

    model: Model
    new_bytes: int


IngestEvent = IngestProgress | IngestDone
