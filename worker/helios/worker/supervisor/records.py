"""The supervisor's own words: what is known of a replica, a device and a load, free of wire types.

Everything is frozen, so that a snapshot given to a session never changes under it.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from helios.mesh.transfer.progress import TransferProgress
from helios.worker.replica.adapter_state import AdapterStatus
from helios.worker.replica.kv_losses import Losses
from helios.worker.replica.settings import EngineSettings


class ReplicaState(enum.Enum):
    """Where a replica is in its life; the values are the contract's names without their prefix."""

    PENDING = "PENDING"
    FETCHING = "FETCHING"
    LOADING = "LOADING"
    WARMING = "WARMING"
    READY = "READY"
    DRAINING = "DRAINING"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    ASLEEP = "ASLEEP"
    WAKING = "WAKING"

    @property
    def is_ended(self) -> bool:
        """Whether nothing is left of the replica."""
        return self in (ReplicaState.STOPPED, ReplicaState.FAILED)


class DeviceKind(enum.Enum):
    """What kind of device."""

    CPU = "CPU"
    CUDA = "CUDA"


class MemoryKind(enum.Enum):
    """What a replica's memory is for; the values are the contract's names without their prefix."""

    WEIGHTS = "WEIGHTS"
    KV_CACHE = "KV_CACHE"
    ACTIVATIONS = "ACTIVATIONS"
    OVERHEAD = "OVERHEAD"
    SLEEPING = "SLEEPING"
    ADAPTERS = "ADAPTERS"
    HOST_ADAPTERS = "HOST_ADAPTERS"
    KV_OFFLOAD = "KV_OFFLOAD"


@dataclass(frozen=True, slots=True)
class MemoryItem:
    """One part of what a replica books."""

    kind: MemoryKind
    size_bytes: int


@dataclass(frozen=True, slots=True, order=True)
class ProcessIdentity:
    """One process for good: a pid is reused, a pid with its start time is not.

    Attributes:
        pid: Process id in the supervisor's pid namespace.
        start_ticks: Start time in clock ticks since boot (field 22 of ``/proc/<pid>/stat``).
    """

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a replica is not there any more: a stable reason for machines, a message for people."""

    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class PhaseTiming:
    """One measured phase of a cold start."""

    phase: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica is doing. ``kv_usage_ratio`` is 0..1; tokens count from the start of the replica."""

    running_requests: int = 0
    waiting_requests: int = 0
    kv_usage_ratio: float = 0.0
    generated_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """A request that left a replica.

    ``status_code`` is gRPC's; ``time_to_first_token_seconds`` None: there was none.
    """

    request_id: str
    status_code: int
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token_seconds: float | None
    duration_seconds: float


@dataclass(frozen=True, slots=True)
class LoadDelta:
    """What changed at a replica since the last delta of the same replica.

    ``arrivals`` says of requests that started when they arrived, in seconds since the epoch; ``losses`` what the KV
    cache lost, None: nothing, or the engine does not say.
    """

    replica_id: str
    load: Load
    started: tuple[str, ...] = ()
    finished: tuple[FinishedRequest, ...] = ()
    arrivals: tuple[tuple[str, float], ...] = ()
    losses: Losses | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for: all that the life of a replica begins with.

    ``max_context_tokens`` 0: the model's own. ``options`` are the engine's, by name; ``served_names`` are the model's
    other names. Of a replica that was adopted by its hello alone, only the form is known of its settings.
    ``requested_at`` (seconds since the epoch; 0: nobody did) and ``traceparent`` are of the request that asked for it.
    """

    replica_id: str
    model: str
    revision: str
    engine: str
    memory_bytes: int
    kv_cache_bytes: int
    max_context_tokens: int
    created_at: datetime
    options: Mapping[str, str] = field(default_factory=dict)
    settings: EngineSettings = field(default_factory=EngineSettings)
    served_names: tuple[str, ...] = ()

    memory_items: tuple[MemoryItem, ...] = ()
    """What ``memory_bytes`` is made of; empty: not known."""
    host_memory_items: tuple[MemoryItem, ...] = ()
    """What it has in host memory beside; empty where its device is the host."""
    device_ids: tuple[str, ...] = ()
    """Devices that were asked for; empty: any."""
    device_count: int = 1
    """How many devices it runs on, each with an equal share."""
    requested_at: float = 0.0
    traceparent: str = ""
    is_background: bool = False
    """It is to take the place of one that serves; until it is ready it computes with what others leave."""

    @property
    def host_memory_bytes(self) -> int:
        """What it books in host memory beside ``memory_bytes``."""
        return sum(item.size_bytes for item in self.host_memory_items)

    @property
    def revisions(self) -> tuple[str, ...]:
        """All that it needs on the node: the model's revision first, then its adapters' and its draft model's."""
        return (self.revision, *self.settings.revisions)


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as others see it."""

    order: Order
    state: ReplicaState
    address: str = ""
    process: ProcessIdentity | None = None
    failure: Failure | None = None
    phases: tuple[PhaseTiming, ...] = ()
    max_context_tokens: int = 0
    lease_id: str = ""
    load: Load = Load()
    device_ids: tuple[str, ...] = ()
    can_sleep: bool = False
    wake_count: int = 0
    sleeping_bytes: int | None = None
    """Booked while it sleeps; None: it is awake, and books all that was ordered."""
    measured_bytes: int = 0
    """Memory of its own as measured last; 0: never."""
    adapters: tuple[AdapterStatus, ...] = ()
    fetch: TransferProgress | None = None
    """Set while bytes of its weights are on their way."""

    @property
    def replica_id(self) -> str:
        """The replica's id."""
        return self.order.replica_id

    @property
    def memory_bytes(self) -> int:
        """What it books now, over all its devices."""
        return self.order.memory_bytes if self.sleeping_bytes is None else self.sleeping_bytes

    @property
    def memory_items(self) -> tuple[MemoryItem, ...]:
        """What it books now, item by item."""
        if self.sleeping_bytes is not None:
            return (MemoryItem(MemoryKind.SLEEPING, self.sleeping_bytes),)
        return self.order.memory_items


