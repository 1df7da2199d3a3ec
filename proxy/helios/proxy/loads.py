"""Models whose load asks for more replicas than they have. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from helios.proxy import actions
from helios.proxy.activation.machine import Gone
from helios.proxy.catalogue import ModelEntry
from helios.proxy.engine_needs import needs_of
from helios.proxy.fleet.state import Replica
from helios.proxy.holds import Holds
from helios.proxy.scaling.load import LoadPolicy, LoadSample, LoadScaler, ScalingMode
from helios.proxy.traffic import Traffic

# What an engine runs at once where its settings don't say (ReplicaSpec).
_RUNNING_REQUESTS: Final = 64
_MOST_DECISIONS: Final = 1000
# Looking for room looks at every worker. Room comes and goes with starts, so that seconds are soon enough.
_NO_ROOM_SECONDS: Final = 10.0
# After a first start for load that failed, doubling.
_FAILED_SECONDS: Final = 10.0
_MOST_FAILED_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Scaled:
    """A decision: at `at` (monotonic seconds), from one number of replicas to another, and why."""

    at: float
    model: str
    from_count: int
    to_count: int
    reason: str
    is_advice: bool


@dataclass(slots=True)
class _Starts:
    """Starts for one model's load: those under way, and when the next one may be tried."""

    under_way: dict[str, float] = field(default_factory=dict)
    """When each was ordered."""
    failure_count: int = 0
    pause_until: float = 0.0


class Loads:
    """What the loads of all models ask for, and what was decided by it, the newest last.

    A start for load is nobody's activation: nobody waits for it, so its failure fails no request, and is followed by a
    pause that doubles.
    """

    def __init__(
        self,
        policy: LoadPolicy,
        *,
        traffic: Traffic,
        holds: Holds,
        begin: Callable[[ModelEntry, float], str],
        report: Callable[[actions.Action], None],
    ) -> None:
        """``begin`` orders one more replica where there is room that nobody has, and returns its id or nothing."""
        self._policy = policy
        self._traffic = traffic
        self._holds = holds
        self._begin = begin
        self._report = report
        self._scalers: dict[str, LoadScaler] = {}
        self._starts: dict[str, _Starts] = {}
        self.decisions: deque[Scaled] = deque(maxlen=_MOST_DECISIONS)

    def count(self, model: str, standing: Sequence[Replica], now: float) -> int:
        """How many replicas a model's load asks for; 1 where it is not to be asked.

        Of a model that was never looked at, as many as there are: another proxy may have started them a moment ago.
        Where a model has replicas of both forms, one is about to take the other's place.
        """
        if self._policy.mode is not ScalingMode.ON:
            return 1
        return self._scaler(model, standing, now).decision.count if standing or model in self._scalers else 1

    def _scaler(self, model: str, standing: Sequence[Replica], now: float) -> LoadScaler:
        scaler = self._scalers.get(model)
        if scaler is None:
            by_form = Counter(replica.form for replica in standing)
            scaler = self._scalers[model] = LoadScaler(self._policy, max(by_form.values(), default=1), now)
        return scaler

    def is_starting(self, replica: Replica) -> bool:
        """Whether a replica is on its way for load alone."""
        starts = self._starts.get(replica.model)
        return starts is not None and replica.replica_id in starts.under_way

    def observe(self, entry: ModelEntry, now: float) -> None:
        """Takes in a model's load; once a second."""
        replicas = self._traffic.staying(entry.name)
        ready = [replica for replica in replicas if self._traffic.is_candidate(replica.replica_id)]
        if self._policy.mode is ScalingMode.OFF or not replicas:
            self._forget(entry.name)
            return
        scaler = self._scaler(entry.name, ready, now)
        before = scaler.decision.count
        decision = scaler.observe(self._sample(entry, ready), now)
        if decision.count != before:
            is_advice = self._policy.mode is ScalingMode.ADVISE
            scaled = Scaled(now, entry.name, before, decision.count, decision.reason, is_advice)
            self.decisions.append(scaled)
            self._report(actions.LoadScaled(entry.name, before, decision.count, decision.reason, is_advice=is_advice))

    def follow(self, entry: ModelEntry, standing: Sequence[Replica], most: int, now: float) -> None:
        """Has one more replica started where load asks for more now, up to `most`, and none is on its way."""
        scaler = self._scalers.get(entry.name)
        if scaler is None or not standing or len(standing) >= min(scaler.decision.asked, most):
            return
        starts = self._starts.setdefault(entry.name, _Starts())
        if now < starts.pause_until or any(replica.state.is_starting for replica in standing):
            return
        # One that could not be woken is asleep again, and on its way no more.
        starts.under_way.clear()
        replica_id = self._begin(entry, now)
        if replica_id:
            starts.under_way[replica_id] = now
        else:
            starts.pause_until = now + _NO_ROOM_SECONDS

    def ready(self, replica: Replica, now: float) -> None:
        """A replica is ready."""
        if self.is_starting(replica):
            starts = self._starts[replica.model]
            seconds = now - starts.under_way.pop(replica.replica_id)
            starts.failure_count = 0
            self._report(actions.ActivationDone(replica.model, replica.replica_id, seconds, replica.phases))

    def stopped(self, replica: Replica) -> None:
        """A replica is stopped on purpose, which is no failure."""
        if self.is_starting(replica):
            del self._starts[replica.model].under_way[replica.replica_id]

    def gone(self, replica: Replica, event: Gone, now: float) -> None:
        """A replica is gone; one that was not ready has failed."""
        if not self.is_starting(replica):
            return
        starts = self._starts[replica.model]
        del starts.under_way[replica.replica_id]
        self._report(actions.ActivationFailed(replica.model, event.reason, event.message, 0))
        starts.pause_until = now + min(_FAILED_SECONDS * 2.0**starts.failure_count, _MOST_FAILED_SECONDS)
        starts.failure_count = min(starts.failure_count + 1, 30)

    def keep_only(self, models: Iterable[str]) -> None:
        """Forgets the loads of all other models."""
        for model in self._scalers.keys() - set(models):
            self._forget(model)

    def _forget(self, model: str) -> None:
        scaler = self._scalers.pop(model, None)
        self._starts.pop(model, None)
        if scaler is not None and scaler.decision.count > 1:
            is_advice = self._policy.mode is ScalingMode.ADVISE
            self._report(actions.LoadScaled(model, scaler.decision.count, 1, "it has no replica", is_advice=is_advice))

    def _sample(self, entry: ModelEntry, ready: Sequence[Replica]) -> LoadSample:
        loads = [replica.load for replica in ready]
        reserved = sum(self._traffic.ledger.reserved_count(replica.replica_id) for replica in ready)
        waiting = sum(load.waiting_count for load in loads)
        running = sum(load.running_count for load in loads)
        return LoadSample(
            request_count=running + waiting + reserved + self._holds.count(entry.name),
            waiting_count=waiting,
            kv_usage_ratio=sum(load.kv_usage_ratio for load in loads) / max(1, len(loads)),
            replica_count=len(ready),
            replica_capacity=needs_of(entry.engine_settings).max_running_requests or _RUNNING_REQUESTS,
        )
