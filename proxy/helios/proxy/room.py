"""What a replica takes, and what room each worker has for it. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from helios.proxy.activation.turns import Line, TurnPolicy
from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.engine_needs import EngineNeeds, needs_of, with_form, with_split
from helios.proxy.fleet.state import Form, Replica, ReplicaState, Worker
from helios.proxy.holds import Holds
from helios.proxy.placement.defragment import Proposal, propose
from helios.proxy.placement.packing import Want, pack
from helios.proxy.placement.parallelism import WHOLE, Split, splits_of
from helios.proxy.placement.workers import Occupant, WorkerCapacity
from helios.proxy.sizing import GIVEN, MeasuredSizes, ReplicaSize, SizingPolicy, replica_size
from helios.proxy.traffic import Traffic

# Revisions a worker's node is believed to have on its disk: more than a node has of use, and some 100 KiB a worker.
_MOST_FETCHED: Final = 1000
# What a sleeping replica, or one that was never used, is worth at least: more than a spare.
_LEAST_VALUE: Final = 1e-6


# Models times workers up to which starts are packed: some ten milliseconds.
_MOST_PACKED: Final = 256
# How often it is said which replicas are in a model's way: looking for moves takes milliseconds.
_PROPOSAL_SECONDS: Final = 60.0


class Room:
    """Sizes of replicas, and the room for them."""

    def __init__(
        self,
        policy: SizingPolicy,
        residency_seconds: float,
        turns: TurnPolicy,
        *,
        traffic: Traffic,
        catalogue: Catalogue,
        holds: Holds,
        start_seconds: Callable[[ModelEntry], float],
    ) -> None:
        """A replica that is younger than ``residency_seconds`` is nobody's room; what is in use has its turn.

        ``start_seconds`` estimates how long a model takes to start, which is what is lost with its replica.
        """
        self._start_seconds = start_seconds
        self._fetched: dict[str, OrderedDict[str, None]] = {}
        self._packed_for: tuple[tuple[Want, ...], int, int] = (), 0, 0
        self._packed_order: list[str] = []
        self._propose_after: dict[str, float] = {}
        self._policy = policy
        self._residency_seconds = residency_seconds
        self._turns = turns
        self.line = Line()
        self._traffic = traffic
        self._catalogue = catalogue
        self._holds = holds
        self.measured = MeasuredSizes()
        self._settings: dict[str, str] = {}
        self._late: set[str] = set()

    def size(self, entry: ModelEntry) -> ReplicaSize:
        """What a replica of a model would book where it takes the most."""
        kinds = self._traffic.fleet.gpu_kinds() or {False}
        return max((self._size(entry, is_gpu=is_gpu) for is_gpu in kinds), key=lambda size: size.memory_bytes)

    def size_on(self, worker: Worker, entry: ModelEntry) -> ReplicaSize:
        """What a replica of a model would book on this worker."""
        return self._size(entry, is_gpu=worker.has_gpus)

    @staticmethod
    def device_count(worker: Worker, entry: ModelEntry) -> int:
        """How many of this worker's devices a replica of a model takes; on a CPU, ranks share the one that there is."""
        return needs_of(entry.engine_settings).rank_count if worker.has_gpus else 1

    def revisions(self, needs: EngineNeeds) -> dict[str, str]:
        """The revisions of the other models that a replica needs, as far as there are such models."""
        others = ((name, self._catalogue.named(name)) for name in needs.models)
        return {name: other.revision for name, other in others if other is not None}

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
        if settings not in _forms(entry) and not _is_split(settings, entry):
            return
        worker = self._traffic.fleet.worker(replica.worker_id)
        is_gpu = worker is not None and worker.has_gpus
        if self.measured.fixed_bytes(entry.revision, settings, is_gpu=is_gpu) is None:
            self.measured.keep_only({(m.revision, form) for m in self._catalogue.models() for form in _all_forms(m)})
        self.measured.record(
            entry.revision,
            settings,
            measured_bytes=replica.measured_bytes,
            given_bytes=given_bytes,
            is_gpu=is_gpu,
        )

    def leaves_late(self, replica_id: str) -> None:
        """A replica drains, and may do so for longer than a start can wait for its room."""
        self._late.add(replica_id)

    def leaves_soon(self, replica_id: str) -> None:
        """A replica that drains is waited for, and has no longer than a start can wait."""
        self._late.discard(replica_id)

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        self._settings.pop(replica_id, None)
        self._late.discard(replica_id)

    def note_place(self, replica: Replica) -> None:
        """Takes in how far a replica is: once its weights are loaded from there, its node has them on its disk."""
        if replica.state.value < ReplicaState.LOADING.value or replica.state.is_gone:
            return
        fetched = self._fetched.setdefault(replica.worker_id, OrderedDict())
        fetched[replica.revision] = None
        fetched.move_to_end(replica.revision)
        if len(fetched) > _MOST_FETCHED:
            fetched.popitem(last=False)

    def is_on_disk(self, worker_id: str, revision: str) -> bool:
        """Whether a worker's node is known to have a revision's weights."""
        return revision in self._fetched.get(worker_id, ())

    def disk_count(self, revision: str) -> int:
        """How many nodes are known to have a revision's weights."""
        return sum(revision in fetched for fetched in self._fetched.values())

    def forget_bytes(self, revision: str) -> None:
        """The nodes were told to drop a revision's bytes."""
        for fetched in self._fetched.values():
            fetched.pop(revision, None)

    def forget_worker(self, worker_id: str) -> None:
        """A worker is believed in no more."""
        self._fetched.pop(worker_id, None)

    def capacities(self, worker: Worker, entry: ModelEntry, now: float) -> list[WorkerCapacity]:
        """What a worker has left for a replica of a model; one for each way to split the model, where that is open."""
        if not needs_of(entry.engine_settings).is_split_open:
            return [self.capacity(worker, entry, now)]
        # Ranks of a CPU's replica would share its cores.
        bound = len(worker.devices) if worker.has_gpus else 1
        able = [split for split in _splits(entry) if split.rank_count <= bound] or [WHOLE]
        return [replace(self.capacity(worker, in_split(entry, split), now), split=split) for split in able]

    def capacity(self, worker: Worker, entry: ModelEntry, now: float) -> WorkerCapacity:
        """What a worker has left for a replica of a model, and what could be freed for it."""
        device_count = self.device_count(worker, entry)
        worker_id = worker.hello.worker_id
        replicas = list(worker.replicas.values())
        draining = [replica for replica in replicas if self._traffic.is_draining(replica)]
        size = self.size_on(worker, entry)
        claims = self.line.claims_on(worker_id, entry.name)
        devices = worker.gang_devices()
        for claim in claims:
            devices = claim.book(devices)
        victims, turn_over, in_turn = self._who_gives_way(replicas, entry.name, now)
        if self._turns.turn_seconds:
            # Whoever comes there will have its turn.
            in_turn += tuple(claim.as_occupant() for claim in claims)
        return WorkerCapacity(
            worker_id=worker_id,
            engines=worker.hello.engines,
            needed_bytes=size.memory_bytes,
            needed_host_bytes=size.host_bytes,
            # Staged revisions give way.
            free_host_bytes=worker.unpinned_host_bytes,
            memory_bytes=worker.memory_bytes_of(device_count),
            devices=devices,
            device_count=device_count,
            has_gpus=worker.has_gpus,
            same_model_count=sum(each.model == entry.name and each not in draining for each in replicas),
            same_zone_count=self._zone_count(worker, entry.name),
            is_staged=entry.revision in worker.staged,
            is_on_disk=self.is_on_disk(worker_id, entry.revision),
            free_slot_count=worker.hello.slot_count - len(replicas) - len(claims),
            draining=tuple(_occupant(each) for each in draining if each.replica_id not in self._late),
            late=tuple(_occupant(each) for each in draining if each.replica_id in self._late),
            victims=victims,
            turn_over=turn_over,
            in_turn=in_turn,
        )

    def _zone_count(self, worker: Worker, model: str) -> int:
        """How many of a model's replicas that stay are in a worker's zone; 0 where it does not tell its zone."""
        zone, fleet = worker.hello.zone, self._traffic.fleet
        if not zone:
            return 0
        theirs = (fleet.worker(replica.worker_id) for replica in self._traffic.staying(model))
        return sum(other is not None and other.hello.zone == zone for other in theirs)

    def propose_moves(
        self, model: str, engine: str, capacities: Iterable[WorkerCapacity], now: float
    ) -> Proposal | None:
        """Which replicas are in the way of one for which there is room enough, in pieces; once a minute for a model."""
        if now < self._propose_after.get(model, 0.0):
            return None
        self._propose_after = {name: until for name, until in self._propose_after.items() if now < until}
        self._propose_after[model] = now + _PROPOSAL_SECONDS
        return propose(engine, self._with_movable(capacities))

    def _with_movable(self, capacities: Iterable[WorkerCapacity]) -> list[WorkerCapacity]:
        fleet = self._traffic.fleet
        workers = ((capacity, fleet.worker(capacity.worker_id)) for capacity in capacities)
        return [
            replace(capacity, movable=tuple(_occupant(r) for r in worker.replicas.values() if self._is_steady(r)))
            for capacity, worker in workers
            if worker is not None
        ]

    def start_order(self, models: Iterable[str], now: float) -> list[str]:
        """Models in the order in which they are to be looked at: their own, but for some.

        Those whose policy promises a replica and that have none, as after an outage, come last, in an order in which
        the most of them fit: by name, small ones would take the places that large ones need.
        """
        models = list(models)
        pinned = self._catalogue.pinned()
        entries = (self._catalogue.find(model) for model in models if model in pinned)
        missing = [entry for entry in entries if entry is not None and self._is_missing(entry)]
        workers = self._traffic.fleet.open_workers()
        if len(missing) < 2 or not workers:
            return models
        has_gpus = any(worker.has_gpus for worker in workers)
        wants = tuple(self._want(entry, has_gpus=has_gpus) for entry in missing)
        key = wants, len(workers), sum(r.memory_bytes for worker in workers for r in worker.replicas.values())
        if key != self._packed_for:
            self._packed_for = key
            self._packed_order = [want.name for want in sorted(wants, key=lambda want: -want.needed_bytes)]
            if len(wants) * len(workers) <= _MOST_PACKED:
                # Of the host's memory each needs its own; a start that lacks it is refused then.
                room = [replace(self.capacity(worker, missing[0], now), needed_host_bytes=0) for worker in workers]
                placed = list(pack(wants, room))
                self._packed_order = placed + [name for name in self._packed_order if name not in placed]
        last = set(self._packed_order)
        return [model for model in models if model not in last] + self._packed_order

    def _is_missing(self, entry: ModelEntry) -> bool:
        return entry.min_replicas > 0 and not self._traffic.fleet.replicas_of(entry.name)

    def _want(self, entry: ModelEntry, *, has_gpus: bool) -> Want:
        needs = needs_of(entry.engine_settings)
        count = needs.rank_count if has_gpus else 1
        return Want(entry.name, self.size(entry).memory_bytes, count, needs.engine.partition(":")[0])

    def _is_steady(self, replica: Replica) -> bool:
        return replica.state is ReplicaState.READY and not self._traffic.is_draining(replica)

    def _size(self, entry: ModelEntry, *, is_gpu: bool) -> ReplicaSize:
        # Of a model that has both forms, the one that it starts in.
        entry = in_form(entry, Form.EAGER)
        draft = self._catalogue.named(needs_of(entry.engine_settings).draft_model)
        return replica_size(entry, self._policy, draft, measured=self.measured, is_gpu=is_gpu)

    def _who_gives_way(
        self, replicas: Iterable[Replica], model: str, now: float
    ) -> tuple[tuple[Occupant, ...], tuple[Occupant, ...], tuple[Occupant, ...]]:
        """Replicas that may be drained for a start of a model, all of them at once: those that nobody uses, those
        whose turn is over, and those that will give way in their turn.

        Of a model whose policy promises replicas, no more are offered than it has beyond these.
        """
        spare_counts: dict[str, int] = {}
        victims: list[Occupant] = []
        in_use: list[Replica] = []
        for replica in replicas:
            if not self._gives_way(replica, model, now):
                in_use.append(replica)
            elif replica.is_spare or replica.state is ReplicaState.ASLEEP or self._is_beyond(replica, spare_counts):
                victims.append(self._victim(replica, now))
        turn_over: list[Occupant] = []
        in_turn: list[Occupant] = []
        if self._turns.turn_seconds:
            has_waited = self.line.waited_seconds(model, now) >= self._turns.turn_seconds
            for replica in in_use:
                if self._has_turn(replica, model) and self._is_beyond(replica, spare_counts):
                    is_over = has_waited and self._is_turn_over(replica, now)
                    (turn_over if is_over else in_turn).append(self._in_use(replica, now))
        return tuple(victims), tuple(turn_over), tuple(in_turn)

    def _is_beyond(self, replica: Replica, spare_counts: dict[str, int]) -> bool:
        """Whether a replica is not among those that its model's policy promises; `spare_counts` are what is left."""
        count = spare_counts.get(replica.model)
        count = self._spare_count(replica.model) if count is None else count
        spare_counts[replica.model] = count - 1
        return count > 0

    def _has_turn(self, replica: Replica, model: str) -> bool:
        """Whether a replica that is on its way, young or in use gives way to another model some time."""
        if replica.model == model or replica.state is ReplicaState.ASLEEP or self._traffic.is_draining(replica):
            return False
        return self._catalogue.find(replica.model) is not None

    def _is_turn_over(self, replica: Replica, now: float) -> bool:
        """Whether a replica has served for as long as its start took, and all that waited when it got ready."""
        since = self._traffic.ready_since(replica.replica_id)
        if replica.state is not ReplicaState.READY or since is None:
            return False
        entry = self._catalogue.find(replica.model)
        start_seconds = self._start_seconds(entry) if entry is not None else 0.0
        oldest = self._holds.first(replica.model)
        is_served = oldest is None or oldest.since > since
        return is_served and now - since >= max(self._residency_seconds, start_seconds)

    def _in_use(self, replica: Replica, now: float) -> Occupant:
        """What has served for long has had more of its start than what has not."""
        entry = self._catalogue.find(replica.model)
        start_seconds = self._start_seconds(entry) if entry is not None else 0.0
        served_seconds = max(1.0, now - (self._traffic.ready_since(replica.replica_id) or now))
        return _occupant(replica, max(_LEAST_VALUE, start_seconds * 3600 / served_seconds))

    def _spare_count(self, model: str) -> int:
        """Replicas that a model has beyond those that its policy promises; those that sleep don't count."""
        entry = self._catalogue.find(model)
        of_model = self._traffic.staying(model)
        awake_count = sum(r.state is not ReplicaState.ASLEEP and not r.is_spare for r in of_model)
        return awake_count - (entry.min_replicas if entry is not None else 0)

    def _victim(self, replica: Replica, now: float) -> Occupant:
        """What is idle is asked for again the less likely the longer it was not; what is lost then is its start."""
        if replica.is_spare:
            return _occupant(replica)
        entry = self._catalogue.find(replica.model)
        idle_seconds = max(1.0, now - (self._traffic.last_used_at(replica.model) or 0.0))
        start_seconds = self._start_seconds(entry) if entry is not None else 0.0
        return _occupant(replica, max(_LEAST_VALUE, start_seconds * 3600 / idle_seconds))

    def _gives_way(self, replica: Replica, model: str, now: float) -> bool:
        """Whether a replica may be drained for a start of a model, but for what its own model's policy promises: a
        spare for any, its own model's included.
        """
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
        return self._catalogue.find(replica.model) is not None and not self._holds.count(replica.model)


