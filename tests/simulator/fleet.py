"""The scalable driver: a whole fleet over virtual time, event by event, decided about by the proxy's own functions.

The proxy's core looks at every model once a second, and at every node for each start, which for 10,000 models on 1,000
nodes is hours of computing for a day. Here something is looked at only when it may be due, and what is looked at is
then decided by the functions that the core calls: how many replicas (`desired_replicas`, `LoadScaler`), when an idle
one goes (`idle_after`), where one starts and who gives way (`place`), how large it is (`replica_size`), which replica
takes a request (`score`, `pick`). `tests/simulator/test_core.py` runs the real core on the same small cases and demands
the same decisions at the same seconds.

Left out: compiled forms, failures, keys, prefixes, the express lane, bounds of holds, how often a long line of models
that wait for room is looked at.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import partial
from math import ceil, floor
from typing import Final

from helios.proxy.activation.estimate import StartEstimates
from helios.proxy.activation.turns import Claim
from helios.proxy.core import CorePolicy
from helios.proxy.fleet.state import Load as EngineLoad
from helios.proxy.placement.place import Placed, Preempt, Wait
from helios.proxy.routing.pick import pick
from helios.proxy.routing.table import score
from helios.proxy.scaling.desired import Desired, Usage, desired_replicas, idle_after
from helios.proxy.scaling.ladder import Rung
from helios.proxy.scaling.load import LoadSample, LoadScaler
from helios.proxy.sizing import replica_size
from helios.proxy.usage.advice import RUNGS
from helios.registry.client import Target
from tests.simulator.clock import Clock
from tests.simulator.expected import FORECAST_DELAY_SECONDS
from tests.simulator.giving_way import Turns
from tests.simulator.loads import HOUR, Load
from tests.simulator.nodes import ModelState, Nodes, Replica
from tests.simulator.outcome import Decision, Outcome
from tests.simulator.sleeping import Outside, Sleepers
from tests.simulator.staging import Staging
from tests.simulator.world import Hardware, Model, Stores, Tier

# What a request waited for that met no ready replica.
_STARTED: Final = 1
_WOKEN: Final = 2
# How long `helios.proxy.loads` waits where it found no room.
_NO_ROOM_SECONDS: Final = 10.0


class Fleet:
    """A run of one policy over one load. Call `run` once."""

    def __init__(
        self,
        policy: CorePolicy,
        hardware: Hardware,
        models: Sequence[Model],
        load: Load,
        *,
        node_count: int,
        targets: Sequence[Sequence[Target]] | None = None,
        is_settled: bool = True,
        keeps_decisions: bool = False,
    ) -> None:
        """Begins with no replica.

        Args:
            policy: The proxy's.
            hardware: Of each node.
            models: All models.
            load: What is asked for.
            node_count: How many nodes there are.
            targets: The registry's advice by hour, which is followed; None: there is none.
            is_settled: Nodes have on their disks and in memory what they would after the load's history; else nothing
                ran before, and the proxy knows nothing.
            keeps_decisions: Whether the outcome has all decisions.
        """
        self._policy = policy.lifecycle
        self._hardware = hardware
        self._load = load
        self._targets = targets
        self._keeps_decisions = keeps_decisions
        self._nodes = Nodes(hardware, node_count)
        self._stores = Stores(hardware, models, node_count)
        sizing = self._policy.sizing
        self._states = [
            ModelState(index, model, replica_size(model.entry, sizing, is_gpu=True).memory_bytes)
            for index, model in enumerate(models)
        ]
        self._by_name = {state.name: state for state in self._states}
        self._estimates = StartEstimates(
            base_seconds=self._policy.start_base_seconds, bytes_per_second=self._policy.start_bytes_per_second
        )
        self._clock = Clock()
        self._turns = Turns(self._policy.turns, self._policy.residency_seconds, self._estimates, load.times)
        self._staging = Staging(
            self._policy.warmth, hardware, self._states, nodes=self._nodes, stores=self._stores, note=self._note
        )
        self._sleepers = Sleepers(
            self._policy.warmth,
            self._policy.idle_seconds,
            hardware,
            clock=self._clock,
            nodes=self._nodes,
            stores=self._stores,
            staging=self._staging,
            outside=Outside(self._ready, self._drain, self._rebook, self._note),
        )
        self._replica_count = 0
        self._waiting: set[str] = set()
        self._is_looking = False
        self._watched: set[str] = set()
        self._activated: dict[str, None] = {}
        self._is_ticking = False
        self._judged_from = load.span.warm_up_hours * HOUR
        self._end = load.span.simulated_hours * HOUR
        count = len(load.times)
        self._first_token = array("d", [float("nan")]) * count
        self._cold = array("b", [0]) * count
        self._device_seconds = 0.0
        self._asleep_seconds = 0.0
        self._wake_count = 0
        self._starts = dict.fromkeys(Tier, 0)
        self._decisions: list[Decision] = []
        if is_settled:
            self._settle()

    @property
    def least_free_bytes(self) -> int:
        """The least that any device had free at any time."""
        return self._nodes.least_free_bytes

    def run(self) -> Outcome:
        """Plays the load to its end."""
        if self._targets is not None:
            for hour in range(self._load.span.simulated_hours):
                self._clock.at(hour * HOUR + FORECAST_DELAY_SECONDS, partial(self._advised, hour), is_round=True)
        times = self._load.times
        for index, time in enumerate(times):
            self._clock.run_until(time)
            self._arrive(index, time)
        self._clock.run_until(self._end)
        for node in self._nodes.all:
            for replica in node.replicas.values():
                self._count_time(replica, self._end)
        first = next((i for i, time in enumerate(times) if time >= self._judged_from), len(times))
        return Outcome(
            first_token_seconds=self._first_token[first:],
            cold=self._cold[first:],
            device_seconds=self._device_seconds,
            asleep_seconds=self._asleep_seconds,
            starts=self._starts,
            wake_count=self._wake_count,
            decisions=self._decisions,
        )

    def _settle(self) -> None:
        """Stages what was used last, as far as memory goes, and knows of all disks."""
        hours = self._load.hours[:, : self._load.span.history_hours]
        for state in self._states:
            used = hours[state.index].nonzero()[0]
            if len(used):
                state.fetched |= self._stores.disks(state.index)
                state.use((int(used[-1]) + 1 - hours.shape[1]) * HOUR)
        known = [state for state in self._states if state.last_used_at is not None]
        for state in sorted(known, key=lambda state: -(state.last_used_at or 0.0)):
            self._staging.settle(state)

    # Requests.
    def _arrive(self, index: int, now: float) -> None:
        state = self._states[self._load.models[index]]
        self._count(state, 1, now)
        ready = [replica for replica in state.standing if replica.is_ready]
        if ready and not state.held:
            self._send(index, self._pick(ready), now)
            return
        self._cold[index] = _STARTED
        state.held.append(index)
        self._demand(state, now)

    @staticmethod
    def _pick(ready: list[Replica]) -> Replica:
        if len(ready) == 1:
            return ready[0]
        candidates = tuple(
            score(str(place_of), "", EngineLoad(replica.running_count, len(replica.queue)), 0)
            for place_of, replica in enumerate(ready)
        )
        chosen = pick("", "", candidates)
        assert chosen is not None
        return ready[int(chosen.choices[0].replica_id)]

    def _send(self, index: int, replica: Replica, now: float) -> None:
        replica.state.use(now)
        if replica.running_count < self._hardware.running_count:
            self._run_request(index, replica, now)
        else:
            replica.queue.append(index)

    def _run_request(self, index: int, replica: Replica, now: float) -> None:
        load = self._load
        first, whole = replica.state.model.times(
            load.prompt_tokens[index], load.completion_tokens[index], replica.running_count
        )
        replica.running_count += 1
        self._first_token[index] = now + first - load.times[index] + self._hardware.edge_seconds
        self._clock.at(now + whole, lambda at: self._finished(replica, at))

    def _finished(self, replica: Replica, now: float) -> None:
        state = replica.state
        replica.running_count -= 1
        self._count(state, -1, now)
        if not replica.is_draining:
            state.use(now)
        if replica.queue:
            self._run_request(replica.queue.popleft(), replica, now)
        elif replica.is_draining and replica.is_idle:
            self._stop(replica, now)
        if not state.request_count:
            self._check_later(state, now)

    def _count(self, state: ModelState, change: int, now: float) -> None:
        state.request_count += change
        counts = state.counts
        counts.append((now, state.request_count))
        while counts[0][0] < now - self._policy.load.stable_seconds - 1.0 and len(counts) > 1:
            counts.popleft()
        if state.scaler is None and state.request_count > self._most_of_one:
            self._watch(state, now)

    @property
    def _most_of_one(self) -> float:
        """Requests at once up to which load never asks for a second replica, whatever they were before."""
        return self._hardware.running_count * self._policy.load.target_ratio

    # Starts.
    def _demand(self, state: ModelState, now: float) -> None:
        """Brings one up where there are too few; whoever waits in the line is looked at with the line."""
        is_missing = len(state.standing) < self._desired(state, now).start_below
        if is_missing:
            self._activated[state.name] = None
        if is_missing and state.name in self._turns.line and self._turns.in_turn is not state:
            self._turns.look(now, self._demand, self._by_name)
        elif is_missing and self._place(state, now):
            self._waiting.add(state.name)
            self._look_later(now)
        else:
            self._waiting.discard(state.name)
            self._turns.line.leave(state.name)

    def _place(self, state: ModelState, now: float) -> bool:
        """Wakes or starts a replica, or has others make room for it; returns whether it waits for that."""
        while (sleeper := self._sleepers.find(state)) is not None:
            if self._wake(sleeper, now):
                return False
        # Only what somebody waits for takes another model's memory.
        turns, line = self._turns, self._turns.line
        giving_way = (lambda node: turns.on(node, state, now)) if state.held else None
        match self._nodes.plan(state, line=line, giving_way=giving_way, is_another=False):
            case Placed(worker_id):
                self._start(state, self._nodes.named(worker_id).index, now)
                return False
            case Preempt() as plan:
                # Those who have waited longer are asked first.
                is_first = not len(line) or turns.in_turn is state
                line.join(state.name, now)
                if is_first:
                    self._preempt(plan, now)
                    line.claim(state.name, Claim(plan.worker_id, plan.device_ids, plan.share_bytes))
                return True
            case Wait():
                if state.held:
                    line.join(state.name, now)
                return True
            case _ if not state.held:
                return True
        for _ in range(len(state.held)):
            state.held.popleft()
            self._count(state, -1, now)
        return False

    def _preempt(self, plan: Preempt, now: float) -> None:
        for replica_id in plan.replica_ids:
            victim = self._nodes.named(plan.worker_id).replicas[int(replica_id)]
            if victim.is_ready:
                victim.state.last_used_at = None
                self._staging.keep(victim.state, victim.node, now)
            self._drain(victim, now)
            if victim.state.forecast_count:
                # It is to come back where there is room that nobody has.
                self._waiting.add(victim.state.name)

    def _look_later(self, now: float) -> None:
        """What waits is looked at in the core's next round, too."""
        if self._waiting and not self._is_looking:
            self._is_looking = True
            self._clock.at(floor(now) + 1.0, self._look_again, is_round=True)

    def _look_again(self, now: float) -> None:
        self._is_looking = False
        self._has_room(now)
        self._look_later(now)

    def _start(self, state: ModelState, node: int, now: float, *, is_for_load: bool = False) -> None:
        if not state.standing and not state.sleeping:
            state.observed_since = now
        if state.held or state.last_used_at is None:
            state.use(now)
        self._replica_count += 1
        replica = Replica(state, node, self._replica_count, now, is_for_load, counted_to=now)
        state.standing.append(replica)
        self._nodes.take(replica)
        self._sleepers.relieve_later(node, now)
        tier, seconds = self._stores.start(state.index, node, now)
        if now >= self._judged_from:
            self._starts[tier] += 1
        self._note(now, "start", state, node)
        self._clock.at(now + seconds, lambda at: self._started(replica, at))

    def _wake(self, replica: Replica, now: float, *, is_for_load: bool = False) -> bool:
        if replica.state.held:
            replica.state.use(now)
        if not self._sleepers.wake(replica, now):
            return False
        replica.is_for_load = is_for_load
        self._wake_count += now >= self._judged_from
        return True

    def _started(self, replica: Replica, now: float) -> None:
        if replica.is_draining:
            return
        replica.ready_at = now
        replica.state.fetched.add(replica.node)
        if not replica.is_for_load:
            self._estimates.record(replica.state.name, now - replica.ordered_at)
        self._ready(replica, now)

    def _ready(self, replica: Replica, now: float) -> None:
        """A replica was started, or woken."""
        state = replica.state
        while state.held:
            index = state.held.popleft()
            self._cold[index] = _WOKEN if replica.wake_count else _STARTED
            self._send(index, self._pick([one for one in state.standing if one.is_ready]), now)
        if not state.request_count:
            self._check_later(state, now)

    # Stops.
    def _put_down(self, replica: Replica, now: float, *, is_last: bool) -> None:
        if self._sleepers.may_sleep(replica):
            self._count_time(replica, now)
            self._sleepers.sleep(replica, now)
            return
        if is_last and replica.is_ready:
            self._staging.keep(replica.state, replica.node, now)
        self._drain(replica, now)

    def _drain(self, replica: Replica, now: float) -> None:
        replica.is_draining = True
        homes = replica.state.standing if replica.asleep_at is None else replica.state.sleeping
        homes.remove(replica)
        self._note(now, "drain", replica.state, replica.node)
        if replica.is_idle:
            self._stop(replica, now)

    def _stop(self, replica: Replica, now: float) -> None:
        self._clock.at(now + self._hardware.stop_seconds, lambda at: self._gone(replica, at))

    def _gone(self, replica: Replica, now: float) -> None:
        self._count_time(replica, now)
        self._nodes.give_back(replica)
        self._sleepers.look_again()
        self._has_room(now)

    def _has_room(self, now: float) -> None:
        self._turns.look(now, self._demand, self._by_name)
        for name in sorted(self._waiting):
            if name not in self._turns.line:
                self._demand(self._by_name[name], now)

    def _rebook(self, replica: Replica, size_bytes: int, now: float) -> bool:
        self._count_time(replica, now)
        return self._nodes.rebook(replica, size_bytes)

    def _count_time(self, replica: Replica, now: float) -> None:
        seconds = max(0.0, min(now, self._end) - max(replica.counted_to, self._judged_from))
        booked = seconds * replica.booked_bytes / self._hardware.device_bytes
        replica.counted_to = now
        self._device_seconds += booked
        if replica.asleep_at is not None:
            self._asleep_seconds += booked

    def _check_later(self, state: ModelState, now: float) -> None:
        """Looks whether a model is idle at the first second at which it may be."""
        used_at = state.last_used_at
        due = ceil(now if used_at is None else max(now, used_at + self._idle_seconds(state)))
        if state.check_at is None or due < state.check_at:
            state.check_at = due
            self._clock.at(due, partial(self._check, state, due), is_round=True)

    def _check(self, state: ModelState, due: float | None, now: float) -> None:
        if state.check_at != due:
            return
        state.check_at = None
        if state.request_count or not state.standing or state.forecast_count:
            return
        if self._desired(state, now).drain_above:
            self._check_later(state, now)
        else:
            self._bring_down(state, now)

    def _bring_down(self, state: ModelState, now: float) -> None:
        for replica in sorted(state.standing, key=lambda replica: (replica.is_ready, replica.number)):
            self._put_down(replica, now, is_last=True)

    def _idle_seconds(self, state: ModelState) -> float:
        return idle_after(self._policy.idle_seconds, state.advised_idle_seconds)

    def _desired(self, state: ModelState, now: float) -> Desired:
        usage = Usage(
            held_count=len(state.held),
            in_flight_count=sum(not replica.is_idle for replica in state.standing),
            last_used_at=state.last_used_at,
            is_failing=False,
            load_count=state.scaler.decision.count if state.scaler is not None else 1,
            forecast_count=state.forecast_count,
        )
        return desired_replicas(
            min_replicas=0, max_replicas=0, usage=usage, idle_seconds=self._idle_seconds(state), now=now
        )

    # Advice.
    def _advised(self, hour: int, now: float) -> None:
        """New targets came; what the proxy makes of them within a second."""
        assert self._targets is not None
        targets = {target.model: target for target in self._targets[hour]}
        for state in self._states:
            target = targets.get(state.name)
            if state.floor is Rung.READY:
                # The core saw the promise last in the round before.
                state.promised_at = now - 1.0
            state.floor = RUNGS[target.rung] if target is not None else Rung.DISK
            state.forecast_count = target.replica_count if target is not None and state.floor is Rung.READY else 0
            state.advised_idle_seconds = target.idle_seconds if target is not None else None
            if state.forecast_count > 1 or len(state.standing) > 1:
                self._watch(state, now)
            if state.standing and not state.request_count:
                state.check_at = None
                self._check(state, None, now)
            self._sleepers.cool_later(state, now)
        # Models that had a start before come first, as in the core's round.
        for name in dict.fromkeys([*self._activated, *targets]):
            target = targets.get(name)
            if target is not None and RUNGS[target.rung] >= Rung.STAGED:
                self._warm(self._by_name[name], now)

    def _warm(self, state: ModelState, now: float) -> None:
        if state.forecast_count:
            self._demand(state, now)
        if state.held:
            # The core looks again in its next round.
            self._clock.at(floor(now) + 1.0, partial(self._stage_spare, state), is_round=True)
        else:
            self._stage_spare(state, now)

    def _stage_spare(self, state: ModelState, now: float) -> None:
        if not state.standing and not state.sleeping and not state.staged:
            self._staging.stage_spare(state, now)

    # Load.
    def _watch(self, state: ModelState, now: float) -> None:
        self._watched.add(state.name)
        if not self._is_ticking:
            self._is_ticking = True
            self._clock.at(floor(now) + 1.0, self._tick, is_round=True)

    def _tick(self, now: float) -> None:
        self._is_ticking = False
        for name in sorted(self._watched):
            self._look(self._by_name[name], now)
        for name in list(self._watched)[:1]:
            self._watch(self._by_name[name], now)

    def _look(self, state: ModelState, now: float) -> None:
        """Has as many replicas as load and forecast ask for."""
        if not state.standing and not state.sleeping:
            state.scaler = None
            self._watched.discard(state.name)
            return
        ready = sum(replica.is_ready for replica in state.standing)
        if state.scaler is None:
            state.scaler = self._scaler(state, ready, now)
        decision = state.scaler.observe(self._sample(state.request_count, ready), now)
        desired = self._desired(state, now)
        if len(state.standing) > desired.drain_above:
            self._drain_surplus(state, len(state.standing) - desired.drain_above, now)
        is_asked = (state.forecast_count > 1 or decision.asked > 1) and not state.is_activating()
        if is_asked and not self._waiting and now >= state.roomless_until:
            wanted = min(max(decision.asked, state.forecast_count), self._desired(state, now).drain_above)
            for _ in range(wanted - len(state.standing)):
                self._start_another(state, now)
        is_calm = decision.count == 1 and all(count <= self._most_of_one for _, count in state.counts)
        if is_calm and state.forecast_count < 2 and len(state.standing) < 2:
            state.scaler = None
            self._watched.discard(state.name)
            if not state.request_count:
                self._check_later(state, now)

    def _scaler(self, state: ModelState, ready: int, now: float) -> LoadScaler:
        """A scaler that saw the last minute: as long as it asked for one replica, nobody looked."""
        policy = self._policy.load
        scaler = LoadScaler(policy, 1, now - policy.stable_seconds)
        for second in range(int(policy.stable_seconds), 0, -1):
            if now - second >= state.observed_since:
                scaler.observe(self._sample(_count_at(state, now - second), ready), now - second)
        return scaler

    def _drain_surplus(self, state: ModelState, count: int, now: float) -> None:
        """What is not ready yet goes first, then what has least to do, as `Lifecycle` says it."""
        order = sorted(state.standing, key=lambda r: (r.is_ready, r.running_count + len(r.queue), r.number))
        for replica in order[:count]:
            self._put_down(replica, now, is_last=count == len(order))

    def _start_another(self, state: ModelState, now: float) -> None:
        if (sleeper := self._sleepers.find(state)) is not None:
            self._wake(sleeper, now, is_for_load=True)
            return
        plan = self._nodes.plan(state, line=self._turns.line, giving_way=None, is_another=True)
        if isinstance(plan, Placed):
            self._start(state, self._nodes.named(plan.worker_id).index, now, is_for_load=True)
        else:
            state.roomless_until = now + _NO_ROOM_SECONDS

    def _sample(self, request_count: int, ready: int) -> LoadSample:
        return LoadSample(request_count, 0, 0.0, ready, self._hardware.running_count)

    def _note(self, now: float, what: str, state: ModelState, node: int) -> None:
        if self._keeps_decisions:
            self._decisions.append(Decision(round(float(now), 6), what, state.name, self._nodes.all[node].name))


def _count_at(state: ModelState, at: float) -> int:
    """Requests of a model at a moment of the last minute."""
    found = 0
    for time, count in state.counts:
        if time > at:
            break
        found = count
    return found
