"""What a replica takes, and what room each worker has for it. Pure."""

from __future__ import annotations

from dataclasses import replace

from helios.proxy.activation import placement
from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.engine_needs import needs_of, with_form
from helios.proxy.fleet.state import Form, Replica, ReplicaState, Worker
from helios.proxy.holds import Holds
from helios.proxy.sizing import GIVEN, MeasuredSizes, ReplicaSize, SizingPolicy, replica_size
from helios.proxy.traffic import Traffic


class Room:
    """Sizes of replicas, and the room for them."""

    def __init__(
        self,
        policy: SizingPolicy,
        residency_seconds: float,
        *,
        traffic: Traffic,
        catalogue: Catalogue,
        holds: Holds,
    ) -> None:
        """A replica that is younger than ``residency_seconds`` is nobody's room."""
        self._policy = policy
        self._residency_seconds = residency_seconds
        self._traffic = traffic
        self._catalogue = catalogue
        self._holds = holds
        self._measured = MeasuredSizes()
        self._settings: dict[str, str] = {}
        self._late: set[str] = set()

    def size(self, entry: ModelEntry) -> ReplicaSize:
        """What a replica of a model would book where it takes the most."""
        kinds = {worker.has_gpus for worker in self._traffic.fleet.workers()} or {False}
        return max((self._size(entry, is_gpu=is_gpu) for is_gpu in kinds), key=lambda size: size.memory_bytes)

    def size_on(self, worker: Worker, entry: ModelEntry) -> ReplicaSize:
        """What a replica of a model would book on this worker."""
        return self._size(entry, is_gpu=worker.has_gpus)

    @staticmethod
    def device_count(worker: Worker, entry: ModelEntry) -> int:
        """How many of this worker's devices a replica of a model takes; on a CPU, ranks share the one that there is."""
        return needs_of(entry.engine_settings).rank_count if worker.has_gpus else 1

    def started(self, replica_id: str, engine_settings: str) -> None:
        """A replica was ordered with these settings: what it will be measured to hold speaks of them."""
        self._settings[replica_id] = engine_settings

    def measure(self, replica: Replica) -> None:
        """Takes in what a replica was measured to hold: the next one of its revision and settings books that."""
        entry = self._catalogue.find(replica.model)
        given_bytes = sum(size for kind, size in replica.memory_items if kind in GIVEN)
        is_told = replica.measured_bytes and given_bytes and replica.state is ReplicaState.READY
        if not is_told or entry is None or entry.revision != replica.revision:
            return
        settings = self._settings.get(replica.replica_id, with_form(entry.engine_settings, replica.form))
        if settings not in _forms(entry):
            return
        worker = self._traffic.fleet.worker(replica.worker_id)
        is_gpu = worker is not None and worker.has_gpus
        if self._measured.fixed_bytes(entry.revision, settings, is_gpu=is_gpu) is None:
            self._measured.keep_only({(m.revision, form) for m in self._catalogue.models() for form in _forms(m)})
        self._measured.record(
            entry.revision,
            settings,
            measured_bytes=replica.measured_bytes,
            given_bytes=given_bytes,
            is_gpu=is_gpu,
        )

    def leaves_late(self, replica_id: str) -> None:
        """A replica drains, and may do so for longer than a start can wait for its room."""
        self._late.add(replica_id)

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        self._settings.pop(replica_id, None)
        self._late.discard(replica_id)

    def capacity(self, worker: Worker, entry: ModelEntry, now: float) -> placement.WorkerCapacity:
        """What a worker has left for a replica of a model, and what could be freed for it."""
        device_count = self.device_count(worker, entry)
        model = entry.name
        replicas = list(worker.replicas.values())
        draining = [replica for replica in replicas if self._traffic.is_draining(replica)]
        late = [replica for replica in draining if replica.replica_id in self._late]
        late_bytes, draining_bytes = (sum(replica.memory_bytes for replica in some) for some in (late, draining))
        size = self.size_on(worker, entry)
        return placement.WorkerCapacity(
            worker_id=worker.hello.worker_id,
            engines=worker.hello.engines,
            needed_bytes=size.memory_bytes,
            needed_host_bytes=size.host_bytes,
            # Staged revisions give way.
            free_host_bytes=worker.unpinned_host_bytes,
            memory_bytes=worker.memory_bytes_of(device_count),
            free_bytes=worker.free_bytes_of(device_count),
            is_staged=entry.revision in worker.staged,
            free_slot_count=worker.hello.slot_count - len(replicas),
            draining_bytes=draining_bytes - late_bytes,
            draining_count=len(draining) - len(late),
            late_bytes=late_bytes,
            late_count=len(late),
            victims=tuple(self._victim(r) for r in replicas if self._gives_way(r, model, now)),
        )

    def _size(self, entry: ModelEntry, *, is_gpu: bool) -> ReplicaSize:
        # Of a model that has both forms, the one that it starts in.
        entry = in_form(entry, Form.EAGER)
        draft = self._catalogue.named(needs_of(entry.engine_settings).draft_model)
        return replica_size(entry, self._policy, draft, measured=self._measured, is_gpu=is_gpu)

    def _victim(self, replica: Replica) -> placement.Victim:
        last_used_at = self._traffic.last_used_at(replica.model)
        return placement.Victim(replica.replica_id, replica.memory_bytes, last_used_at or 0.0, replica.is_spare)

    def _gives_way(self, replica: Replica, model: str, now: float) -> bool:
        """Whether a replica may be drained for a start of a model: a spare for any, its own model's included."""
        if replica.is_spare:
            return not self._traffic.is_draining(replica)
        return replica.model != model and self._is_victim(replica, now)

    def _is_victim(self, replica: Replica, now: float) -> bool:
        since = self._traffic.ready_since(replica.replica_id)
        if replica.state is ReplicaState.ASLEEP:
            return not self._traffic.is_draining(replica) and not self._holds.count(replica.model)
        if replica.state is not ReplicaState.READY or since is None or self._traffic.is_draining(replica):
            return False
        if not self._traffic.is_idle(replica) or now - since < self._residency_seconds:
            return False
        entry = self._catalogue.find(replica.model)
        if entry is None or self._holds.count(replica.model):
            return False
        of_model = [r for r in self._traffic.fleet.replicas_of(replica.model) if not self._traffic.is_draining(r)]
        awake_count = sum(other.state is not ReplicaState.ASLEEP and not other.is_spare for other in of_model)
        return awake_count > entry.min_replicas


def in_form(entry: ModelEntry, form: Form) -> ModelEntry:
    """The model as one form of it is ordered; itself where it does not have both."""
    settings = with_form(entry.engine_settings, form)
    return entry if settings == entry.engine_settings else replace(entry, engine_settings=settings)


def _forms(entry: ModelEntry) -> tuple[str, str]:
    """The settings that its replicas may have been ordered with."""
    return with_form(entry.engine_settings, Form.EAGER), with_form(entry.engine_settings, Form.COMPILED)
