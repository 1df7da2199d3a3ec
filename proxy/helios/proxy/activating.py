"""Brings models up for those who wait: wakes, starts, and makes room, the longest wait first.

One activation a model (`activation/machine`). Room that nobody has goes to whoever asks; room that others have goes in
the order of waiting (`activation/turns`): whoever is not first in the line is looked at when the line is. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from helios.mesh.errors import HeliosError, InvalidRequest, Unavailable
from helios.proxy import actions
from helios.proxy.activation import machine
from helios.proxy.activation.estimate import StartEstimates
from helios.proxy.activation.machine import Activation, ActivationPolicy, ActivationState
from helios.proxy.activation.refusals import StartRefusals
from helios.proxy.activation.turns import Claim, TurnPolicy
from helios.proxy.catalogue import Catalogue, ModelEntry, shown
from helios.proxy.engine_needs import needs_of
from helios.proxy.fleet.commands import Order, StopReplica
from helios.proxy.fleet.state import Form, Replica, ReplicaState
from helios.proxy.holds import Holds
from helios.proxy.placement import place as placement
from helios.proxy.refusals import start_error
from helios.proxy.room import Room
from helios.proxy.starts import Starts
from helios.proxy.traffic import Traffic
from helios.proxy.warmth import Warmth

_LOOK_SECONDS: Final = 0.2
"""How often a start that waits looks for room where nothing has changed."""
_MOST_LOOKS: Final = 512
"""Workers that are looked at when the line is, for all that wait in it: some twenty milliseconds."""
_LEAST_MODELS: Final = 2
"""Models that are looked at with the line, however many workers there are: then it is looked at less often."""
_AWAY: Final = "the workers that can have it are not reachable at the moment"


@dataclass(frozen=True, slots=True)
class Outside:
    """What the activations of models have done; `drain` takes a replica out, within so many seconds.

    Attributes:
        reconcile: does the next step for a model.
        drain: takes a replica out; its requests may go on for so many seconds, None: as long as the policy says.
        send: sends an order to a worker.
        report: says what happened.
        ordered: notes that a replica was ordered to start or to wake.
    """

    reconcile: Callable[[str, float], None]
    drain: Callable[[Replica, float, float | None], None]
    send: Callable[[str, Order], None]
    report: Callable[[actions.Action], None]
    ordered: Callable[[str, float], None]


class Activating:
    """The activations of all models.

    Invariants: a model has at most one start under way that somebody waits for; a model is in the line from when it
    waits for room that others have, and may take it, until it waits no more.
    """

    def __init__(  # noqa: PLR0913 - what is started, where, for whom
        self,
        policy: ActivationPolicy,
        turns: TurnPolicy,
        *,
        compiled_seconds: float,
        estimates: StartEstimates,
        traffic: Traffic,
        catalogue: Catalogue,
        holds: Holds,
        room: Room,
        warmth: Warmth,
        starts: Starts,
        outside: Outside,
    ) -> None:
        """``compiled_seconds`` is how long a start that compiles may take."""
        self._policy = policy
        self._turns = turns
        self._compiled_seconds = compiled_seconds
        self._estimates = estimates
        self._traffic = traffic
        self._catalogue = catalogue
        self._holds = holds
        self._room = room
        self._warmth = warmth
        self._starts = starts
        self._outside = outside
        self._activations: dict[str, Activation] = {}
        self._refusals = StartRefusals()
        self._waking: set[str] = set()
        self._looked: dict[str, tuple[float, bool]] = {}
        self._look_at = 0.0
        self._looks_from = 0
        self._in_turn = ""

    def of(self, model: str) -> Activation:
        """The model's activation."""
        activation = self._activations.get(model)
        if activation is None:
            activation = self._activations[model] = Activation(self._policy)
        return activation

    def find(self, model: str) -> Activation | None:
        """The model's activation, where there was any."""
        return self._activations.get(model)

    def models(self) -> Iterable[str]:
        """Models that have an activation."""
        return self._activations.keys()

    @property
    def is_room_wanted(self) -> bool:
        """Whether a start waits for memory that others have."""
        return any(activation.waits_for_room for activation in self._activations.values())

    def demand(self, entry: ModelEntry, standing: list[Replica], min_replicas: int, now: float) -> None:
        """Brings one up, unless one is on its way or a look a moment ago found no room."""
        if any(replica.state.is_starting for replica in standing):
            return
        # Only what somebody waits for, or what the policy promises, may take another model's memory.
        may_preempt = self._holds.count(entry.name) > 0 or len(standing) < min_replicas
        if entry.name in self._room.line and self._in_turn != entry.name:
            self.look(now)
            return
        # Looking for room looks at every worker, and each request that waits would do so anew.
        is_waiting = self.of(entry.name).state is ActivationState.WAITING
        looked_at, did_preempt = self._looked.get(entry.name, (-_LOOK_SECONDS, False))
        is_early = now < looked_at + _LOOK_SECONDS and (did_preempt or not may_preempt)
        if is_waiting and is_early and self._in_turn != entry.name:
            return
        self._looked[entry.name] = now, may_preempt
        self.handle(entry.name, machine.Demanded(), now, may_preempt=may_preempt)

    def unneeded(self, model: str, now: float) -> None:
        """Nothing asks for another replica of a model: it waits no more."""
        activation = self._activations.get(model)
        if activation is not None and activation.state is ActivationState.WAITING:
            self.handle(model, machine.Unneeded(), now, may_preempt=False)

    def turn_seconds(self, model: str, start_seconds: float) -> float:
        """Estimated time until it is a model's turn to get room, where it waits for some.

        Each of those ahead keeps its room for about as long as a start takes, on each worker one after the other.
        """
        worker_count = sum(1 for _ in self._traffic.fleet.workers())
        return self._room.line.ahead_count(model) * 2 * start_seconds / max(1, worker_count)

    def look(self, now: float, *, has_changed: bool = False) -> None:
        """Has those in the line looked at in their order; not twice within a moment, unless something `has_changed`."""
        if not len(self._room.line) or self._in_turn or (now < self._look_at and not has_changed):
            return
        worker_count = max(1, sum(1 for _ in self._traffic.fleet.workers()))
        models = self._first_and_next(max(_LEAST_MODELS, _MOST_LOOKS // worker_count))
        self._look_at = now + _LOOK_SECONDS * max(1.0, len(models) * worker_count / _MOST_LOOKS)
        for model in models:
            self._in_turn = model
            self._outside.reconcile(model, now)
            self._in_turn = ""

    def _first_and_next(self, count: int) -> Sequence[str]:
        """Of a long line, its beginning, and of the others each in turn: what the first wait for may not be theirs."""
        models = self._room.line.models()
        if len(models) <= count:
            return models
        first_count = count // 2
        first, others = models[:first_count], models[first_count:]
        start = self._looks_from % len(others)
        self._looks_from = start + count - first_count
        return [*first, *[*others, *others][start : self._looks_from]]

    def capacity_changed(self, now: float) -> None:
        """A worker came, or a replica went: activations that wait look again, the line first."""
        self._looked.clear()
        self.look(now, has_changed=True)
        waiting = [
            model
            for model, one in self._activations.items()
            if one.state is ActivationState.WAITING and model not in self._room.line
        ]
        for model in self._room.start_order(waiting, now):
            self._outside.reconcile(model, now)

    def tick(self, model: str, now: float) -> None:
        """Follows the time for one model."""
        if model in self._activations:
            held_count = self._holds.count(model)
            replica = self._traffic.fleet.replica(self._activations[model].replica_id or "")
            patience_seconds = self._patience_seconds(replica) if replica is not None else None
            event = machine.Tick(patience_seconds, is_held=held_count > 0, progress=_progress(replica))
            self.handle(model, event, now, may_preempt=held_count > 0)

    def forget(self, model: str) -> None:
        """There is no such model any more."""
        self._activations.pop(model, None)
        self._looked.pop(model, None)
        self._room.line.leave(model)

    def gone(self, replica: Replica, event: machine.Gone, now: float) -> None:
        """A replica is gone; to be told before its activation is."""
        self._waking.discard(replica.replica_id)
        if event.is_refused:
            self._refusals.note(replica.worker_id, replica.model, event.message, now)

    def handle(self, model: str, event: machine.Event, now: float, *, may_preempt: bool) -> HeliosError | None:
        """Hands an event to a model's activation and carries out what it asks for; returns what holds were told."""
        error: HeliosError | None = None
        activation = self.of(model)
        todo = activation.handle(event, now)
        while todo:
            action = todo.pop(0)
            match action:
                case machine.Place():
                    answer = self._place(model, now, may_preempt=may_preempt)
                    todo += activation.handle(answer, now)
                case machine.FailHolds(reason, message, retry_after_seconds):
                    error = start_error(model, reason, message, retry_after_seconds)
                    # What waits for a replica that is busy, or for an adapter, does not wait for this start.
                    is_served = self._traffic.has_candidates(model)
                    held_count = 0 if is_served else self._fail_holds(model, error)
                    if held_count or not isinstance(event, machine.Demanded):
                        failed = actions.ActivationFailed(model, reason, message, held_count, retry_after_seconds)
                        self._outside.report(failed)
                case machine.Abandon(replica_id):
                    replica = self._traffic.fleet.replica(replica_id)
                    if replica is not None:
                        self._traffic.drain_asked(replica_id)
                        self._outside.send(replica.worker_id, StopReplica(replica_id))
                case machine.Measured(replica_id, seconds):
                    self._measured(model, replica_id, seconds, now)
        # Where the worker with that room is away for a moment, the places in the line are kept.
        if activation.state is not ActivationState.WAITING:
            self._room.line.leave(model)
        return error

    def wake(self, replica: Replica) -> str:
        """Has a sleeping replica woken; returns its id."""
        self._waking.add(replica.replica_id)
        entry, worker = self._catalogue.find(replica.model), self._traffic.fleet.worker(replica.worker_id)
        size = self._room.size_on(worker, entry) if entry is not None and worker is not None else None
        self._warmth.wake(replica, size.memory_bytes if size is not None else 0)
        held_count = self._holds.count(replica.model)
        asking = self._holds.first(replica.model)
        traceparent = asking.traceparent if asking is not None else ""
        begun = actions.ActivationBegun(
            replica.model, replica.replica_id, replica.worker_id, held_count, "wakes a sleeping replica", traceparent
        )
        self._outside.report(begun)
        return replica.replica_id

    def _patience_seconds(self, replica: Replica) -> float:
        """How long a start may get no further. Its worker knows better, and ends it sooner; this is for one that does
        not.
        """
        # Stopped in the middle, a compile would begin anew with the next start, and never come to its end.
        is_compiled = replica.form is Form.COMPILED
        seconds = self._compiled_seconds if is_compiled else self._policy.start_seconds
        return seconds + replica.memory_bytes / self._policy.least_bytes_per_second

    def is_asked_for(self, model: str) -> bool:
        """Whether a start is under way that somebody asked for, though they may have left."""
        activation = self._activations.get(model)
        if activation is None or activation.state is not ActivationState.STARTING:
            return False
        used_at = self._traffic.last_used_at(model)
        return used_at is not None and used_at >= activation.since

    def _measured(self, model: str, replica_id: str, seconds: float, now: float) -> None:
        used_at = self._traffic.last_used_at(model)
        if used_at is not None and used_at >= now - seconds:
            # Whoever was told to come again when it is ready comes from now on.
            self._traffic.use(model, now)
        # Waking says nothing of how long a start takes.
        if replica_id not in self._waking:
            self._estimates.record(model, seconds)
        self._waking.discard(replica_id)
        replica = self._traffic.fleet.replica(replica_id)
        phases = replica.phases if replica is not None else ()
        self._outside.report(actions.ActivationDone(model, replica_id, seconds, phases))

    def _place(self, model: str, now: float, *, may_preempt: bool) -> machine.Event:
        entry = self._catalogue.find(model)
        if entry is None:
            return machine.Refused("MODEL_NOT_FOUND", f"the model '{model}' was deleted", 1.0)
        if problem := self._problem(entry):
            return machine.Refused("INVALID_ENGINE_SETTINGS", problem, 1.0)
        sleeper = self._warmth.sleeper(entry)
        if sleeper is not None:
            self._asked(model, now)
            return self._ordered(self.wake(sleeper), now)
        refusals = self._refusals.by_worker(model, now)
        asked = [w for w in self._traffic.fleet.open_workers() if w.hello.worker_id not in refusals]
        workers = [c for w in asked for c in self._room.capacities(w, entry, now)]
        engine = self._starts.engine(needs_of(entry.engine_settings))
        plan = placement.place(engine, workers, may_preempt=may_preempt)
        if refusals and not isinstance(plan, placement.Placed | placement.Preempt):
            # They may have room in a moment, whatever the others lack for good.
            message = "; ".join(f"{worker_id} refused: {why}" for worker_id, why in sorted(refusals.items()))
            self._outside.report(actions.ActivationDelayed(model, "NO_CAPACITY", message))
            return machine.Delayed("NO_CAPACITY", "its workers refused to start it, and will be asked again")
        match plan:
            case placement.Placed() as placed:
                self._asked(model, now)
                return self._ordered(self._starts.begin(entry, placed), now)
            case placement.Preempt():
                return self._preempt(model, plan, now, may_preempt=may_preempt)
            case placement.Wait(reason, message, leaving):
                for replica_id in leaving:
                    self._hasten(replica_id, model, now)
                return self._delayed(model, reason, message, now, may_preempt=may_preempt)
            case placement.Impossible() if self._is_room_away(entry, engine, now, may_preempt=may_preempt):
                return self._delayed(model, "NO_WORKER", _AWAY, now, may_preempt=may_preempt)
            case placement.Impossible(reason, message):
                retry_after = self._estimates.expected_seconds(model, entry.weights_bytes)
                proposal = self._room.propose_moves(model, engine, workers, now)
                if proposal is not None:
                    self._outside.report(actions.ActivationDelayed(model, "FRAGMENTED", proposal.text))
                return machine.Refused(reason, message, max(1.0, retry_after))

    def _ordered(self, replica_id: str, now: float) -> machine.Placed:
        self._outside.ordered(replica_id, now)
        return machine.Placed(replica_id)

    def _is_room_away(self, entry: ModelEntry, engine: str, now: float, *, may_preempt: bool) -> bool:
        """Whether there is room, or may be some, on workers that are believed in and not heard of."""
        fleet = self._traffic.fleet
        away = [w for w in fleet.workers() if not w.is_reachable and w.hello.worker_id not in fleet.cordoned]
        capacities = [capacity for worker in away for capacity in self._room.capacities(worker, entry, now)]
        match placement.place(engine, capacities, may_preempt=may_preempt):
            case placement.Impossible() | placement.Wait("NO_WORKER"):
                return False
            case _:
                return True

    def _asked(self, model: str, now: float) -> None:
        """A start begins. What somebody asked for comes to its end, whether or not they wait for it: clients that try
        again after a minute would else never see a model whose start takes two.
        """
        if self._holds.count(model):
            self._traffic.use(model, now)

    def _problem(self, entry: ModelEntry) -> str:
        """Says, for people, why a model can't be started whatever room there is; empty where it can."""
        if entry.is_adapter:
            return (
                f"'{entry.name}' is a LoRA adapter, made for '{shown(entry.base_model)}': name it in a model's engine"
                f" settings (helios models set MODEL --set lora.adapters={entry.name}:{entry.name})"
            )
        missing = self._starts.missing_models(needs_of(entry.engine_settings))
        return f"its engine settings name the model '{min(missing)}', which does not exist" if missing else ""

    def preview(self, entry: ModelEntry, now: float) -> tuple[str, str]:
        """Says what a start by an operator would do, and does nothing.

        Returns the worker, empty where nothing is free yet, and for people why there or what it would wait for.

        Raises:
            InvalidRequest: INVALID_ENGINE_SETTINGS.
            Unavailable: NO_CAPACITY, NO_WORKER.
        """
        metadata = {"model": entry.name}
        if problem := self._problem(entry):
            raise InvalidRequest(problem, reason="INVALID_ENGINE_SETTINGS", metadata=metadata)
        sleeper = self._warmth.sleeper(entry)
        if sleeper is not None:
            return sleeper.worker_id, f"replica {sleeper.replica_id} sleeps there and would be woken"
        workers = [c for w in self._traffic.fleet.open_workers() for c in self._room.capacities(w, entry, now)]
        engine = self._starts.engine(needs_of(entry.engine_settings))
        match placement.place(engine, workers, may_preempt=True):
            case placement.Placed(worker_id, reason):
                return worker_id, reason
            case placement.Preempt(worker_id, replica_ids):
                return "", f"on {worker_id}, once {', '.join(replica_ids)} gave way"
            case placement.Impossible() if self._is_room_away(entry, engine, now, may_preempt=True):
                return "", _AWAY
            case placement.Wait("NO_WORKER" as reason, message) | placement.Impossible(reason, message):
                raise Unavailable(message, reason=reason, metadata=metadata)
            case placement.Wait(_, message):
                return "", message

    def _delayed(self, model: str, reason: str, message: str, now: float, *, may_preempt: bool) -> machine.Delayed:
        """Room or a worker is to come; whoever may take room from others joins the line."""
        if may_preempt and reason == "NO_CAPACITY":
            self._room.line.join(model, now)
        self._outside.report(actions.ActivationDelayed(model, reason, message))
        return machine.Delayed(reason, message)

    def _preempt(self, model: str, plan: placement.Preempt, now: float, *, may_preempt: bool) -> machine.Delayed:
        line = self._room.line
        if may_preempt and len(line) and self._in_turn != model:
            # Those who have waited longer are asked first.
            return self._delayed(model, "NO_CAPACITY", "other models wait for room, too", now, may_preempt=True)
        victims: list[str] = []
        for replica_id in plan.replica_ids:
            replica = self._traffic.fleet.replica(replica_id)
            assert replica is not None
            victims.append(f"{replica.model} ({self._why_goes(replica, now)})")
            entry = self._catalogue.find(replica.model)
            is_idle = self._traffic.is_idle(replica)
            if replica.state is ReplicaState.READY:
                # One that sleeps says nothing of the model's other replicas, which may be in use.
                self._traffic.forget_use(replica.model, now)
                if entry is not None:
                    self._warmth.keep_staged(entry, plan.worker_id)
            self._outside.drain(replica, now, None if is_idle else self._turns.drain_seconds)
        # Clients are told of the first; which models those are is for operators.
        message = "replicas of other models are draining to make room"
        detail = f"{message} on {plan.worker_id}: {', '.join(victims)}"
        delayed = self._delayed(model, "NO_CAPACITY", detail, now, may_preempt=may_preempt)
        line.claim(model, Claim(plan.worker_id, plan.device_ids, plan.share_bytes))
        return machine.Delayed(delayed.reason, message)

    def _hasten(self, replica_id: str, model: str, now: float) -> None:
        """Gives a replica that drains, but not for its room, as long as any other that a start waits for.

        One of the model itself, of a revision before, makes all of the model's requests wait.
        """
        replica = self._traffic.fleet.replica(replica_id)
        assert replica is not None
        self._room.leaves_soon(replica_id)
        self._outside.drain(replica, now, None if replica.model == model else self._turns.drain_seconds)

    def _why_goes(self, replica: Replica, now: float) -> str:
        if replica.is_spare:
            return "a compiled replica on its way"
        if not self._traffic.is_idle(replica):
            return f"in use for {now - (self._traffic.ready_since(replica.replica_id) or now):.0f} s, its turn is over"
        return f"unused for {now - (self._traffic.last_used_at(replica.model) or now):.0f} s"

    def _fail_holds(self, model: str, error: HeliosError) -> int:
        holds = self._holds.take_all(model)
        for hold in holds:
            self._outside.report(actions.Fail(hold, error))
        return len(holds) + self._holds.elsewhere_count(model)


def _progress(replica: Replica | None) -> tuple[int, ...]:
    """How far a start is: its stage, the phases that are over, the bytes that came."""
    if replica is None:
        return ()
    return replica.state.value, len(replica.phases), replica.fetch.done_bytes if replica.fetch is not None else 0
