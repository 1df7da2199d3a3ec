"""Models whose load asks for more replicas than they have. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from helios.proxy import actions
from helios.proxy.catalogue import ModelEntry
from helios.proxy.engine_needs import needs_of
from helios.proxy.fleet.state import Replica
from helios.proxy.holds import Holds
from helios.proxy.scaling.load import LoadPolicy, LoadSample, LoadScaler, ScalingMode
from helios.proxy.traffic import Traffic

# What an engine runs at once where its settings don't say (ReplicaSpec).
_RUNNING_REQUESTS: Final = 64
_MOST_DECISIONS: Final = 1000


@dataclass(frozen=True, slots=True)
class Scaled:
    """A decision: at `at` (monotonic seconds), from one number of replicas to another, and why."""

    at: float
    model: str
    from_count: int
    to_count: int
    reason: str
    is_advice: bool


class Loads:
    """What the loads of all models ask for, and what was decided by it, the newest last."""

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
        self.decisions: deque[Scaled] = deque(maxlen=_MOST_DECISIONS)

    def count(self, model: str) -> int:
        """How many replicas a model's load asks for; 1 where it is not to be asked."""
        scaler = self._scalers.get(model)
        return scaler.decision.count if scaler is not None and self._policy.mode is ScalingMode.ON else 1

    def observe(self, entry: ModelEntry, now: float) -> None:
        """Takes in a model's load; once a second."""
        replicas = [r for r in self._traffic.fleet.replicas_of(entry.name) if not self._traffic.is_draining(r)]
        ready = [replica for replica in replicas if self._traffic.is_candidate(replica.replica_id)]
        if self._policy.mode is ScalingMode.OFF or not replicas:
            self._scalers.pop(entry.name, None)
            return
        scaler = self._scalers.setdefault(entry.name, LoadScaler(self._policy))
        before = scaler.decision.count
        decision = scaler.observe(self._sample(entry, ready), now)
        if decision.count != before:
            is_advice = self._policy.mode is ScalingMode.ADVISE
            scaled = Scaled(now, entry.name, before, decision.count, decision.reason, is_advice)
            self.decisions.append(scaled)
            self._report(actions.LoadScaled(entry.name, before, decision.count, decision.reason, is_advice=is_advice))

    def follow(self, entry: ModelEntry, standing: Sequence[Replica], wanted_count: int, now: float) -> None:
        """Has one more replica started where more are wanted, and none is on its way."""
        if len(standing) < wanted_count and standing and not any(r.state.is_starting for r in standing):
            self._begin(entry, now)

    def keep_only(self, models: Iterable[str]) -> None:
        """Forgets the loads of all other models."""
        for model in self._scalers.keys() - set(models):
            del self._scalers[model]

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
