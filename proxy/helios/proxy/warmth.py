"""How warm a model is kept that nobody uses: asleep on its device, or staged in host memory, before it is only on disk.

The rungs from the top: awake → asleep (processes wait, weights off the device) → staged (weights in host memory, no
process) → on disk. What goes down is given the highest rung that it can have; what is needed comes up from the highest
rung where it lies. Staged weights are the first to go where memory gets short: nothing is lost but time. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from helios.mesh.errors import PreconditionFailed, Unavailable
from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.fleet.commands import Order, SleepReplica, StageRevision, UnstageRevision, WakeReplica
from helios.proxy.fleet.state import Replica, ReplicaState, Staged, StagedState, Worker
from helios.proxy.traffic import Traffic

# A replica that can't be put to sleep now may be later; one that refuses for these reasons is drained instead.
_NEVER_SLEEPS: Final = frozenset({"SLEEP_UNSUPPORTED", "SLEEP_CYCLES_USED_UP"})


@dataclass(frozen=True, slots=True)
class WarmthPolicy:
    """What is kept warm.

    Attributes:
        sleeps: idle replicas go to sleep where their engine can.
        stages: a model whose last replica goes stays staged, while there is room.
        pressure_ratio: staged weights are given back where more of a node's memory than this is used, 0..1.
        asleep_seconds: a replica that has slept for so long stops; 0: none does for that.
        staged_seconds: weights that nobody used for so long after that are given back; 0: where memory is needed.
    """

    sleeps: bool = True
    stages: bool = True
    pressure_ratio: float = 0.9
    asleep_seconds: float = 1800.0
    staged_seconds: float = 0.0


class Warmth:
    """Sleep, wake, stage and unstage.

    Invariant: what was ordered is believed at once, so that a second look finds it done.
    """

    def __init__(
        self, policy: WarmthPolicy, *, traffic: Traffic, catalogue: Catalogue, send: Callable[[str, Order], None]
    ) -> None:
        self._policy = policy
        self._traffic = traffic
        self._catalogue = catalogue
        self._send = send
        self._never_sleeps: set[str] = set()
        self._can_not_wake: set[str] = set()
        # What replicas that are being woken had on their devices while they slept.
        self._asleep_bytes: dict[str, int] = {}
        # Weights of this size, and larger ones, have found no spare memory in this round.
        self._too_large_bytes = math.inf

    # Asleep.
    def may_sleep(self, replica: Replica) -> bool:
        """Whether an idle replica is to be put to sleep rather than drained."""
        is_able = replica.can_sleep and replica.replica_id not in self._never_sleeps
        return self._policy.sleeps and is_able and replica.state is ReplicaState.READY and self._is_idle(replica)

    def sleep(self, replica: Replica) -> None:
        """Orders sleep; the replica is not picked from now on."""
        # It reads its weights again when it wakes.
        self.keep(replica)
        self._believe(replica, ReplicaState.ASLEEP)
        self._send(replica.worker_id, SleepReplica(replica.replica_id))

    def sleeper(self, entry: ModelEntry) -> Replica | None:
        """A sleeping replica of the served revision that can be woken."""
        open_workers = {worker.hello.worker_id for worker in self._traffic.fleet.open_workers()}
        for replica in self._traffic.fleet.replicas_of(entry.name):
            is_whole = replica.state is ReplicaState.ASLEEP and replica.revision == entry.revision
            is_reachable = replica.worker_id in open_workers and not self._traffic.is_draining(replica)
            if is_whole and is_reachable and replica.replica_id not in self._can_not_wake:
                return replica
        return None

    def wake(self, replica: Replica, memory_bytes: int) -> None:
        """Orders waking; so much is not free any more, whoever asks before its worker has said so."""
        self._asleep_bytes[replica.replica_id] = replica.memory_bytes
        awake = replace(replica, memory_bytes=max(replica.memory_bytes, memory_bytes))
        self._believe(awake, ReplicaState.WAKING)
        self._send(replica.worker_id, WakeReplica(replica.replica_id))

    def sleep_refused(self, replica: Replica, reason: str) -> bool:
        """The replica stays awake; True where it never sleeps: it is to be drained where it isn't needed."""
        if replica.state is ReplicaState.ASLEEP:
            self._believe(replica, ReplicaState.READY)
        if reason not in _NEVER_SLEEPS:
            return False
        self._never_sleeps.add(replica.replica_id)
        return True

    def wake_refused(self, replica: Replica) -> None:
        """The replica stays asleep, until room comes: see `look_again`."""
        if replica.state is ReplicaState.WAKING:
            left = self._asleep_bytes.get(replica.replica_id, replica.memory_bytes)
            self._believe(replace(replica, memory_bytes=left), ReplicaState.ASLEEP)
        self._can_not_wake.add(replica.replica_id)

    def look_again(self) -> None:
        """Room may have come: what could not be woken is tried again."""
        self._can_not_wake.clear()

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        self._never_sleeps.discard(replica_id)
        self._can_not_wake.discard(replica_id)
        self._asleep_bytes.pop(replica_id, None)

    # Staged.
    def keep(self, replica: Replica) -> None:
        """As `keep_staged`, for a replica that goes or sleeps, unless its revision is an old one."""
        entry = self._catalogue.get(replica.model)
        if entry is not None and entry.revision == replica.revision:
            self.keep_staged(entry, replica.worker_id)

    def keep_staged(self, entry: ModelEntry, worker_id: str) -> None:
        """Stages a model of which a replica on this worker goes or sleeps, where the policy and the memory allow."""
        worker = self._traffic.fleet.worker(worker_id)
        if self._policy.stages and worker is not None and entry.weights_bytes:
            self._stage(entry, worker)

    def stage(self, entry: ModelEntry) -> Staged:
        """Stages a model at its `home`; what is staged there, it leaves. Raises Unavailable."""
        worker = self.home(entry)
        self._stage(entry, worker)
        return worker.staged[entry.revision]

    def home(self, entry: ModelEntry) -> Worker:
        """The worker that a model is staged on: where it is, where it runs, or where there is most room for it.

        Raises:
            Unavailable: NO_WORKER, NO_CAPACITY.
        """
        fleet = self._traffic.fleet
        workers = fleet.open_workers()
        for worker in workers:
            if entry.revision in worker.staged:
                return worker
        homes = {replica.worker_id for replica in fleet.replicas_of(entry.name)}
        for worker in sorted(workers, key=lambda w: (w.hello.worker_id in homes, w.free_host_bytes), reverse=True):
            if self._may_stage(entry, worker):
                return worker
        reason = "NO_CAPACITY" if workers else "NO_WORKER"
        message = "no worker has the host memory for its weights" if workers else "no worker is connected"
        raise Unavailable(
            f"the model '{entry.name}' can't be staged: {message}", reason=reason, metadata={"model": entry.name}
        )

    def stage_spare(self, entry: ModelEntry) -> None:
        """Stages a model where memory is free, and stays so; nothing happens where it is staged or nothing is.

        Where there is none, larger models don't look at all workers in vain, until `relieve` begins the next round.
        """
        if not self._policy.stages or not 0 < entry.weights_bytes < self._too_large_bytes:
            return
        workers = self._traffic.fleet.open_workers()
        if any(entry.revision in worker.staged for worker in workers):
            return
        roomy = max(workers, key=lambda worker: worker.free_host_bytes, default=None)
        if roomy is not None and roomy.free_host_bytes >= entry.weights_bytes:
            # What would be given back at once for want of memory is not brought there.
            share = entry.weights_bytes / max(1, roomy.hello.host_memory_bytes)
            if roomy.host_used_ratio + share <= self._policy.pressure_ratio:
                self._stage(entry, roomy)
                return
        self._too_large_bytes = entry.weights_bytes

    def make_room(self, worker: Worker, size_bytes: int) -> None:
        """Gives staged revisions back, those used longest ago first, until so much host memory is free."""
        while size_bytes and worker.free_host_bytes < size_bytes and (oldest := self._oldest(worker)) is not None:
            self._unstage(worker, oldest.revision)

    def unstage(self, revision: str) -> int:
        """Gives a revision's host memory back everywhere; returns on how many nodes."""
        holders = [worker for worker in self._traffic.fleet.workers() if revision in worker.staged]
        for worker in holders:
            self._unstage(worker, revision)
        return len(holders)

    def stage_refused(self, worker_id: str, revision: str) -> None:
        """The worker has no room for it."""
        worker = self._traffic.fleet.worker(worker_id)
        if worker is not None:
            worker.staged.pop(revision, None)

    def relieve(self) -> None:
        """Gives back what no model serves any more and, where memory gets short, what was used longest ago."""
        self._too_large_bytes = math.inf
        for worker in self._traffic.fleet.workers():
            if not worker.is_reachable or not worker.staged:
                continue
            for revision in self._unserved(worker):
                self._unstage(worker, revision)
            if worker.host_used_ratio > self._policy.pressure_ratio:
                oldest = self._oldest(worker)
                if oldest is not None:
                    self._unstage(worker, oldest.revision)

    def check_sleep(self, replica: Replica) -> None:
        """Checks that an operator may put a replica to sleep.

        Raises:
            PreconditionFailed: SLEEP_UNSUPPORTED, REPLICA_NOT_READY, REPLICA_BUSY.
        """
        name, metadata = replica.replica_id, {"replica_id": replica.replica_id}
        if replica.state is not ReplicaState.READY or self._traffic.is_draining(replica):
            raise PreconditionFailed(f"replica {name} is not ready", reason="REPLICA_NOT_READY", metadata=metadata)
        if not replica.can_sleep or name in self._never_sleeps:
            message = f"replica {name} can't sleep: that takes a GPU; `helios stage` keeps weights in host memory"
            raise PreconditionFailed(message, reason="SLEEP_UNSUPPORTED", metadata=metadata)
        if not self._is_idle(replica):
            raise PreconditionFailed(f"replica {name} has requests", reason="REPLICA_BUSY", metadata=metadata)

    def _may_stage(self, entry: ModelEntry, worker: Worker) -> bool:
        """Whether there is room for a model's weights once all others' are given back."""
        is_open = worker.is_reachable and worker.hello.worker_id not in self._traffic.fleet.cordoned
        return is_open and entry.weights_bytes <= worker.unpinned_host_bytes

    def _stage(self, entry: ModelEntry, worker: Worker) -> None:
        if entry.revision in worker.staged or not self._may_stage(entry, worker):
            return
        self.make_room(worker, entry.weights_bytes)
        worker.staged[entry.revision] = Staged(
            entry.revision, entry.name, StagedState.STAGING, worker.hello.worker_id, entry.weights_bytes
        )
        self._send(worker.hello.worker_id, StageRevision(entry.revision, entry.name, entry.weights_bytes))

    def _unstage(self, worker: Worker, revision: str) -> None:
        # Commands of a worker are carried out in their order, so its room is there for what is staged next.
        worker.staged.pop(revision, None)
        self._send(worker.hello.worker_id, UnstageRevision(revision))

    def _oldest(self, worker: Worker) -> Staged | None:
        return min(
            worker.staged.values(),
            key=lambda staged: self._traffic.last_wanted_at(staged.model),
            default=None,
        )

    def _unserved(self, worker: Worker) -> list[str]:
        """Staged revisions that are older than their model, whose own use would keep them for ever."""
        if not self._catalogue.is_synced:
            return []
        return [revision for revision in worker.staged if not self._catalogue.serves(revision)]

    def _is_idle(self, replica: Replica) -> bool:
        worker = self._traffic.fleet.worker(replica.worker_id)
        return worker is not None and worker.is_reachable and self._traffic.is_idle(replica)

    def _believe(self, replica: Replica, state: ReplicaState) -> None:
        self._traffic.fleet.believe(replace(replica, state=state))
        self._traffic.refresh(replica.replica_id)
