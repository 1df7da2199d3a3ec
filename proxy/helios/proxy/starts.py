"""Start commands: what a replica is told, and where one may be started without anybody's giving way. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from helios.proxy import actions
from helios.proxy.catalogue import ModelEntry
from helios.proxy.engine_needs import EngineNeeds, needs_of, with_revisions
from helios.proxy.fleet.commands import Order, StartReplica
from helios.proxy.fleet.state import Form, Replica, ReplicaState, Worker
from helios.proxy.holds import Holds
from helios.proxy.placement.place import Placed, place
from helios.proxy.placement.workers import WorkerCapacity
from helios.proxy.room import Room, in_form, in_split
from helios.proxy.traffic import Traffic
from helios.proxy.warmth import Warmth


class Starts:
    """Orders replicas, and believes in them from that moment."""

    def __init__(
        self,
        engine: str,
        *,
        traffic: Traffic,
        holds: Holds,
        room: Room,
        warmth: Warmth,
        new_id: Callable[[], str],
        send: Callable[[str, Order], None],
        report: Callable[[actions.Action], None],
    ) -> None:
        """``engine`` runs models that name none; empty is each worker's default."""
        self._default_engine = engine
        self._traffic = traffic
        self._holds = holds
        self._room = room
        self._warmth = warmth
        self._new_id = new_id
        self._send = send
        self._report = report

    def engine(self, needs: EngineNeeds) -> str:
        """The engine that a worker must have; empty is any."""
        # What stands behind a colon is the engine's own business.
        return (needs.engine or self._default_engine).partition(":")[0]

    def missing_models(self, needs: EngineNeeds) -> set[str]:
        """Models that the settings name, and that do not exist."""
        return set(needs.models) - self._room.revisions(needs).keys()

    def begin(self, entry: ModelEntry, placed: Placed) -> str:
        """Orders a replica for those that wait; returns its id."""
        order = self._order(in_split(in_form(entry, Form.EAGER), placed.split), placed)
        held_count = self._holds.count(entry.name)
        begun = actions.ActivationBegun(
            entry.name, order.replica_id, placed.worker_id, held_count, placed.reason, order.traceparent
        )
        self._report(begun)
        return order.replica_id

    def begin_spare(self, entry: ModelEntry, now: float) -> Replica | None:
        """Orders a compiled replica in the background; None where there is no room that nobody has."""
        entry = in_form(entry, Form.COMPILED)
        # Two compiles on one node would only be ready later.
        placed = self._find(
            entry, self._capacities(entry, now, lambda worker: not any(r.is_spare for r in worker.replicas.values()))
        )
        if placed is None:
            return None
        order = self._order(in_split(entry, placed.split), placed, is_background=True)
        self._report(actions.SwapBegun(entry.name, order.replica_id, placed.worker_id, placed.reason))
        return self._traffic.fleet.replica(order.replica_id)

    def begin_another(self, entry: ModelEntry, now: float) -> str:
        """Orders one more replica of a model that has some; returns its id, empty where there is no room for it.

        It gets a device that none of the model's has: two on one would share its time, and both have less than one.
        """
        entry = in_form(entry, Form.EAGER)
        taken = {
            (replica.worker_id, device_id)
            for replica in self._traffic.fleet.replicas_of(entry.name)
            if replica.state is not ReplicaState.ASLEEP
            for device_id in replica.device_ids
        }
        others = [
            replace(each, devices=tuple(d for d in each.devices if (each.worker_id, d.device_id) not in taken))
            for each in self._capacities(entry, now)
            if each.has_gpus or not each.same_model_count
        ]
        placed = self._find(entry, others)
        return self.begin(entry, placed) if placed is not None else ""

    def _capacities(
        self, entry: ModelEntry, now: float, is_suitable: Callable[[Worker], bool] = lambda _: True
    ) -> list[WorkerCapacity]:
        workers = self._traffic.fleet.open_workers()
        able = (worker for worker in workers if is_suitable(worker))
        return [capacity for worker in able for capacity in self._room.capacities(worker, entry, now)]

    def _find(self, entry: ModelEntry, workers: list[WorkerCapacity]) -> Placed | None:
        """Room that nobody has; None where there is none."""
        needs = needs_of(entry.engine_settings)
        if self.missing_models(needs):
            return None
        plan = place(self.engine(needs), [replace(worker, victims=()) for worker in workers], may_preempt=False)
        return plan if isinstance(plan, Placed) else None

    def _order(self, entry: ModelEntry, placed: Placed, *, is_background: bool = False) -> StartReplica:
        """Sends a start command and believes in its replica; a request that waits is told of by one that answers it."""
        worker_id = placed.worker_id
        worker = self._traffic.fleet.worker(worker_id)
        assert worker is not None
        needs, size = needs_of(entry.engine_settings), self._room.size_on(worker, entry)
        asking = None if is_background else self._holds.first(entry.name)
        replica_id = self._new_id()
        order = StartReplica(
            replica_id=replica_id,
            model=entry.name,
            revision=entry.revision,
            engine=needs.engine or self._default_engine,
            memory_bytes=size.memory_bytes,
            kv_cache_bytes=size.kv_cache_bytes,
            max_context_tokens=needs.max_context_tokens,
            engine_settings=with_revisions(entry.engine_settings, self._room.revisions(needs)),
            served_names=entry.aliases,
            memory_items=size.items,
            host_memory_items=size.host_items,
            device_count=self._room.device_count(worker, entry),
            # Where devices are the host's processors, its worker knows best.
            device_ids=placed.device_ids if worker.has_gpus else (),
            requested_at=asking.requested_at if asking is not None else 0.0,
            traceparent=asking.traceparent if asking is not None else "",
            is_background=is_background,
        )
        # Commands of a worker are carried out in their order.
        self._warmth.make_room(worker, size.host_bytes)
        self._traffic.fleet.believe(asked_replica(worker_id, order))
        self._room.started(replica_id, entry.engine_settings)
        self._send(worker_id, order)
        return order


def asked_replica(worker_id: str, order: StartReplica) -> Replica:
    """The replica that a start command asks for, as it is believed in until its worker speaks of it."""
    return Replica(
        replica_id=order.replica_id,
        model=order.model,
        revision=order.revision,
        state=ReplicaState.PENDING,
        worker_id=worker_id,
        engine=order.engine,
        device_ids=order.device_ids,
        memory_bytes=order.memory_bytes,
        memory_items=order.memory_items,
        host_memory_items=order.host_memory_items,
        form=needs_of(order.engine_settings).form,
        is_background=order.is_background,
    )
