"""What the proxy believes of workers and replicas.

Workers tell; the proxy believes. A hello replaces everything that was believed of its worker, so a reconnect needs no
history. Between hellos, replica events carry whole replicas with a growing sequence number; an older number is a
duplicate and changes nothing. Replicas that the proxy has asked for are believed from the moment of asking (as
PENDING), so that a second demand finds them.

A worker whose stream breaks, or that falls silent, is *unreachable*: its replicas are not picked, but they and their
endpoints stay believed until a grace time is over, because workers outlive proxies and streams.

This module is pure: time comes in as monotonic seconds.
"""

import enum
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from helios.mesh.gangs import GangDevice, Way
from helios.mesh.transfer.progress import TransferProgress


class ReplicaState(enum.Enum):
    """pending → fetching → loading → warming → ready → draining → stopped; ready → asleep → waking → ready; failed."""

    PENDING = 1
    FETCHING = 2
    LOADING = 3
    WARMING = 4
    READY = 5
    DRAINING = 6
    STOPPED = 7
    FAILED = 8
    ASLEEP = 9
    WAKING = 10

    @property
    def is_starting(self) -> bool:
        """Whether the replica is on its way to READY."""
        return self.value < ReplicaState.READY.value or self is ReplicaState.WAKING

    @property
    def is_gone(self) -> bool:
        """Whether the replica's process tree is gone."""
        return self in (ReplicaState.STOPPED, ReplicaState.FAILED)


class Form(enum.Enum):
    """How a replica runs its model; the values are the contract's. UNKNOWN: as its engine does by default."""

    UNKNOWN = 0
    EAGER = 1
    COMPILED = 2


class DeviceKind(enum.Enum):
    """What kind of device."""

    UNKNOWN = 0
    CPU = 1
    CUDA = 2


@dataclass(frozen=True, slots=True)
class Device:
    """A device of a worker; `booked_bytes` is as of the worker's last word.

    `facts` and `telemetry` are the contract's messages, for showing; nothing is decided by them but by what
    is read of them here.
    """

    device_id: str
    kind: DeviceKind
    memory_bytes: int
    booked_bytes: int
    is_healthy: bool = True
    used_ratio: float = 0.0
    busy_ratio: float = 0.0
    """How busy it was lately, 0..1."""
    is_slice: bool = False
    """Whether it is a MIG slice."""
    ways: tuple[tuple[str, Way], ...] = ()
    """How it reaches other devices of its worker."""
    facts: bytes = b""
    telemetry: bytes = b""


class StagedState(enum.Enum):
    """Where a staged revision stands."""

    STAGING = 1
    STAGED = 2
    GONE = 3


@dataclass(frozen=True, slots=True)
class Staged:
    """A revision in a node's memory, without a process."""

    revision: str
    model: str
    state: StagedState
    worker_id: str
    memory_bytes: int = 0
    resident_bytes: int = 0
    locked_bytes: int = 0
    failure_reason: str = ""
    failure_message: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica's engine is doing; `kv_usage_ratio` lies in [0, 1]."""

    running_count: int = 0
    waiting_count: int = 0
    kv_usage_ratio: float = 0.0
    generated_tokens: int = 0


class AdapterState(enum.Enum):
    """Where an adapter of a replica stands."""

    LOADING = 1
    LOADED = 2
    FAILED = 3
    UNLOADING = 4


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter: what requests call it, its name in the registry, its revision."""

    name: str
    model: str
    revision: str


@dataclass(frozen=True, slots=True)
class HeldAdapter:
    """An adapter that a replica has, or is to have."""

    adapter: Adapter
    state: AdapterState
    failure_reason: str = ""
    failure_message: str = ""


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine process group serving one model; `created_at` is in seconds since the epoch."""

    replica_id: str
    model: str
    revision: str
    state: ReplicaState
    worker_id: str
    address: str = ""
    engine: str = ""
    pid: int = 0
    failure_reason: str = ""
    failure_message: str = ""
    phases: tuple[tuple[str, float], ...] = ()
    memory_bytes: int = 0
    created_at: float = 0.0
    max_context_tokens: int = 0
    load: Load = Load()
    device_ids: tuple[str, ...] = ()
    memory_items: tuple[tuple[str, int], ...] = ()
    """What memory_bytes is made of: the contract's kinds, and bytes."""
    host_memory_items: tuple[tuple[str, int], ...] = ()
    """What it has in host memory beside."""
    measured_bytes: int = 0
    can_sleep: bool = False
    wake_count: int = 0
    form: Form = Form.UNKNOWN
    is_background: bool = False
    """It was ordered to take another one's place."""
    adapters: tuple[HeldAdapter, ...] = ()
    fetch: TransferProgress | None = None
    """Set while bytes of its weights are on their way."""

    @property
    def is_spare(self) -> bool:
        """Whether it is still on its way to take another one's place: nobody waits for it, and it gives way."""
        return self.is_background and self.state.value < ReplicaState.READY.value


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """How a worker introduces itself; `replicas` is every replica that it holds."""

    worker_id: str
    incarnation: str
    node: str
    devices: tuple[Device, ...]
    engines: tuple[str, ...]
    slot_count: int
    replicas: tuple[Replica, ...]
    version: str = ""
    host_memory_bytes: int = 0
    staged: tuple[Staged, ...] = ()
    zone: str = ""


