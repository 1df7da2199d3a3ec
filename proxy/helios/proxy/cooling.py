"""Brings models down the ladder that nobody uses, and keeps those up of which something is expected.

From ready to asleep is `lifecycle`'s, which knows how many replicas are wanted; from there on this is it: a replica
that has slept for long enough stops and leaves its weights in memory, and weights that have lain there for long enough
are given back. What a forecast expects is staged where memory is free. Sleepers take slots: where they would take a
worker's last ones, the one that was used longest ago stops early, since models would else start far from their bytes.
Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from helios.proxy.catalogue import ModelEntry
from helios.proxy.fleet.state import Replica, ReplicaState, Worker
from helios.proxy.holds import Holds
from helios.proxy.scaling.decisions import Cause, Scaled
from helios.proxy.scaling.ladder import Cooldowns, Rung, rung_after
from helios.proxy.traffic import Traffic
from helios.proxy.warmth import Warmth

# Of so many slots one is free for starts, wherever a sleeper can go for that: of 8, two. tests/simulator/REPORT.md has
# what it is worth.
SLOTS_PER_SPARE: Final = 4


class Cooling:
    """One model at a time, once a second."""

    def __init__(
        self,
        *,
        traffic: Traffic,
        holds: Holds,
        warmth: Warmth,
        drain: Callable[[Replica, float], None],
        decide: Callable[[Scaled], None],
    ) -> None:
        """``drain`` takes a replica out, ``decide`` takes down what is decided."""
        self._traffic = traffic
        self._holds = holds
        self._warmth = warmth
        self._drain = drain
        self._decide = decide
        self._since: float | None = None
        self._promised_at: dict[str, float] = {}

    def follow(self, entry: ModelEntry, now: float, cooldowns: Cooldowns, floor: Rung) -> None:
        """Does what is due for a model; ``floor`` is the rung that something expected of it is worth."""
        if self._since is None:
            self._since = now
        if self._holds.count(entry.name) or not self._is_lower(entry, floor):
            return
        if entry.min_replicas or floor is Rung.READY:
            # Its times begin when nothing promises it any more.
            self._promised_at[entry.name] = now
            return
        # What was used before this proxy began, nobody knows: as if it had been used then.
        used_at = max(self._traffic.last_wanted_at(entry.name), self._since)
        unused_seconds = now - max(used_at, self._promised_at.get(entry.name, used_at))
        rung = rung_after(unused_seconds, cooldowns, floor)
        replicas = self._traffic.staying(entry.name)
        if rung < Rung.ASLEEP:
            self._wind_up(entry, replicas, rung, unused_seconds, now)
        if rung is Rung.DISK:
            self._promised_at.pop(entry.name, None)
        if rung is Rung.DISK and not replicas and self._warmth.unstage(entry.revision):
            self._decided(entry.name, f"its weights were in memory, unused for {unused_seconds:.0f} s", now)
        if floor >= Rung.STAGED and not replicas:
            self._warmth.stage_spare(entry)

    def relieve(self, now: float) -> None:
        """Has one sleeper go of each worker that has too few free slots; once a second."""
        for worker in self._traffic.fleet.workers():
            spare_count = worker.hello.slot_count // SLOTS_PER_SPARE
            if not worker.is_reachable or len(worker.replicas) + spare_count <= worker.hello.slot_count:
                continue
            staying = [replica for replica in worker.replicas.values() if not self._traffic.is_draining(replica)]
            if len(staying) + spare_count > worker.hello.slot_count:
                self._make_slot(worker, staying, now)

    def _make_slot(self, worker: Worker, staying: list[Replica], now: float) -> None:
        sleepers = [r for r in staying if r.state is ReplicaState.ASLEEP and not self._holds.count(r.model)]
        oldest = min(sleepers, key=lambda replica: self._traffic.last_wanted_at(replica.model), default=None)
        if oldest is not None:
            self._warmth.keep(oldest)
            self._drain(oldest, now)
            self._decided(oldest.model, f"a replica slept, and {worker.hello.worker_id} has too few free slots", now)

    def _is_lower(self, entry: ModelEntry, floor: Rung) -> bool:
        """Whether a model is on a rung of this module's, or is to be; most are ready, and cost one look."""
        fleet = self._traffic.fleet
        replicas = fleet.replicas_of(entry.name)
        if replicas and floor < Rung.READY and not entry.min_replicas:
            return any(replica.state is ReplicaState.ASLEEP for replica in replicas)
        return True

    def _wind_up(
        self, entry: ModelEntry, replicas: list[Replica], rung: Rung, unused_seconds: float, now: float
    ) -> None:
        for replica in replicas:
            if replica.state is ReplicaState.ASLEEP:
                if rung is Rung.STAGED:
                    self._warmth.keep_staged(entry, replica.worker_id)
                self._drain(replica, now)
                self._decided(entry.name, f"a replica slept, unused for {unused_seconds:.0f} s", now)

    def _decided(self, model: str, reason: str, now: float) -> None:
        self._decide(Scaled(now, model, 0, 0, reason, is_advice=False, cause=Cause.COOLDOWN))
