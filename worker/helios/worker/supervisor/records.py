"""The supervisor's own words: what is known of a replica, a device and a load, free of wire types.

Everything is frozen, so that a snapshot given to a session never changes under it.
"""

import enum
from dataclasses import dataclass
from datetime import datetime


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

    @property
    def is_ended(self) -> bool:
        """Whether nothing is left of the replica."""
        return self in (ReplicaState.STOPPED, ReplicaState.FAILED)


class DeviceKind(enum.Enum):
    """What kind of device."""

    CPU = "CPU"
    CUDA = "CUDA"


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
    """What changed at a replica since the last delta of the same replica."""

    replica_id: str
    load: Load
    started: tuple[str, ...] = ()
    finished: tuple[FinishedRequest, ...] = ()


@dataclass(frozen=True, slots=True)
class Order:
    """What was asked for: all that the life of a replica begins with. ``max_context_tokens`` 0: the model's own."""

    replica_id: str
    model: str
    revision: str
    engine: str
    memory_bytes: int
    kv_cache_bytes: int
    max_context_tokens: int
    created_at: datetime


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

    @property
    def replica_id(self) -> str:
        """The replica's id."""
        return self.order.replica_id


@dataclass(frozen=True, slots=True)
class Device:
    """Something that models run on, and how much of its memory replicas may use."""

    device_id: str
    kind: DeviceKind
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """A device and what is booked on it now."""

    device: Device
    booked_bytes: int


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
