"""The circuit breaker of each replica.

It lives here and not in Envoy because Envoy's override_host balancer also sends to hosts that outlier detection has
ejected. It opens after consecutive failures, so that one failure among many good answers never takes a replica away.

| state | event | next |
|---|---|---|
| CLOSED | failure, the n-th in a row; trip (it is an outlier) | OPEN until now + open_seconds |
| CLOSED | success | CLOSED, count 0 |
| OPEN | tick at or after its end | HALF_OPEN |
| HALF_OPEN | picked | PROBING until now + probe_seconds: no further pick |
| HALF_OPEN, PROBING | success | CLOSED |
| any | reset, by an operator | CLOSED, count 0 |
| HALF_OPEN, PROBING | failure | OPEN, for twice as long as before, at most max_open_seconds |
| PROBING | tick at or after its end (nothing came back) | HALF_OPEN |

Pure.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class BreakerState(enum.Enum):
    """Whether a replica may be picked."""

    CLOSED = 1
    OPEN = 2
    HALF_OPEN = 3
    PROBING = 4


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens and for how long.

    Attributes:
        failure_count: failures in a row that open it.
        open_seconds: how long it is open the first time.
        max_open_seconds: bound of the doubling.
        probe_seconds: how long a probe may take before another is allowed.
    """

    failure_count: int = 3
    open_seconds: float = 2.0
    max_open_seconds: float = 30.0
    probe_seconds: float = 30.0


@dataclass(slots=True)
class _Circuit:
    state: BreakerState = BreakerState.CLOSED
    failure_count: int = 0
    open_seconds: float = 0.0
    until: float = 0.0


class Breakers:
    """One circuit a replica that ever failed; a replica without one is closed."""

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._circuits: dict[str, _Circuit] = {}
        self._changes: list[tuple[str, bool]] = []

    def take_changes(self) -> list[tuple[str, bool]]:
        """Circuits that opened (True) or closed since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes

    def allows(self, replica_id: str) -> bool:
        """Whether the replica may be picked now."""
        circuit = self._circuits.get(replica_id)
        return circuit is None or circuit.state in (BreakerState.CLOSED, BreakerState.HALF_OPEN)

    def state(self, replica_id: str) -> BreakerState:
        """The replica's circuit."""
        circuit = self._circuits.get(replica_id)
        return circuit.state if circuit is not None else BreakerState.CLOSED

    def picked(self, replica_id: str, now: float) -> bool:
        """Notes a pick; True where it was the one probe of a half-open circuit, so that eligibility changed."""
        circuit = self._circuits.get(replica_id)
        if circuit is None or circuit.state is not BreakerState.HALF_OPEN:
            return False
        circuit.state = BreakerState.PROBING
        circuit.until = now + self._policy.probe_seconds
        return True

    def succeeded(self, replica_id: str) -> bool:
        """Notes a good answer; True where the circuit closed by it.

        An open circuit stays open: answers that were on their way when it opened say nothing of later requests.
        """
        circuit = self._circuits.get(replica_id)
        if circuit is None or circuit.state is BreakerState.OPEN:
            return False
        return self.reset(replica_id)

    def reset(self, replica_id: str) -> bool:
        """Closes a circuit, and forgets the failures of a closed one; True where it was not closed."""
        circuit = self._circuits.pop(replica_id, None)
        if circuit is None or circuit.state is BreakerState.CLOSED:
            return False
        self._changes.append((replica_id, False))
        return True

    def failed(self, replica_id: str, now: float) -> bool:
        """Notes a failure of the replica's own; True where the circuit opened by it."""
        circuit = self._circuits.setdefault(replica_id, _Circuit())
        if circuit.state is BreakerState.OPEN:
            return False
        circuit.failure_count += 1
        if circuit.state is BreakerState.CLOSED and circuit.failure_count < self._policy.failure_count:
            return False
        self._open(replica_id, circuit, now)
        return True

    def trip(self, replica_id: str, now: float) -> None:
        """Opens a closed circuit whose failures were not in a row."""
        circuit = self._circuits.setdefault(replica_id, _Circuit())
        if circuit.state is BreakerState.CLOSED:
            self._open(replica_id, circuit, now)

    def _open(self, replica_id: str, circuit: _Circuit, now: float) -> None:
        if circuit.state is BreakerState.CLOSED:
            self._changes.append((replica_id, True))
        longer = min(max(self._policy.open_seconds, circuit.open_seconds * 2), self._policy.max_open_seconds)
        circuit.state, circuit.open_seconds, circuit.until = BreakerState.OPEN, longer, now + longer

    def tick(self, now: float) -> list[str]:
        """Replicas whose circuit is half-open now because a time is over."""
        changed: list[str] = []
        for replica_id, circuit in self._circuits.items():
            if circuit.state in (BreakerState.OPEN, BreakerState.PROBING) and now >= circuit.until:
                circuit.state = BreakerState.HALF_OPEN
                changed.append(replica_id)
        return changed

    def forget(self, replica_id: str) -> None:
        """Drops the circuit of a replica that is gone."""
        self._circuits.pop(replica_id, None)