def _occupant(replica: Replica, value: float = 0.0) -> Occupant:
    return Occupant(replica.replica_id, replica.memory_bytes, replica.device_ids, value)


def in_form(entry: ModelEntry, form: Form) -> ModelEntry:
    """The model as one form of it is ordered; itself where it does not have both."""
    settings = with_form(entry.engine_settings, form)
    return entry if settings == entry.engine_settings else replace(entry, engine_settings=settings)


def in_split(entry: ModelEntry, split: Split | None) -> ModelEntry:
    """The model as it is ordered in so many ranks; itself where its settings say how many."""
    if split is None:
        return entry
    settings = with_split(entry.engine_settings, split.tensor, split.pipeline)
    return entry if settings == entry.engine_settings else replace(entry, engine_settings=settings)


def _splits(entry: ModelEntry) -> tuple[Split, ...]:
    stage_count = needs_of(entry.engine_settings).stage_count
    return splits_of(entry.tensor_parallel_options, (stage_count,) if stage_count else entry.pipeline_parallel_options)


def _all_forms(entry: ModelEntry) -> set[str]:
    """The settings that its replicas may have been ordered with, however they were split."""
    if not needs_of(entry.engine_settings).is_split_open:
        return set(_forms(entry))
    splits = (WHOLE, *_splits(entry))
    return {with_split(form, split.tensor, split.pipeline) for form in _forms(entry) for split in splits}


def _is_split(settings: str, entry: ModelEntry) -> bool:
    return needs_of(entry.engine_settings).is_split_open and settings in _all_forms(entry)


def _forms(entry: ModelEntry) -> tuple[str, str]:
    """The settings that its replicas may have been ordered with."""
    return with_form(entry.engine_settings, Form.EAGER), with_form(entry.engine_settings, Form.COMPILED)
