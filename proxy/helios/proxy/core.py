"""The proxy's core: every decision, no I/O, no clock, no tasks.

Something happened: a method is called with the time. What is to be done comes back as a list of actions (`actions.py`),
which the runtime carries out. So the whole behaviour of the proxy can be tested, and run through by hypothesis, in one
thread.

While the fleet is not resynchronised (a proxy that has just started), requests are held, nothing is started and nothing
published: an Envoy that fails over between proxies never gets a poorer view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from helios.mesh.errors import HeliosError, HoldExpired, NotFound, Unavailable
from helios.proxy import actions
from helios.proxy.activation import ends, machine
from helios.proxy.admission.keyring import ANYBODY, Caller, Keyring
from helios.proxy.breaker import BreakerPolicy
from helios.proxy.catalogue import Catalogue, ModelEntry, is_by_digest, shown
from helios.proxy.express.express import Express, Outlook
from helios.proxy.fleet.commands import (
    CommandBook,
    Fence,
    Order,
    SetAdapters,
    SleepReplica,
    StageRevision,
    StartReplica,
    WakeReplica,
)
from helios.proxy.fleet.state import Change, Device, Replica, ReplicaState, Staged, WorkerHello
from helios.proxy.holds import Hold, HoldLimits, Holds, expired, too_many
from helios.proxy.lifecycle import Lifecycle, LifecyclePolicy
from helios.proxy.peers.leadership import Leadership, Parts
from helios.proxy.prefill import prefill_endpoint
from helios.proxy.refusals import model_not_found
from helios.proxy.rollouts import Rollouts
from helios.proxy.routing.pick import NO_WISHES, Pick, Wishes
from helios.proxy.scaling.forecast import Expected
from helios.proxy.starts import asked_replica
from helios.proxy.traffic import LoadDelta, RoutingPolicy, Traffic

STALE_LEADER = "STALE_LEADER"
"""Why a worker refuses what a proxy orders: it has heard of a leader after it."""


@dataclass(frozen=True, slots=True)
class CorePolicy:
    """Everything that can be set about the core; times in seconds.

    Attributes:
        holds: bounds of what is held.
        breaker: when a replica is left alone.
        lifecycle: how replicas come and go.
        reservation_seconds: how long a pick counts as load before its replica reports it.
        silence_seconds: a worker that says nothing for this long is un-picked.
        worker_grace_seconds: how long an unreachable worker's endpoints are kept.
        resync_seconds: how long a proxy that starts waits for the workers that it knew.
        routing: what scores weigh.
        requires_keys: whether requests without an API key are refused.
        has_free_bands: whether these may ask for any priority.
    """

    holds: HoldLimits
    breaker: BreakerPolicy
    lifecycle: LifecyclePolicy
    reservation_seconds: float
    silence_seconds: float
    worker_grace_seconds: float
    resync_seconds: float
    routing: RoutingPolicy
    requires_keys: bool = False
    has_free_bands: bool = False


class Core:
    """Events in, actions out.

    Every public method that changes something returns the actions that follow, in order. Times are monotonic seconds.
    """

    def __init__(
        self, policy: CorePolicy, *, new_id: Callable[[], str], known_workers: Iterable[str], now: float
    ) -> None:
        """Starts with nothing believed; `known_workers` are those that an earlier run of this proxy knew."""
        self._policy = policy
        self._commands = CommandBook(new_id)
        self._awaited = set(known_workers)
        self._resync_at = now + policy.resync_seconds
        self._next_hold_id = 0
        self.catalogue = Catalogue()
        self.keyring = Keyring(is_required=policy.requires_keys, has_free_bands=policy.has_free_bands)
        self.holds = Holds(policy.holds)
        self.traffic = Traffic(
            reservation_seconds=policy.reservation_seconds, breaker=policy.breaker, routing=policy.routing
        )
        self.fleet = self.traffic.fleet
        self.lifecycle = Lifecycle(
            policy.lifecycle,
            traffic=self.traffic,
            catalogue=self.catalogue,
            holds=self.holds,
            commands=self._commands,
            new_id=new_id,
        )
        self.leadership = Leadership(
            Parts(self.lifecycle, self.traffic, self.catalogue, self.holds, self._commands, self.keyring),
            fence_seconds=policy.resync_seconds,
        )
        self.is_resynchronised = False
        """Whether the fleet is believed to be complete."""
        self.rollouts = Rollouts(traffic=self.traffic, catalogue=self.catalogue, lifecycle=self.lifecycle)
        fit_by = Outlook(self.traffic, self.catalogue, self.keyring, self.holds)
        self.express = Express(policy.routing.express, fit_by, has_past=bool(self._awaited))
        if not self._awaited:
            self._resynchronise(now, is_complete=True)

    # Requests.
    def resolve(self, name: str) -> ModelEntry | None:
        """The model of this name or alias; None where only the registry can say whether there is one.

        Raises:
            ModelNotFound: there is none, and the catalogue is in step with the registry.
        """
        entry = self.catalogue.find(name)
        if entry is None and self.catalogue.is_synced:
            # Tags come with the registry's watch; about a revision by its digest it is asked, if there is the model.
            if is_by_digest(name) and self.catalogue.find(name.partition("@")[0]) is not None:
                return None
            raise model_not_found(name)
        return entry

    def pick(
        self, entry: ModelEntry, request_id: str, now: float, adapter: str = "", wishes: Wishes = NO_WISHES
    ) -> Pick | None:
        """Picks replicas for a request; None where it must be held. Those who wait already go first.

        `adapter` is the one that the request names, where it names one; only replicas that have it are picked.
        `wishes` is what it says that bears on where it goes, where there is a choice.
        """
        return (
            None
            if self.has_before(entry, adapter, wishes.band)
            else self._pick(entry, request_id, now, adapter, wishes)
        )

    def has_before(self, entry: ModelEntry, adapter: str, band: int) -> bool:
        """Whether others wait for what a request wants, and go first."""
        waiting = self.holds.highest_band(entry.name, adapter)
        # Who waits for a place that is kept from its band holds up nobody for whom it is kept.
        return bool(waiting) and (waiting >= band or not self.traffic.rules_of(entry.name).keeps_places)

    def _pick(self, entry: ModelEntry, request_id: str, now: float, name: str, wishes: Wishes) -> Pick | None:
        if not name:
            return self.traffic.pick(entry, request_id, now, None, wishes)
        adapter = self.lifecycle.adapters.find(entry, name)
        return self.traffic.pick(entry, request_id, now, adapter, wishes) if adapter is not None else None

    def prefill_endpoint(self, entry: ModelEntry, chosen: Pick, now: float) -> str:
        """The address of a replica that computes the prompt for the chosen one; empty where there is none."""
        return prefill_endpoint(
            entry, chosen, now, traffic=self.traffic, lifecycle=self.lifecycle, among=self.catalogue
        )

    def hold(  # noqa: PLR0913 - one for each thing that is told of a hold
        self,
        entry: ModelEntry,
        request_id: str,
        *,
        size_bytes: int,
        deadline: float,
        now: float,
        name: str = "",
        requested_at: float = 0.0,
        traceparent: str = "",
        adapter: str = "",
        caller: Caller = ANYBODY,
    ) -> tuple[Hold, list[actions.Action]]:
        """Holds a request and starts what it waits for; `Hold` says what `requested_at` and `traceparent` are.

        `name` is what the request calls the model; empty: by its own name, or the adapter's.

        Raises:
            Overloaded: too much is held already.
            HoldExpired: the deadline has passed.
            HeliosError: no replica of the model can have the adapter.
        """
        self._next_hold_id += 1
        hold = Hold(
            self._next_hold_id,
            request_id,
            entry.name,
            size_bytes,
            now,
            deadline,
            name or adapter or entry.name,
            requested_at,
            traceparent,
            adapter,
            caller,
            self.traffic.quotas.cost(request_id, entry.name, size_bytes),
        )
        problem = self.lifecycle.adapters.problem(entry, adapter) if adapter else None
        if problem is not None:
            raise problem
        if deadline <= now:
            raise self._expired(hold, now)
        try:
            shed = self.holds.admit(hold)
        except HeliosError as error:
            error.retry_after_seconds = self.lifecycle.remaining_seconds(entry, now)
            raise
        if shed is not None:
            refusal = too_many(entry.name, "shed")
            refusal.retry_after_seconds = self.lifecycle.remaining_seconds(entry, now)
            self._out([actions.Fail(shed, refusal)])
        self.lifecycle.reconcile(entry.name, now)
        self._release(entry.name, now)
        return hold, self._take(now)

    def cancel_hold(self, hold: Hold) -> None:
        """The client left; harmless where the hold has ended."""
        self.holds.remove(hold.hold_id)

    # Workers.
    def worker_hello(self, hello: WorkerHello, now: float) -> list[actions.Action]:
        """A worker introduced itself: what it says replaces what was believed of it."""
        if not self.lifecycle.leads:
            # What was ordered while this proxy led is the leader's by now.
            self._commands.forget_worker(hello.worker_id)
        self.leadership.worker_hello(hello.worker_id)
        pending = self._commands.renew(hello.worker_id)
        hello = replace(hello, replicas=tuple(self._as_ordered(hello.worker_id, one) for one in hello.replicas))
        known = self.fleet.worker(hello.worker_id)
        is_news = known is None or not known.is_reachable or known.hello.incarnation != hello.incarnation
        starts = [command.order for command in pending if isinstance(command.order, StartReplica)]
        asked = [self.rollouts.at_home(asked_replica(hello.worker_id, order)) for order in starts]
        changes = self.fleet.hello(hello, asked, now)
        self.traffic.resynchronised((replica.replica_id for replica in hello.replicas), now)
        self._out([actions.WorkersChanged(), *(actions.Send(command) for command in pending)])
        if is_news:
            self._tell(hello.worker_id, actions.WorkerChange.CONNECTED)
        self._follow(changes, now, is_worker_lost=True)
        self._repeat_drains(hello, now)
        self._awaited.discard(hello.worker_id)
        if not self._awaited:
            self._resynchronise(now, is_complete=True)
        if known is None or known.hello.incarnation != hello.incarnation:
            self.lifecycle.worker_started(hello, now)
        self.lifecycle.capacity_changed(now)
        return self._take(now)

    def worker_lost(self, worker_id: str, now: float) -> list[actions.Action]:
        """A worker's stream broke: its replicas are not picked until it is back."""
        self._lose(worker_id, now)
        return self._take(now)

    def _lose(self, worker_id: str, now: float) -> None:
        worker = self.fleet.worker(worker_id)
        if worker is None or not worker.is_reachable:
            return
        for replica in self.fleet.lose(worker_id, now):
            self.traffic.refresh(replica.replica_id)
        self._tell(worker_id, actions.WorkerChange.UNREACHABLE)

    def _tell(self, worker_id: str, change: actions.WorkerChange) -> None:
        self._out([actions.WorkerChanged(worker_id, change)])

    def worker_seen(self, worker_id: str, now: float) -> list[actions.Action]:
        """A worker said something on its stream; one that had fallen silent is reachable again."""
        worker = self.fleet.worker(worker_id)
        is_back = worker is not None and not worker.is_reachable
        for replica in self.fleet.seen(worker_id, now):
            self.traffic.refresh(replica.replica_id)
        if is_back:
            self._tell(worker_id, actions.WorkerChange.CONNECTED)
            self.lifecycle.capacity_changed(now)
        return self._take(now)

    def replica_event(self, worker_id: str, sequence: int, replica: Replica, now: float) -> list[actions.Action]:
        """A replica changed; an event that comes twice changes nothing."""
        replica = self._as_ordered(worker_id, replica)
        change = self.fleet.replica_event(worker_id, sequence, replica, now)
        if change is not None:
            self._follow([change], now, is_worker_lost=False)
        return self._take(now)

    def _as_ordered(self, worker_id: str, replica: Replica) -> Replica:
        return self._commands.as_ordered(worker_id, self.rollouts.at_home(replica))

    def staged_event(self, worker_id: str, sequence: int, staged: Staged, now: float) -> list[actions.Action]:
        """A staged revision changed; an event that comes twice changes nothing."""
        self.fleet.staged_event(worker_id, sequence, staged)
        return self._take(now)

    def devices_measured(self, worker_id: str, devices: Iterable[Device], now: float) -> list[actions.Action]:
        """Devices were measured; what waits for room looks again where one came or went."""
        changed = [device for device in devices if self.fleet.device_measured(worker_id, device)]
        if changed:
            self.lifecycle.capacity_changed(now)
        return self._take(now)

    def load_report(self, deltas: Iterable[LoadDelta], now: float) -> list[actions.Action]:
        """Loads changed, requests started and finished."""
        for delta in deltas:
            self.express.heard(self.traffic.load(delta, now), len(delta.started))
        return self._take(now)

    def unreached(self, request_id: str, now: float, *, address: str, is_failure: bool) -> list[actions.Action]:
        """A request got to no replica: its place is free. A failure: no connection, to whom a lone address says."""
        if not self.traffic.unreached(request_id, now, is_failure=is_failure) and is_failure:
            self.express.unreached(address, now)
        return self._take(now)

    def command_acknowledged(
        self, worker_id: str, command_id: str, *, refused_reason: str, message: str, now: float
    ) -> list[actions.Action]:
        """A worker accepted a command, or refused it."""
        command = self._commands.acknowledge(worker_id, command_id)
        is_of_now = command is None or command.epoch == self.leadership.epoch
        if refused_reason == STALE_LEADER and self.leadership.epoch and is_of_now:
            self.leadership.doubt(worker_id, now)
        elif command is not None and isinstance(command.order, Fence):
            if is_of_now:
                self.leadership.fenced(worker_id, now)
            return self._take(now)
        if command is not None and refused_reason:
            self._refused(worker_id, command.order, refused_reason, message, now)
        return self._take(now)

    def _refused(self, worker_id: str, order: Order, reason: str, message: str, now: float) -> None:
        warmth = self.lifecycle.warmth
        match order:
            case StageRevision(revision):
                warmth.stage_refused(worker_id, revision)
            case SetAdapters(replica_id):
                self.lifecycle.adapters.refused(replica_id, reason, message)
                if (holder := self.fleet.replica(replica_id)) is not None:
                    self.lifecycle.reconcile(holder.model, now)
            case StartReplica(replica_id) | SleepReplica(replica_id) | WakeReplica(replica_id):
                replica = self.fleet.replica(replica_id)
                if replica is None:
                    return
                if isinstance(order, StartReplica):
                    change = self.fleet.forget(ends.failed(replica, reason, message))
                    self._follow([change], now, is_worker_lost=False)
                elif isinstance(order, SleepReplica):
                    # One that may sleep another time waits for the next tick: at once, it would be refused again.
                    if warmth.sleep_refused(replica, reason):
                        self.lifecycle.reconcile(replica.model, now)
                else:
                    warmth.wake_refused(replica)
                    # Its activation goes on with the next rung.
                    gone = machine.Gone(replica_id, reason, message, is_refused=True)
                    self.lifecycle.handle(replica.model, gone, now)
            case _:
                pass

    def endpoints_acknowledged(self, addresses: frozenset[str], now: float) -> list[actions.Action]:
        """Every Envoy knows these endpoints: requests may be sent there."""
        self.traffic.published(addresses)
        return self._take(now)

    def express_acknowledged(self, version: int, now: float) -> list[actions.Action]:
        """Every Envoy has the express lane of this version: what waited for it goes on."""
        self._out(self.express.lane.acknowledged(version, now))
        return self._take(now)

    # Models.
    def models_replaced(self, entries: Iterable[ModelEntry], now: float, *, is_synced: bool) -> list[actions.Action]:
        """All models, from the registry (`is_synced`) or from the copy on disk."""
        changed = self.catalogue.replace(map(self.lifecycle.wants.bounds.now, entries))
        self.catalogue.is_synced = is_synced
        self.rollouts.rehome(self.fleet.models(), now)
        # Replicas and holds of names that are in neither list were made while the catalogue was out of step.
        for model in changed | set(self.fleet.models()) | set(self.holds.models()):
            if model in changed:
                self.traffic.model_changed(model, self.catalogue.get(model))
                self.lifecycle.handle(model, machine.Changed(), now)
            self.lifecycle.reconcile(model, now)
        return self._take(now)

    def model_upserted(self, entry: ModelEntry, now: float) -> list[actions.Action]:
        """A model was made or changed."""
        entry = self.lifecycle.wants.bounds.now(entry)
        if self.catalogue.upsert(entry):
            self.traffic.model_changed(entry.name, entry)
            self.rollouts.changed(entry, now)
            self.lifecycle.handle(entry.name, machine.Changed(), now)
            self.lifecycle.reconcile(entry.name, now)
            self._release(entry.name, now)
            for model in list(self.fleet.models()) if entry.is_adapter else ():
                # Replicas that have it are to have its new revision.
                self.lifecycle.reconcile(model, now)
        return self._take(now)

    def model_deleted(self, name: str, now: float) -> list[actions.Action]:
        """A model is gone: its replicas drain, and its bytes leave the nodes unless another model has the same."""
        entry = self.catalogue.find(name)
        if self.catalogue.delete(name):
            self.traffic.model_changed(name, None)
            self.rollouts.deleted(name)
            self.lifecycle.reconcile(name, now)
            if entry is not None:
                self.lifecycle.discard(entry.revision)
        return self._take(now)

    # Operators.
    def preload(self, entry: ModelEntry, now: float) -> list[actions.Action]:
        """Starts a replica unless there is one.

        Raises:
            HeliosError: no worker, no capacity, or a start that failed a short while ago. Actions are not lost: the
                next call or tick returns them.
        """
        if self.is_resynchronised and not any(worker.is_reachable for worker in self.fleet.workers()):
            message = f"the model '{entry.name}' can't be started now: no worker is connected"
            raise Unavailable(message, reason="NO_WORKER", metadata={"model": entry.name})
        self.lifecycle.demand(entry, now)
        return self._take(now)

    def cordon(self, worker_id: str, now: float, *, is_cordoned: bool) -> list[actions.Action]:
        """Has nothing more started on a worker, whether or not it is known, or lets it."""
        if is_cordoned is not (worker_id in self.fleet.cordoned):
            change = self.fleet.cordoned.add if is_cordoned else self.fleet.cordoned.discard
            change(worker_id)
            self._tell(worker_id, actions.WorkerChange.CORDONED if is_cordoned else actions.WorkerChange.UNCORDONED)
        self.lifecycle.capacity_changed(now)
        return self._take(now)

    def reset_breaker(self, replica: Replica, now: float) -> list[actions.Action]:
        """Has a replica picked again, whatever it failed at."""
        self.traffic.reset_breaker(replica.replica_id)
        return self._take(now)

    def drain_worker(self, worker_id: str, now: float) -> list[actions.Action]:
        """Cordons a worker and drains what it holds; models in use start elsewhere."""
        todo = self.cordon(worker_id, now, is_cordoned=True)
        worker = self.fleet.worker(worker_id)
        replicas = list(worker.replicas.values()) if worker is not None else []
        self.lifecycle.drain_soon(replicas, now)
        for model in {replica.model for replica in replicas}:
            self.lifecycle.reconcile(model, now)
        return todo + self._take(now)

    def check_worker(self, worker_id: str) -> None:
        """Raises NotFound for a worker that is neither connected nor cordoned."""
        if self.fleet.worker(worker_id) is None and worker_id not in self.fleet.cordoned:
            metadata = {"worker_id": shown(worker_id)}
            raise NotFound(f"there is no worker '{shown(worker_id)}'", reason="WORKER_NOT_FOUND", metadata=metadata)

    def drain_model(self, entry: ModelEntry, now: float) -> list[actions.Action]:
        """Brings a model to zero now."""
        self.lifecycle.drain_all(entry.name, now)
        return self._take(now)

    def evict(self, entry: ModelEntry, now: float) -> tuple[int, list[actions.Action]]:
        """Drains a model and drops its bytes; returns how many replicas drain too. Raises PreconditionFailed."""
        count = self.lifecycle.evict(entry, now)
        return count, self._take(now)

    def stage(self, entry: ModelEntry, now: float) -> tuple[Staged, int, list[actions.Action]]:
        """Stages a model and drains it; returns how many replicas drain. Raises PreconditionFailed, Unavailable."""
        staged, count = self.lifecycle.stage(entry, now)
        return staged, count, self._take(now)

    def unstage(self, entry: ModelEntry, now: float) -> tuple[int, list[actions.Action]]:
        """Gives a model's host memory back; returns on how many nodes."""
        self.lifecycle.wants.forecasts.dismiss(entry.name)
        return self.lifecycle.warmth.unstage(entry.revision), self._take(now)

    def sleep(self, replica: Replica, now: float) -> list[actions.Action]:
        """Puts a replica to sleep. Raises PreconditionFailed."""
        self.lifecycle.put_to_sleep(replica, now)
        return self._take(now)

    def wake(self, replica: Replica, now: float) -> list[actions.Action]:
        """Wakes a replica. Raises PreconditionFailed."""
        self.lifecycle.wake_up(replica, now)
        return self._take(now)

    def expect(self, expected: Mapping[str, Expected], now: float) -> list[actions.Action]:
        """Forecasts were made: how warm models are best kept."""
        self.lifecycle.wants.expect(expected, now)
        return self._take(now)

    # Time.
    def expire_holds(self, now: float) -> list[actions.Action]:
        """Ends holds whose deadline is reached; to be called about every tenth of a second."""
        for hold in self.holds.expire(now):
            self._out([actions.Fail(hold, self._expired(hold, now))])
        self.lifecycle.activating.look(now)
        return self._take(now)

    def tick(self, now: float) -> list[actions.Action]:
        """Follows the time in everything else, at once."""
        todo, is_left = self.begin_tick(now), True
        while is_left:
            more, is_left = self.go_on(now, len(self.catalogue) + 1)
            todo += more
        return todo

    def go_on(self, now: float, count: int) -> tuple[list[actions.Action], bool]:
        """Looks at so many more models of a tick's round; False where there are no more."""
        is_left = self.lifecycle.go_on(now, count)
        return self._take(now), is_left

    def begin_tick(self, now: float) -> list[actions.Action]:
        """Follows the time in everything but models, which `go_on` looks at; to be called about every second."""
        for worker_id in self.fleet.silent(now, self._policy.silence_seconds):
            self._lose(worker_id, now)
        for worker_id in self.fleet.overdue(now, self._policy.worker_grace_seconds):
            self._commands.forget_worker(worker_id)
            self._out([actions.WorkersChanged(), actions.Disconnect(worker_id)])
            self._tell(worker_id, actions.WorkerChange.GONE)
            self._follow(self.fleet.remove_worker(worker_id), now, is_worker_lost=True)
            self.lifecycle.room.forget_worker(worker_id)
        if not self.is_resynchronised and now >= self._resync_at:
            self._resynchronise(now, is_complete=False)
        self.leadership.tick(now)
        self.traffic.tick(now)
        self._out(self.express.tick(now))
        self.lifecycle.begin_round(now)
        return self._take(now)

    def _follow(self, changes: Iterable[Change], now: float, *, is_worker_lost: bool) -> None:
        has_room = False
        for change in changes:
            self.traffic.changed(change, now)
            if change.before is None and change.after is None:
                continue
            replica = change.replica
            if change.before is None or change.after is None or change.before.state is not change.after.state:
                self._out([actions.ReplicaChanged(replica)])
            is_gone = change.after is None or change.after.state.is_gone
            self.lifecycle.room.measure(replica)
            self.lifecycle.promises.follow(change, now)
            if is_gone:
                has_room = True
                self.lifecycle.gone(replica, ends.gone(replica, is_worker_lost=is_worker_lost), now)
            elif replica.state is ReplicaState.READY:
                self.lifecycle.ready(replica, now)
            self.lifecycle.reconcile(replica.model, now)
        if has_room:
            self.lifecycle.capacity_changed(now)

    def _repeat_drains(self, hello: WorkerHello, now: float) -> None:
        # A worker that restarted may have forgotten a drain that it had accepted.
        for replica in hello.replicas:
            held = self.fleet.replica(replica.replica_id)
            if held is not None and held.state is ReplicaState.READY and self.traffic.is_draining(held):
                self.lifecycle.drain(held, now)

    def _release(self, model: str, now: float) -> None:
        entry = self.catalogue.find(model)
        for adapter in self.holds.lanes(model) if entry is not None else ():
            assert entry is not None
            while (turn := self._next_turn(entry, adapter, now)) is not None:
                self.holds.release(turn.hold.hold_id)
                self._out([turn])

    def _next_turn(self, entry: ModelEntry, adapter: str, now: float) -> actions.Release | None:
        """Who of a lane goes on now, and where to; None where there is no place for anybody."""
        for hold in self.holds.next_of_lane(entry.name, adapter):
            wishes = Wishes(band=hold.caller.priority)
            if (chosen := self._pick(entry, hold.request_id, now, adapter, wishes)) is not None:
                return actions.Release(hold, chosen)
        return None

    def _resynchronise(self, now: float, *, is_complete: bool) -> None:
        if self.is_resynchronised:
            return
        self.is_resynchronised = True
        self._out([actions.FleetResynchronised(is_complete)])
        self.leadership.resynchronised(now)

    def _expired(self, hold: Hold, now: float) -> HoldExpired:
        entry = self.catalogue.find(hold.model)
        retry_after = self.lifecycle.remaining_seconds(entry, now) if entry is not None else 1.0
        has_candidates = self.traffic.has_candidates(hold.model)
        state = self.lifecycle.state(hold.model)
        return expired(hold, now, state, retry_after_seconds=retry_after, has_candidates=has_candidates)

    def follow_up(self, now: float) -> list[actions.Action]:
        """What follows from what a part of the core was told (`leadership`)."""
        return self._take(now)

    def _out(self, items: Iterable[actions.Action]) -> None:
        self.lifecycle.outbox.extend(items)

    def _take(self, now: float) -> list[actions.Action]:
        for model in self.traffic.take_opened():
            self._release(model, now)
        for replica_id, is_open in self.traffic.breakers.take_changes():
            if (replica := self.fleet.replica(replica_id)) is not None:
                self._out([actions.BreakerChanged(replica.model, replica_id, replica.worker_id, is_open)])
        taken, self.lifecycle.outbox = self.lifecycle.outbox, []
        return self.express.look(taken, now)
