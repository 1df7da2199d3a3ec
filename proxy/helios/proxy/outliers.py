"""Which replica fails while its neighbours don't. Pure.

The breaker opens after failures in a row, which a replica that fails every second time never has. Here each replica's
share of failures is followed, exponentially weighted, and one that fails much more often than the others of its model
is an outlier. A model all of whose replicas fail has none: that is the model's fault, or its requests', and taking
replicas away would only make it slower to fail.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# About the last twenty requests count.
_WEIGHT = 0.1
# Below it, a share is as good as none and is forgotten.
_NOTHING = 0.01


@dataclass(frozen=True, slots=True)
class OutlierPolicy:
    """When a replica is an outlier.

    Attributes:
        ratio: share of its last requests that failed, from which on it may be one; 0: never.
        times: how many times the mean share of its neighbours that must be.
    """

    ratio: float = 0.3
    times: float = 3.0


class Outliers:
    """The share of failures of each replica that has any."""

    def __init__(self, policy: OutlierPolicy) -> None:
        self._policy = policy
        self._shares: dict[str, float] = {}

    def note(self, replica_id: str, *, is_failure: bool) -> None:
        """Takes in how a request ended."""
        share = self._shares.get(replica_id)
        if share is None and not is_failure:
            return
        share = (share or 0.0) * (1 - _WEIGHT) + _WEIGHT * is_failure
        if share < _NOTHING:
            del self._shares[replica_id]
        else:
            self._shares[replica_id] = share

    def share(self, replica_id: str) -> float:
        """The share of failures, 0 to 1."""
        return self._shares.get(replica_id, 0.0)

    def is_outlier(self, replica_id: str, neighbours: Iterable[str]) -> bool:
        """Whether it fails much more often than the other replicas that take its model's requests."""
        own = self.share(replica_id)
        if not self._policy.ratio or own < self._policy.ratio:
            return False
        others = [self.share(other) for other in neighbours if other != replica_id]
        return bool(others) and own >= self._policy.times * sum(others) / len(others)

    def forget(self, replica_id: str) -> None:
        """Drops a replica that is gone, or is tried anew."""
        self._shares.pop(replica_id, None)