class LinkKind(enum.Enum):
    """Ways between devices, the fastest first; the values are the contract's names without their prefix."""

    NVLINK = "NVLINK"
    PCIE_SWITCH = "PCIE_SWITCH"
    PCIE_HOST = "PCIE_HOST"
    SYSTEM = "SYSTEM"


@dataclass(frozen=True, slots=True)
class DeviceLink:
    """The way to another device; ``link_count`` is of NVLink."""

    device_id: str
    kind: LinkKind
    link_count: int = 0


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What does not change about a device; empty and None: not known, or not of this kind of device.

    Attributes:
        uuid: What CUDA_VISIBLE_DEVICES takes.
        parent_device_id: The device that a MIG slice is a part of.
    """

    name: str = ""
    uuid: str = ""
    parent_device_id: str = ""
    mig_profile: str = ""
    numa_node: int | None = None
    pci_bus_id: str = ""
    compute_capability: str = ""
    links: tuple[DeviceLink, ...] = ()


@dataclass(frozen=True, slots=True)
class Device:
    """Something that models run on, and how much of its memory replicas may use."""

    device_id: str
    kind: DeviceKind
    memory_bytes: int
    facts: DeviceFacts = DeviceFacts()


class Health(enum.Enum):
    """Whether replicas may be started on a device; the values are the contract's names without their prefix."""

    HEALTHY = "HEALTHY"
    DEGRADED = "DEGRADED"
    LOST = "LOST"


@dataclass(frozen=True, slots=True)
class DeviceMeasure:
    """What was measured of a device; None: it can't say."""

    device_id: str
    health: Health = Health.HEALTHY
    health_message: str = ""
    used_bytes: int | None = None
    total_bytes: int | None = None
    utilization_ratio: float | None = None
    temperature_celsius: int | None = None
    corrected_error_count: int | None = None
    uncorrected_error_count: int | None = None


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A device, what is booked on it now and what was measured of it last."""

    device: Device
    booked_bytes: int
    measure: DeviceMeasure | None = None


class StagedState(enum.Enum):
    """Where a staged revision stands; the values are the contract's names without their prefix."""

    STAGING = "STAGING"
    STAGED = "STAGED"
    GONE = "GONE"


@dataclass(frozen=True, slots=True)
class StagedView:
    """A revision in host memory, as others see it.

    ``resident_bytes`` are in memory; of these, ``locked_bytes`` can not be dropped by the kernel.
    """

    revision: str
    model: str
    state: StagedState
    memory_bytes: int
    resident_bytes: int = 0
    locked_bytes: int = 0
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class HostUse:
    """Host memory that staged revisions may take, and what they do take, in bytes."""

    memory_bytes: int = 0
    booked_bytes: int = 0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """All that a worker says of itself in a hello."""

    worker_id: str
    incarnation: str
    node: str
    version: str
    devices: tuple[DeviceUse, ...]
    engines: tuple[str, ...]
    slot_count: int
    replicas: tuple[ReplicaView, ...]
    host: HostUse = HostUse()
    staged: tuple[StagedView, ...] = ()
    zone: str = ""