@dataclass(slots=True)
class Worker:
    """A worker that is believed in. `lost_at` is None while it is connected and talking."""

    hello: WorkerHello
    seen_at: float
    foreign_bytes: int
    last_sequence: int = 0
    lost_at: float | None = None
    replicas: dict[str, Replica] = field(default_factory=dict)
    staged: dict[str, Staged] = field(default_factory=dict)
    devices: dict[str, Device] = field(default_factory=dict)

    @property
    def is_reachable(self) -> bool:
        """Whether its replicas may be picked and commands sent."""
        return self.lost_at is None

    @property
    def has_gpus(self) -> bool:
        """Whether it has devices of its own memory."""
        return any(device.kind is DeviceKind.CUDA for device in self.devices.values())

    @property
    def free_host_bytes(self) -> int:
        """Host memory that is free to stage: what was asked for counts as booked."""
        return self.unpinned_host_bytes - sum(staged.memory_bytes for staged in self.staged.values())

    @property
    def unpinned_host_bytes(self) -> int:
        """Host memory that no replica has: free, or staged revisions'."""
        items = (size for replica in self.replicas.values() for _, size in replica.host_memory_items)
        return self.hello.host_memory_bytes - sum(items)

    @property
    def host_used_ratio(self) -> float:
        """Share of the host's memory that is used, 0..1; 0 where that is not told."""
        return max((d.used_ratio for d in self.devices.values() if d.kind is DeviceKind.CPU), default=0.0)

    def memory_bytes_of(self, device_count: int) -> int:
        """The most that a replica on so many devices could have, each with an equal share."""
        sizes = sorted((device.memory_bytes for device in self.devices.values() if device.is_healthy), reverse=True)
        return sizes[device_count - 1] * device_count if device_count <= len(sizes) else 0

    def gang_devices(self) -> tuple[GangDevice, ...]:
        """The devices that can be used, with what nothing books of them: what was asked for counts as booked."""
        booked = dict.fromkeys(self.devices, self.foreign_bytes)
        for replica in self.replicas.values():
            # One that has not been given a device yet might lie on any.
            for device_id in replica.device_ids or self.devices:
                if device_id in booked:
                    booked[device_id] += -(-replica.memory_bytes // max(1, len(replica.device_ids)))
        return tuple(
            GangDevice(name, device.kind.name, device.memory_bytes - booked[name], device.is_slice, dict(device.ways))
            for name, device in self.devices.items()
            if device.is_healthy
        )


@dataclass(frozen=True, slots=True)
class Change:
    """A replica before and after; None where it was, or is, not believed in."""

    before: Replica | None
    after: Replica | None

    @property
    def replica(self) -> Replica:
        """The replica, in its newest known form."""
        replica = self.after or self.before
        assert replica is not None
        return replica


class FleetState:
    """Workers and replicas.

    Invariants: every replica belongs to exactly one worker that is believed in; a replica whose state is gone is not
    kept; the index by model agrees with the workers' replicas.
    """

    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._by_id: dict[str, Replica] = {}
        self._by_model: dict[str, dict[str, Replica]] = {}
        self._addresses: dict[str, str] = {}
        self.endpoints_version = 0
        self.cordoned: set[str] = set()
        """Workers on which nothing is to be started, whether or not they are believed in."""
        self._kinds: frozenset[bool] | None = None

    # What is believed.
    def workers(self) -> Iterable[Worker]:
        """All workers, in the order of their first hello."""
        return self._workers.values()

    def gpu_kinds(self) -> frozenset[bool]:
        """Whether there are workers with GPUs, and such without."""
        if self._kinds is None:
            self._kinds = frozenset(worker.has_gpus for worker in self._workers.values())
        return self._kinds

    def open_workers(self) -> list[Worker]:
        """Workers on which something may be started."""
        return [w for w in self._workers.values() if w.is_reachable and w.hello.worker_id not in self.cordoned]

    def worker(self, worker_id: str) -> Worker | None:
        """A worker by id."""
        return self._workers.get(worker_id)

    def replica(self, replica_id: str) -> Replica | None:
        """A replica by id."""
        return self._by_id.get(replica_id)

    def replicas(self) -> Iterable[Replica]:
        """All replicas."""
        return self._by_id.values()

    def replicas_of(self, model: str) -> tuple[Replica, ...]:
        """The replicas of a model, of any revision and state."""
        return tuple(self._by_model.get(model, {}).values())

    def models(self) -> Iterable[str]:
        """Models that have replicas."""
        return self._by_model.keys()

    def endpoints(self) -> frozenset[str]:
        """Addresses that Envoy should know: ready and draining replicas, those of unreachable workers included.

        `endpoints_version` grows with every change of them.
        """
        return frozenset(self._addresses.values())

    # What is told.
    def hello(self, hello: WorkerHello, asked: Iterable[Replica], now: float) -> list[Change]:
        """Replaces all that is believed of a worker.

        Args:
            hello: the worker's own words.
            asked: replicas whose start command the worker has not acknowledged yet; they stay believed.
            now: monotonic seconds.
        """
        old = self._workers.get(hello.worker_id)
        told = {r.replica_id: r for r in hello.replicas if not r.state.is_gone}
        own_bytes = sum(r.memory_bytes for r in told.values())
        worker = Worker(hello, now, max(0, sum(d.booked_bytes for d in hello.devices) - own_bytes))
        worker.staged = {staged.revision: staged for staged in hello.staged}
        worker.devices = {device.device_id: device for device in hello.devices}
        if old is not None and old.hello.incarnation == hello.incarnation:
            worker.last_sequence = old.last_sequence
        for replica in asked:
            told.setdefault(replica.replica_id, replica)
        before = dict(old.replicas) if old is not None else {}
        self._workers[hello.worker_id] = worker
        self._kinds = None
        changes = [self._forget(r) for key, r in before.items() if key not in told]
        return changes + [self._believe(worker, replica) for replica in told.values()]

    def replica_event(self, worker_id: str, sequence: int, replica: Replica, now: float) -> Change | None:
        """Takes in a replica that changed; None where the event is a duplicate or its worker unknown."""
        worker = self._workers.get(worker_id)
        if worker is None or sequence <= worker.last_sequence:
            return None
        worker.last_sequence = sequence
        worker.seen_at = now
        if replica.state.is_gone:
            return self.forget(replica)
        return self._believe(worker, replica)

    def staged_event(self, worker_id: str, sequence: int, staged: Staged) -> bool:
        """Takes in a staged revision that changed; False where the event is a duplicate or its worker unknown."""
        worker = self._workers.get(worker_id)
        if worker is None or sequence <= worker.last_sequence:
            return False
        worker.last_sequence = sequence
        if staged.state is StagedState.GONE:
            worker.staged.pop(staged.revision, None)
        else:
            worker.staged[staged.revision] = staged
        return True

    def device_measured(self, worker_id: str, measured: Device) -> bool:
        """Takes in what was measured of a device; True where its health changed. `facts` and memory stay as told."""
        worker = self._workers.get(worker_id)
        known = worker.devices.get(measured.device_id) if worker is not None else None
        if worker is None or known is None:
            return False
        worker.devices[known.device_id] = replace(
            known,
            booked_bytes=measured.booked_bytes,
            is_healthy=measured.is_healthy,
            used_ratio=measured.used_ratio,
            busy_ratio=measured.busy_ratio,
            telemetry=measured.telemetry,
        )
        return known.is_healthy is not measured.is_healthy

    def staged_on(self, revision: str) -> list[Worker]:
        """Workers that hold a revision in memory, all of it."""
        return [
            worker
            for worker in self._workers.values()
            if (held := worker.staged.get(revision)) is not None and held.state is StagedState.STAGED
        ]

    def believe(self, replica: Replica) -> Change:
        """Believes in a replica as it will be once its worker has carried out an order, a start included."""
        return self._believe(self._workers[replica.worker_id], replica)

    def forget(self, replica: Replica) -> Change:
        """Stops believing in a replica; `replica` says why it is gone."""
        change = self._forget(replica)
        return Change(change.before, replica if replica.state.is_gone else None)

    def load(self, replica_id: str, load: Load) -> Replica | None:
        """Takes in a replica's load; returns the replica, None where it is unknown."""
        replica = self._by_id.get(replica_id)
        if replica is None:
            return None
        replica = replace(replica, load=load)
        self._store(self._workers[replica.worker_id], replica)
        return replica

    def seen(self, worker_id: str, now: float) -> list[Replica]:
        """Notes that a worker spoke; returns its replicas where it was silent before and is reachable again.

        Nothing is lost on a stream that did not break, so such a worker needs no new hello.
        """
        worker = self._workers.get(worker_id)
        if worker is None:
            return []
        worker.seen_at = now
        if worker.lost_at is None:
            return []
        worker.lost_at = None
        return list(worker.replicas.values())

    def lose(self, worker_id: str, now: float) -> list[Replica]:
        """Marks a worker unreachable; returns its replicas. Harmless when repeated."""
        worker = self._workers.get(worker_id)
        if worker is None or worker.lost_at is not None:
            return []
        worker.lost_at = now
        return list(worker.replicas.values())

    def silent(self, now: float, silence_seconds: float) -> list[str]:
        """Connected workers that have not spoken for longer than `silence_seconds`."""
        return [
            w.hello.worker_id for w in self._workers.values() if w.is_reachable and now - w.seen_at > silence_seconds
        ]

    def overdue(self, now: float, grace_seconds: float) -> list[str]:
        """Unreachable workers whose grace time is over."""
        lost = ((w.hello.worker_id, w.lost_at) for w in self._workers.values())
        return [worker_id for worker_id, lost_at in lost if lost_at is not None and now - lost_at > grace_seconds]

    def remove_worker(self, worker_id: str) -> list[Change]:
        """Stops believing in a worker and its replicas."""
        worker = self._workers.get(worker_id)
        if worker is None:
            return []
        changes = [self._forget(replica) for replica in list(worker.replicas.values())]
        del self._workers[worker_id]
        self._kinds = None
        return changes

    def check(self) -> Iterator[str]:
        """Names broken invariants; for tests."""
        held = {key: r for w in self._workers.values() for key, r in w.replicas.items()}
        if held != self._by_id:
            yield "a replica does not belong to exactly one worker"
        if {key: r for group in self._by_model.values() for key, r in group.items()} != self._by_id:
            yield "the index by model disagrees"
        if any(r.state.is_gone for r in held.values()):
            yield "a replica that is gone is kept"

    def _believe(self, worker: Worker, replica: Replica) -> Change:
        before = self._by_id.get(replica.replica_id)
        if before is not None and (before.worker_id != replica.worker_id or before.model != replica.model):
            self._forget(before)
        self._store(worker, replica)
        return Change(before, replica)

    def _store(self, worker: Worker, replica: Replica) -> None:
        worker.replicas[replica.replica_id] = replica
        self._by_id[replica.replica_id] = replica
        self._by_model.setdefault(replica.model, {})[replica.replica_id] = replica
        is_routable = replica.state in (ReplicaState.READY, ReplicaState.DRAINING)
        self._set_address(replica.replica_id, replica.address if is_routable else "")

    def _set_address(self, replica_id: str, address: str) -> None:
        if self._addresses.get(replica_id, "") == address:
            return
        self.endpoints_version += 1
        if address:
            self._addresses[replica_id] = address
        else:
            del self._addresses[replica_id]

    def _forget(self, replica: Replica) -> Change:
        before = self._by_id.pop(replica.replica_id, None)
        if before is None:
            return Change(None, None)
        self._set_address(before.replica_id, "")
        worker = self._workers.get(before.worker_id)
        if worker is not None:
            worker.replicas.pop(before.replica_id, None)
        group = self._by_model[before.model]
        del group[before.replica_id]
        if not group:
            del self._by_model[before.model]
        return Change(before, None)
