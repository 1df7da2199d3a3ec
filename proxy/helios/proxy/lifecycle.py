"""What should run: brings the replicas of each model to what is wanted, one model at a time.

`reconcile(model)` compares what is believed with what is wanted and does the next step; it is called whenever something
about the model changed, and by the clock. It is level-triggered: a lost event costs time, never correctness. Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from helios.mesh.errors import PreconditionFailed
from helios.proxy import actions
from helios.proxy.activating import Activating, Outside
from helios.proxy.activation import machine
from helios.proxy.activation.estimate import StartEstimates
from helios.proxy.activation.machine import Activation, ActivationPolicy, ActivationState
from helios.proxy.activation.rungs import RungEstimates
from helios.proxy.activation.turns import TurnPolicy
from helios.proxy.adapters import Adapters
from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.cooling import Cooling
from helios.proxy.fleet.commands import CommandBook, DrainReplica, EvictRevision, Order, StartReplica, StopReplica
from helios.proxy.fleet.state import Replica, ReplicaState, Staged, WorkerHello
from helios.proxy.holds import Holds
from helios.proxy.loads import Loads
from helios.proxy.moved import move_holds
from helios.proxy.peers.following import Outlooks
from helios.proxy.promises import Promises
from helios.proxy.refusals import check_unpinned
from helios.proxy.room import Room
from helios.proxy.scaling.desired import Desired, least_missed
from helios.proxy.scaling.forecast import WarmPoolMode
from helios.proxy.scaling.ladder import Cooldowns
from helios.proxy.scaling.load import LoadPolicy
from helios.proxy.sizing import SizingPolicy
from helios.proxy.starts import Starts
from helios.proxy.swap import SwapPolicy, Swaps
from helios.proxy.traffic import Traffic
from helios.proxy.wants import Wants
from helios.proxy.warmth import Warmth, WarmthPolicy


@dataclass(frozen=True, slots=True)
class LifecyclePolicy:
    """How replicas come and go.

    Attributes:
        engine: engine that replicas run with; empty is the worker's default.
        idle_seconds: a model without requests for this long goes to its minimum; 0 is never.
        residency_seconds: a replica younger than this is not preempted for another model.
        warm_pool: what is made of forecasts.
        turns: when a model in use gives way to one that waits.
        drain_seconds: requests that still run after this long at a draining replica are cut off.
        start_base_seconds: guess of a first start, without its weights.
        start_bytes_per_second: guess of how fast weights come.
        warmth: what is kept of models that nobody uses.
        swap: when eager replicas give their place to compiled ones.
        load: when a model has more replicas than one.
    """

    activation: ActivationPolicy
    sizing: SizingPolicy
    engine: str
    idle_seconds: float
    residency_seconds: float
    drain_seconds: float
    start_base_seconds: float
    start_bytes_per_second: float
    warm_pool: WarmPoolMode = WarmPoolMode.ADVISE
    turns: TurnPolicy = field(default_factory=TurnPolicy)
    warmth: WarmthPolicy = field(default_factory=WarmthPolicy)
    swap: SwapPolicy = field(default_factory=SwapPolicy)
    load: LoadPolicy = field(default_factory=LoadPolicy)


class Lifecycle:
    """Activation, scaling and preemption.

    Invariants: a model has at most one start under way that this proxy asked for, and one spare beside (see `swap`); a
    start is asked for only where fewer replicas of the served revision exist than are wanted, those that are starting
    counted and spares not.
    """

    def __init__(
        self,
        policy: LifecyclePolicy,
        *,
        traffic: Traffic,
        catalogue: Catalogue,
        holds: Holds,
        commands: CommandBook,
        new_id: Callable[[], str],
    ) -> None:
        self.policy = policy
        guesses = {"base_seconds": policy.start_base_seconds, "bytes_per_second": policy.start_bytes_per_second}
        self.estimates = StartEstimates(**guesses)
        self.outbox: list[actions.Action] = []
        self._round: deque[str] = deque()
        self.is_open = False
        self.leads = True
        self.outlooks = Outlooks()
        """What a leader expects, where this proxy follows."""
        self.wished: set[str] = set()
        """Models that requests would take and do not wait for, to be told a leader."""
        self._traffic = traffic
        self._catalogue = catalogue
        self._holds = holds
        self._commands = commands
        self._evicting: set[str] = set()
        self._drain_seconds: dict[str, float] = {}
        self.room = Room(
            policy.sizing,
            policy.residency_seconds,
            policy.turns,
            traffic=traffic,
            catalogue=catalogue,
            holds=holds,
            start_seconds=lambda entry: self.estimates.expected_seconds(entry.name, entry.weights_bytes),
        )
        self.promises = Promises(
            RungEstimates(**guesses),
            traffic=traffic,
            catalogue=catalogue,
            room=self.room,
            known_seconds=self.estimates.measured().get,
            report=self._report,
        )
        self.warmth = Warmth(policy.warmth, traffic=traffic, catalogue=catalogue, send=self._send)
        self.adapters = Adapters(
            traffic=traffic, catalogue=catalogue, holds=holds, send=self._send, report=self._report
        )
        self._starts = Starts(
            policy.engine,
            traffic=traffic,
            holds=holds,
            room=self.room,
            warmth=self.warmth,
            new_id=new_id,
            send=self._send_start,
            report=self._report,
        )
        self.activating = self._make_activating()
        self.wants = self._make_wants()
        self.cooling = Cooling(
            traffic=traffic, holds=holds, warmth=self.warmth, drain=self.drain, decide=self.wants.decide
        )
        self.loads = Loads(
            policy.load,
            traffic=traffic,
            holds=holds,
            begin=self._start_another,
            decide=self.wants.decide,
            report=self._report,
        )
        self.swaps = Swaps(
            policy.swap,
            traffic=traffic,
            order=self._start_spare,
            stop=self.drain,
            report=self._report,
        )

    def _make_activating(self) -> Activating:
        return Activating(
            self.policy.activation,
            self.policy.turns,
            compiled_seconds=self.policy.swap.start_seconds,
            estimates=self.estimates,
            traffic=self._traffic,
            catalogue=self._catalogue,
            holds=self._holds,
            room=self.room,
            warmth=self.warmth,
            starts=self._starts,
            outside=Outside(self.reconcile, self._drain_within, self._send, self._report, self.promises.ordered),
        )

    def _make_wants(self) -> Wants:
        policy = self.policy
        return Wants(
            Cooldowns(policy.idle_seconds, policy.warmth.asleep_seconds, policy.warmth.staged_seconds),
            policy.warm_pool,
            traffic=self._traffic,
            catalogue=self._catalogue,
            holds=self._holds,
            tell=lambda decision: self._report(actions.ModelScaled(decision)),
        )

    def activation(self, model: str) -> Activation:
        """The model's activation."""
        return self.activating.of(model)

    def failure(self, model: str) -> str:
        """Why the model's last start failed, as long as no other one is tried; else empty."""
        if not self.leads:
            return self.outlooks.failure(model)
        activation = self.activating.find(model)
        if activation is None or activation.state is not ActivationState.BACKING_OFF:
            return ""
        return activation.failure

    def state(self, model: str) -> ActivationState:
        """Where the model's activation stands, as far as this proxy knows."""
        return self.activation(model).state if self.leads else self.outlooks.state(model)

    def remaining_seconds(self, entry: ModelEntry, now: float) -> float:
        """Estimated time until a replica of the model could take a request that comes now.

        Not less than what is left of a fetch at the rate it has: experience knows nothing of today's network.
        """
        activation = self.activating.find(entry.name)
        elapsed = activation.elapsed_seconds(now) if activation is not None else 0.0
        pause = activation.back_off_remaining_seconds(now) if activation is not None else 0.0
        estimated = pause + self.promises.remaining_seconds(entry, elapsed)
        estimated += self.activating.turn_seconds(entry.name, estimated)
        if not self.leads:
            estimated = self.outlooks.remaining_seconds(entry.name, now) or estimated
        return max(estimated, self.promises.fetch_seconds(entry))

    def lead(self) -> None:
        """This proxy decides what runs from now on; nothing happens before `open`."""
        self.leads, self.is_open = True, False
        self.wants.is_deciding = True
        self.outlooks.clear()

    def step_down(self) -> None:
        """Another proxy decides what runs: nothing is ordered any more, and what was begun is its own."""
        self.leads = self.is_open = self.wants.is_deciding = False
        for model in list(self.activating.models()):
            self.activating.forget(model)
        self._evicting.clear()

    def open(self, now: float) -> None:
        """What there is is known: begins to bring it to what is wanted."""
        self.is_open = True
        for replica in list(self._traffic.fleet.replicas()):
            # The leader before may have told of it and died before it ordered it.
            if replica.state is not ReplicaState.DRAINING and self._traffic.is_draining(replica):
                self.drain(replica, now)
        models = {*self._traffic.fleet.models(), *self._holds.models(), *self._catalogue.pinned()}
        for model in self.room.start_order(sorted(models), now):
            self.reconcile(model, now)

    def reconcile(self, model: str, now: float) -> None:
        """Does the next step for a model; where this proxy follows, for those alone who wait for it here."""
        if not self.is_open:
            self._observe(model, now)
            return
        entry = self._catalogue.find(model)
        if entry is None or entry.name != model:
            if self._catalogue.is_synced:
                self._remove(model, now)
            return
        replicas = self._traffic.staying(model)
        for replica in replicas:
            # No request is sent to an old revision any more; those that it has may end there.
            if replica.revision != entry.revision and not self._traffic.is_idle(replica):
                self._let_end(replica, now, self.policy.load.drain_seconds)
            elif replica.revision != entry.revision:
                self.drain(replica, now)
        current = [replica for replica in replicas if replica.revision == entry.revision]
        standing, spares = self.swaps.split(current, now)
        desired = self._desired(entry, current, standing, now)
        if len(standing) < desired.start_below:
            self.activating.demand(entry, standing, entry.min_replicas, now)
        else:
            self.activating.unneeded(model, now)
            if len(standing) > desired.drain_above:
                self._put_down(entry, standing, len(standing) - desired.drain_above, now)
        self._adopt(model, standing, now)
        self.swaps.follow(entry, standing, spares, now, is_wanted=desired.drain_above > 0)
        self.adapters.follow(entry, now)

    def demand(self, entry: ModelEntry, now: float) -> None:
        """Asks for a replica, whatever the model's use so far.

        Raises:
            HeliosError: a start failed a short while ago, or there is no room.
        """
        self._traffic.use(entry.name, now)
        current = self._traffic.staying(entry.name)
        standing, _ = self.swaps.split(current, now)
        if any(replica.revision == entry.revision for replica in standing) or not self.is_open:
            return
        demanded = machine.Demanded(by_operator=True)
        error = self.activating.handle(entry.name, demanded, now, may_preempt=True)
        if error is not None:
            raise error

    def want(self, entry: ModelEntry, now: float) -> None:
        """Starts a replica that requests would take and do not wait for: where there is room that nobody has."""
        if not self.is_open:
            if not self.leads:
                self.wished.add(entry.name)
            return
        current = self._traffic.staying(entry.name)
        standing, _ = self.swaps.split(current, now)
        if not standing:
            self.activating.demand(entry, standing, entry.min_replicas, now)

    def handle(self, model: str, event: machine.Event, now: float) -> None:
        """Hands an event to the model's activation, where there is one."""
        if self.activating.find(model) is not None:
            self.activating.handle(model, event, now, may_preempt=self._holds.count(model) > 0)

    def begin_round(self, now: float) -> None:
        """Begins to look at every model about which something may be due; `go_on` does it."""
        self.wants.follow_clock(now)
        if not self.leads:
            for model in self._holds.models():
                self._observe(model, now)
            return
        pinned, active = sorted(self._catalogue.pinned()), self.activating.models()
        # In an order of their own: sorting thousands of names would be a slice of its own.
        expected, fleet = self.wants.forecasts.models(), self._traffic.fleet
        staged = (one.model for worker in fleet.workers() for one in worker.staged.values())
        names = dict.fromkeys((*fleet.models(), *pinned, *self._holds.models(), *active, *expected, *staged))
        self.loads.keep_only(names, now)
        self.activating.look(now)
        self._round = deque(self.room.start_order(names, now))
        self._evict_idle()
        self.warmth.relieve()
        if self.is_open:
            self.cooling.relieve(now)

    def go_on(self, now: float, count: int) -> bool:
        """Looks at some more models of the round; False once there are no more.

        Thousands of models take longer than a request should wait for its pick, so a round is made in pieces.
        """
        for _ in range(min(count, len(self._round))):
            model = self._round.popleft()
            self.activating.tick(model, now)
            entry = self._catalogue.find(model)
            # Until all workers are back, what there is says nothing of what was asked for.
            has_load = self.is_open and entry is not None and entry.name == model
            if entry is not None and has_load:
                self.loads.observe(entry, now)
            self.reconcile(model, now)
            if entry is not None and has_load:
                self._follow_load(entry, now)
                self.cooling.follow(entry, now, self.wants.cooldowns(entry), self.wants.floor(model, now))
        return bool(self._round)

    def capacity_changed(self, now: float) -> None:
        """A worker came, or a replica went: activations that wait for room look again."""
        self.warmth.look_again()
        self.loads.capacity_changed()
        self.activating.capacity_changed(now)

    def worker_started(self, hello: WorkerHello, now: float) -> None:
        """A worker came that runs anew: what its predecessor could not do for good, it may."""
        self.swaps.worker_started(hello.worker_id, hello.incarnation)
        for model in list(self.activating.models()):
            if self.activation(model).is_blocked:
                self.handle(model, machine.Changed(), now)

    def ready(self, replica: Replica, now: float) -> None:
        """The replica is ready."""
        self.swaps.ready(replica, now)
        self.loads.ready(replica, now)
        self.handle(replica.model, machine.Ready(replica.replica_id), now)

    def gone(self, replica: Replica, event: machine.Gone, now: float) -> None:
        """The replica is gone."""
        self.activating.gone(replica, event, now)
        self._drain_seconds.pop(replica.replica_id, None)
        self.warmth.forget(replica.replica_id)
        self.room.forget(replica.replica_id)
        self.adapters.forget(replica.replica_id)
        self.swaps.gone(replica, event, now)
        self.loads.gone(replica, event, now)
        self.handle(replica.model, event, now)

    def drain(self, replica: Replica, now: float, *, seconds: float | None = None) -> None:
        """Takes a replica out: un-pick, then drain; its endpoint goes when it is gone. One not ready yet is stopped.

        Requests that run may go on for `seconds`, also where the order is repeated; None is the policy's time. Of two
        times the shorter one counts.
        """
        if not self.leads:
            return
        is_pending = self._commands.has_pending_drain(replica.worker_id, replica.replica_id)
        if seconds is None and self._traffic.is_draining(replica) and is_pending:
            return
        self._traffic.drain_asked(replica.replica_id)
        self.loads.stopped(replica)
        self.handle(replica.model, machine.Withdrawn(replica.replica_id), now)
        known = self._drain_seconds.get(replica.replica_id, seconds or self.policy.drain_seconds)
        seconds = self._drain_seconds[replica.replica_id] = known if seconds is None else min(known, seconds)
        is_routable = replica.state in (ReplicaState.READY, ReplicaState.DRAINING)
        order: Order = DrainReplica(replica.replica_id, seconds) if is_routable else StopReplica(replica.replica_id)
        self._send(replica.worker_id, order)

    def _drain_within(self, replica: Replica, now: float, seconds: float | None) -> None:
        self.drain(replica, now, seconds=self.policy.drain_seconds if seconds is None else seconds)

    def _let_end(self, replica: Replica, now: float, seconds: float) -> None:
        """Drains what is not drained for its room, so that its requests may take their time."""
        self.drain(replica, now, seconds=seconds)
        self.room.leaves_late(replica.replica_id)

    def drain_all(self, model: str, now: float) -> int:
        """Brings a model to zero now; returns how many replicas drain."""
        self._traffic.forget_use(model, now)
        self.wants.forecasts.dismiss(model)
        return self.drain_soon(self._traffic.fleet.replicas_of(model), now)

    def drain_soon(self, replicas: Collection[Replica], now: float) -> int:
        """Drains replicas for an operator, those that had longer, too; returns how many there are."""
        limit = self.policy.drain_seconds
        for replica in replicas:
            if not self._traffic.is_draining(replica) or self._drain_seconds.get(replica.replica_id, limit) > limit:
                self.drain(replica, now, seconds=limit)
        return len(replicas)

    def evict(self, entry: ModelEntry, now: float) -> int:
        """Drains a model and drops its bytes from the nodes once nothing uses them; returns how many replicas drain.

        Raises:
            PreconditionFailed: the model's policy keeps replicas.
        """
        check_unpinned(entry)
        count = self.drain_all(entry.name, now)
        self.warmth.unstage(entry.revision)
        self._evicting.add(entry.revision)
        self._evict_idle()
        return count

    def discard(self, revision: str) -> None:
        """Drops the bytes of a deleted model's revision from the nodes once no replica uses them."""
        if self.leads and all(entry.revision != revision for entry in self._catalogue.models()):
            self._evicting.add(revision)
            self._evict_idle()

    def _desired(self, entry: ModelEntry, current: list[Replica], standing: list[Replica], now: float) -> Desired:
        activation = self.activating.find(entry.name)
        return self.wants.desired(
            entry,
            current,
            now,
            load_count=self.loads.count(entry.name, standing, now),
            is_failing=activation is not None and activation.is_failing,
            is_asked_for=self.activating.is_asked_for(entry.name),
        )

    def put_to_sleep(self, replica: Replica, now: float) -> None:
        """Puts a replica to sleep for an operator; nothing happens to one that sleeps. Raises as `check_sleep`."""
        if self.check_sleep(replica):
            self._traffic.forget_use(replica.model, now)
            self.wants.forecasts.dismiss(replica.model)
            self.warmth.sleep(replica)

    def check_sleep(self, replica: Replica) -> bool:
        """Whether an operator's word would put a replica to sleep; False where it sleeps.

        Raises:
            PreconditionFailed: it can't sleep now, or its model's policy keeps replicas, which would wake it at once.
        """
        if replica.state is ReplicaState.ASLEEP and not self._traffic.is_draining(replica):
            return False
        self.warmth.check_sleep(replica)
        entry = self._catalogue.get(replica.model)
        if entry is not None:
            check_unpinned(entry)
        return True

    def wake_up(self, replica: Replica, now: float) -> None:
        """Wakes a replica for an operator. Raises PreconditionFailed."""
        if self.check_wake(replica):
            self._traffic.use(replica.model, now)
            self.activating.wake(replica)
            self.activation(replica.model)
            self.reconcile(replica.model, now)

    def check_wake(self, replica: Replica) -> bool:
        """Whether an operator's word would wake a replica; False where it is awake. Raises PreconditionFailed."""
        if replica.state in (ReplicaState.READY, ReplicaState.WAKING):
            return False
        if replica.state is not ReplicaState.ASLEEP or self._traffic.is_draining(replica):
            message = f"replica {replica.replica_id} is not asleep, or on its way out"
            raise PreconditionFailed(message, reason="REPLICA_NOT_ASLEEP")
        if replica.worker_id in self._traffic.fleet.cordoned:
            message = f"worker {replica.worker_id} is cordoned: helios workers uncordon {replica.worker_id}"
            raise PreconditionFailed(message, reason="WORKER_CORDONED")
        return True

    def stage(self, entry: ModelEntry, now: float) -> tuple[Staged, int]:
        """Stages a model and drains it; returns where it stands and how many replicas drain.

        Raises:
            PreconditionFailed: the model's policy keeps replicas.
            Unavailable: there is no worker, or no room.
        """
        check_unpinned(entry)
        staged = self.warmth.stage(entry)
        return staged, self.drain_all(entry.name, now)

    def _adopt(self, model: str, current: list[Replica], now: float) -> None:
        # One that was stopped a moment ago is none: its end would be taken for a failure. One for load nobody awaits.
        awaited = (
            r
            for r in current
            if r.state.is_starting and not self._traffic.is_draining(r) and not self.loads.is_starting(r)
        )
        starting = next(awaited, None)
        if starting is not None:
            self.activating.handle(model, machine.Adopted(starting.replica_id), now, may_preempt=False)

    def _put_down(self, entry: ModelEntry, current: list[Replica], count: int, now: float) -> None:
        replaced = self.swaps.replaced(entry, current)
        self.wants.put_down(entry, len(current), len(current) - count, now)
        for replica in least_missed(current, replaced)[:count]:
            is_replaced = replica.replica_id in replaced
            if count < len(current) and (is_replaced or not self._traffic.is_idle(replica)):
                seconds = self.policy.swap.drain_seconds if is_replaced else self.policy.load.drain_seconds
                self._let_end(replica, now, seconds)
                self.outbox += [actions.SwapDone(entry.name, replica.replica_id)] if is_replaced else []
                continue
            if self.warmth.may_sleep(replica):
                self.warmth.sleep(replica)
                continue
            if count == len(current) and replica.state is ReplicaState.READY:
                self.warmth.keep_staged(entry, replica.worker_id)
            self.drain(replica, now)

    def _observe(self, model: str, now: float) -> None:
        """Answers those who wait here for what will not come, or has become another name's."""
        if self.leads:
            return
        entry = self._catalogue.find(model)
        if entry is not None and entry.name == model:
            self.adapters.answer(entry)
        elif self._catalogue.is_synced:
            self._move_holds(model, now)

    def _remove(self, model: str, now: float) -> None:
        self.drain_soon(self._traffic.fleet.replicas_of(model), now)
        self.activating.forget(model)
        self.swaps.forget(model)
        self._traffic.forget_model(model)
        self._move_holds(model, now)

    def _move_holds(self, model: str, now: float) -> None:
        todo, homes = move_holds(
            model, now, holds=self._holds, catalogue=self._catalogue, remaining_seconds=self.remaining_seconds
        )
        self.outbox += todo
        for home in sorted(homes):
            self._traffic.look_again(home)
            self.reconcile(home, now)

    def _evict_idle(self) -> None:
        for revision in list(self._evicting):
            if any(_uses(replica, revision) for replica in self._traffic.fleet.replicas()):
                continue
            self._evicting.discard(revision)
            self.promises.evicted(revision)
            for worker in self._traffic.fleet.workers():
                self._send(worker.hello.worker_id, EvictRevision(revision))

    def _start_spare(self, entry: ModelEntry, now: float) -> Replica | None:
        return None if self.activating.is_room_wanted else self._starts.begin_spare(entry, now)

    def _follow_load(self, entry: ModelEntry, now: float) -> None:
        """Starts more replicas for a model's load, unless others wait for room, or its last start failed."""
        floor = self.wants.expected_count(entry.name, now)
        if floor < 2 and not self.loads.asks_for_more(entry.name):
            return
        if self.activation(entry.name).state is not ActivationState.IDLE or self.activating.is_room_wanted:
            return
        current = [r for r in self._traffic.staying(entry.name) if r.revision == entry.revision]
        standing, _ = self.swaps.split(current, now)
        self.loads.follow(entry, standing, self._desired(entry, current, standing, now).drain_above, floor, now)

    def _start_another(self, entry: ModelEntry, now: float) -> str:
        sleeper = self.warmth.sleeper(entry)
        started = self.activating.wake(sleeper) if sleeper is not None else self._starts.begin_another(entry, now)
        self.promises.ordered(started, now)
        return started

    def _send_start(self, worker_id: str, order: Order) -> None:
        if isinstance(order, StartReplica):
            self._evicting.discard(order.revision)
        self._send(worker_id, order)

    def _send(self, worker_id: str, order: Order) -> None:
        if not self.leads:
            # Workers would refuse it.
            return
        self.outbox.append(actions.Send(self._commands.issue(worker_id, order)))

    def _report(self, action: actions.Action) -> None:
        self.outbox.append(action)


def _uses(replica: Replica, revision: str) -> bool:
    return replica.revision == revision or any(held.adapter.revision == revision for held in replica.adapters)
