"""What workers say of leaders that this proxy has heard of from nobody else. Pure; times are monotonic seconds.

A worker repeats what proxies have told it, so it may know of a leader before this proxy does, or of one that a registry
forgot which was restored from a copy. It may also lie. So the registry is asked, and where it knows of no such leader,
a claim counts only if most workers make it: a leader that ordered anything has told all of its epoch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

_MOST_EPOCH: Final = 1 << 40
"""No registry has granted so many leases (one a second for 35,000 years): whoever says so is not asked about."""
_IGNORED_SECONDS: Final = 60.0
"""For how long a worker's claims are not looked into after one that was not true. Looking into one takes an exchange
with the registry, in which nothing is ordered."""


class Claims:
    """The highest epoch that each worker claims."""

    def __init__(self) -> None:
        self._epochs: dict[str, int] = {}
        self._ignored_until: dict[str, float] = {}

    def note(self, worker_id: str, epoch: int) -> bool:
        """A worker has heard of this epoch, it says; returns whether that can be."""
        is_possible = 0 < epoch < _MOST_EPOCH
        if is_possible:
            self._epochs[worker_id] = epoch
        return is_possible

    def keep_only(self, worker_ids: Collection[str], now: float) -> None:
        """Forgets workers that are gone, and what is over."""
        self._epochs = {key: epoch for key, epoch in self._epochs.items() if key in worker_ids}
        self._ignored_until = {key: until for key, until in self._ignored_until.items() if until > now}

    def counts(self, worker_id: str, now: float) -> bool:
        """Whether what a worker says is worth asking the registry."""
        return now >= self._ignored_until.get(worker_id, 0.0)

    def believed(self, worker_ids: Collection[str]) -> int:
        """The highest epoch that more than half of these workers have heard of, or of a higher one; 0: none."""
        told = sorted((self._epochs.get(worker_id, 0) for worker_id in worker_ids), reverse=True)
        return told[len(told) // 2] if told else 0

    def refute(self, epoch: int, doubter: str, now: float) -> None:
        """The registry knows of no epoch above this one: who claimed one is wrong, and so is the doubter, for which it
        was asked: that one may have refused an order and claimed none.
        """
        wrong = {worker_id for worker_id, claimed in self._epochs.items() if claimed > epoch}
        self._epochs = {key: claimed for key, claimed in self._epochs.items() if key not in wrong}
        self._ignored_until |= dict.fromkeys({*wrong, doubter}, now + _IGNORED_SECONDS)
