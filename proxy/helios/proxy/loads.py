"""Models whose load asks for more replicas than they have. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from helios.proxy import actions
from helios.proxy.activation.machine import Gone
from helios.proxy.catalogue import ModelEntry
from helios.proxy.engine_needs import needs_of
from helios.proxy.fleet.state import Replica
from helios.proxy.holds import Holds
from helios.proxy.scaling.decisions import Cause, Scaled
from helios.proxy.scaling.load import LoadPolicy, LoadSample, LoadScaler, ScalingMode
from helios.proxy.traffic import Traffic

# What an engine runs at once where its settings don't say (ReplicaSpec).
_RUNNING_REQUESTS: Final = 64
# Looking for room looks at every worker. Room comes and goes with starts, so that seconds are soon enough.
_NO_ROOM_SECONDS: Final = 10.0
# After a first start for load that failed, doubling.
_FAILED_SECONDS: Final = 10.0
_MOST_FAILED_SECONDS: Final = 600.0


@dataclass(slots=True)
class _Starts:
    """Starts for one model's load: those under way, and when the next one may be tried."""

    under_way: dict[str, float] = field(default_factory=dict)
    """When each was ordered."""
    failure_count: int = 0
    pause_until: float = 0.0
    roomless_until: float = 0.0


class Loads:
    """What the loads of all models ask for, and the starts for that.

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
        decide: Callable[[Scaled], None],
        report: Callable[[actions.Action], None],
    ) -> None:
        """``begin`` orders one more replica where there is room that nobody has, and returns its id or nothing.

        ``decide`` takes down what is decided, ``report`` how starts end.
        """
        self._policy = policy
        self._traffic = traffic
        self._holds = holds
        self._begin = begin
        self._decide = decide
        self._report = report
        self._scalers: dict[str, LoadScaler] = {}
        self._starts: dict[str, _Starts] = {}

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
            self._forget(entry.name, now)
            return
        scaler = self._scaler(entry.name, ready, now)
        before = scaler.decision.count
        decision = scaler.observe(self._sample(entry, ready), now)
        if decision.count != before:
            self._scaled(entry.name, before, decision.count, decision.reason, now)

    def asks_for_more(self, model: str) -> bool:
        """Whether a model's load asks for more replicas than one now."""
        scaler = self._scalers.get(model)
        return scaler is not None and scaler.decision.asked > 1

    def follow(self, entry: ModelEntry, standing: Sequence[Replica], most: int, floor: int, now: float) -> None:
        """Has those started that load, or the forecast (`floor`), asks for now and are not there, up to `most`.

        All at once: those that are on their way are counted, and a model that was promoted under load needs as many as
        the revision before it had.
        """
        scaler = self._scalers.get(entry.name)
        asked = max(scaler.decision.asked if scaler is not None else 1, floor)
        missing_count = min(asked, most) - len(standing)
        if not standing or missing_count < 1:
            return
        starts = self._starts.setdefault(entry.name, _Starts())
        if now < max(starts.pause_until, starts.roomless_until):
            return
        # One that could not be woken is asleep again, and on its way no more.
        starting = {replica.replica_id for replica in standing if replica.state.is_starting}
        starts.under_way = {key: at for key, at in starts.under_way.items() if key in starting}
        for _ in range(missing_count):
            replica_id = self._begin(entry, now)
            if not replica_id:
                starts.roomless_until = now + _NO_ROOM_SECONDS
                break
            starts.under_way[replica_id] = now

    def capacity_changed(self) -> None:
        """A worker came, or a replica went: what found no room looks again."""
        for starts in self._starts.values():
            starts.roomless_until = 0.0

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

    def keep_only(self, models: Iterable[str], now: float) -> None:
        """Forgets the loads of all other models."""
        for model in self._scalers.keys() - set(models):
            self._forget(model, now)

    def _forget(self, model: str, now: float) -> None:
        scaler = self._scalers.pop(model, None)
        self._starts.pop(model, None)
        if scaler is not None and scaler.decision.count > 1:
            self._scaled(model, scaler.decision.count, 1, "it has no replica", now)

    def _scaled(self, model: str, before: int, count: int, reason: str, now: float) -> None:
        is_advice = self._policy.mode is ScalingMode.ADVISE
        self._decide(Scaled(now, model, before, count, reason, is_advice, Cause.LOAD))

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
            running_count=running,
            device_busy_ratio=self._device_busy_ratio(ready) if self._policy.device_target_ratio else 0.0,
        )

    def _device_busy_ratio(self, ready: Sequence[Replica]) -> float:
        """The mean over replicas of their busiest devices: a gang runs at the pace of its slowest member."""
        ratios: list[float] = []
        for replica in ready:
            worker = self._traffic.fleet.worker(replica.worker_id)
            devices = worker.devices if worker is not None else {}
            ratios.append(max((devices[key].busy_ratio for key in replica.device_ids if key in devices), default=0.0))
        return sum(ratios) / max(1, len(ratios))
