"""What is told of how soon a model is ready: from which rung of the ladder it comes, how long that takes, and whether
it did. Pure.

Every start and wake is watched, whoever ordered it, by the proxy that leads and by those that follow it alike: they all
hear what workers say. So each proxy has measured what any of them has, and the next leader has nothing to learn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from helios.proxy import actions
from helios.proxy.activation.rungs import RungEstimates, Score, StartRung, Took
from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.fleet.state import Change, Form, Replica, ReplicaState
from helios.proxy.room import Room
from helios.proxy.traffic import Traffic

# Phases of a start that move weights; all others are the model's own wherever these are.
_MOVING: Final = frozenset({"fetch", "load"})
# A replica that is farther was under way before it was heard of: how long, its proxy does not know.
_EARLY: Final = frozenset({ReplicaState.PENDING, ReplicaState.FETCHING, ReplicaState.WAKING})


@dataclass(slots=True)
class _Watched:
    """A start under way: where it came from, as was believed, and what was promised."""

    began_at: float
    rung: StartRung
    promised_seconds: float
    is_fetched: bool = False


@dataclass(frozen=True, slots=True)
class Promise:
    """How soon a model is ready that has no replica: from where, in how many seconds, and how right such were."""

    rung: StartRung
    seconds: float
    score: Score


class Promises:
    """Watches starts, and says how long the next one takes.

    Invariant: what is watched is a replica that is on its way; nothing is kept of one that is gone.
    """

    def __init__(
        self,
        estimates: RungEstimates,
        *,
        traffic: Traffic,
        catalogue: Catalogue,
        room: Room,
        known_seconds: Callable[[str], float | None],
        report: Callable[[actions.Action], None],
    ) -> None:
        """``known_seconds`` is what a model takes wherever its weights are, as other proxies told."""
        self.estimates = estimates
        self._traffic = traffic
        self._catalogue = catalogue
        self._room = room
        self._known_seconds = known_seconds
        self._report = report
        self._watched: dict[str, _Watched] = {}

    def promise(self, entry: ModelEntry) -> Promise:
        """What a start that began now would take, or all of the one that is under way."""
        rung = self._rung_under_way(entry) or self.rung(entry)
        return Promise(rung, self._expected(entry, rung), self.estimates.score_of(rung))

    def remaining_seconds(self, entry: ModelEntry, elapsed_seconds: float) -> float:
        """How much longer a start takes that began `elapsed_seconds` ago; at least 1.

        A start that is overdue is expected to need a tenth of its time more: a guess of zero would be a lie.
        """
        return max(1.0, self.promise(entry).seconds - elapsed_seconds, 0.1 * elapsed_seconds)

    def fetch_seconds(self, entry: ModelEntry) -> float:
        """What is left of the fetch that is nearest its end, at the rate that it has; 0: there is none."""
        fetches = [r.fetch for r in self._traffic.fleet.replicas_of(entry.name) if r.revision == entry.revision]
        left = [fetch.remaining_seconds for fetch in fetches if fetch and fetch.remaining_seconds is not None]
        return min(left, default=0.0)

    def rung(self, entry: ModelEntry) -> StartRung:
        """The highest rung that a model has anywhere: placement prefers the workers that have it."""
        fleet = self._traffic.fleet
        for replica in fleet.replicas_of(entry.name):
            if replica.state is ReplicaState.ASLEEP and replica.revision == entry.revision:
                return StartRung.ASLEEP
        if fleet.staged_on(entry.revision):
            return StartRung.MEMORY
        # A proxy that starts knows of no disk; what was started by an earlier run is on one, unless it was evicted.
        if self._room.disk_count(entry.revision) or self.estimates.was_fetched(entry.revision):
            return StartRung.DISK
        return StartRung.CLOUD

    def ordered(self, replica_id: str, now: float) -> None:
        """A start or a wake was ordered, or is heard of; nothing happens where there is no such replica."""
        replica = self._traffic.fleet.replica(replica_id)
        if replica is None or replica_id in self._watched or replica.is_spare or replica.form is Form.COMPILED:
            return
        entry = self._catalogue.get(replica.model)
        if entry is None:
            return
        rung = self._rung_of(replica, entry)
        self._watched[replica_id] = _Watched(now, rung, self._expected(entry, rung))

    def evicted(self, revision: str) -> None:
        """The nodes were told to drop a revision's bytes."""
        self._room.forget_bytes(revision)
        self.estimates.evicted(revision)

    def follow(self, change: Change, now: float) -> None:
        """Follows what a worker says of a replica."""
        replica = change.replica
        self._room.note_place(replica)
        if change.after is None or not (replica.state.is_starting or replica.state is ReplicaState.READY):
            self._watched.pop(replica.replica_id, None)
        elif replica.state is ReplicaState.READY:
            self._ready(replica, now)
        elif replica.state in _EARLY:
            self.ordered(replica.replica_id, now)
        watched = self._watched.get(replica.replica_id)
        if watched is not None and replica.fetch is not None and watched.rung is not StartRung.ASLEEP:
            watched.is_fetched = True

    def _ready(self, replica: Replica, now: float) -> None:
        watched, entry = self._watched.pop(replica.replica_id, None), self._catalogue.get(replica.model)
        if watched is None or entry is None or entry.revision != replica.revision:
            return
        seconds = max(0.0, now - watched.began_at)
        score = self.estimates.score(watched.rung, watched.promised_seconds, seconds)
        rung = _real_rung(watched)
        moved = sum(spent for phase, spent in replica.phases if phase in _MOVING)
        # What one worker says of its phases counts for no more than what was seen, and for no less than nothing.
        moved = seconds if rung is StartRung.ASLEEP else min(max(moved, 0.0), seconds)
        self.estimates.record(replica.model, rung, Took(seconds, moved, replica.revision, entry.weights_bytes))
        self._report(
            actions.StartScored(
                replica.model, replica.replica_id, watched.rung.name, watched.promised_seconds, seconds, score
            )
        )

    def _expected(self, entry: ModelEntry, rung: StartRung) -> float:
        known = self._known_seconds(entry.name)
        return self.estimates.expected_seconds(entry.name, rung, entry.weights_bytes, known)

    def _rung_of(self, replica: Replica, entry: ModelEntry) -> StartRung:
        """Where a replica comes from that begins to start on its worker."""
        worker = self._traffic.fleet.worker(replica.worker_id)
        if replica.state is ReplicaState.WAKING:
            return StartRung.ASLEEP
        if worker is not None and entry.revision in worker.staged:
            return StartRung.MEMORY
        if self._room.is_on_disk(replica.worker_id, entry.revision):
            return StartRung.DISK
        if self._room.disk_count(entry.revision):
            return StartRung.PEER
        return StartRung.DISK if self.estimates.was_fetched(entry.revision) else StartRung.CLOUD

    def _rung_under_way(self, entry: ModelEntry) -> StartRung | None:
        for replica in self._traffic.fleet.replicas_of(entry.name):
            watched = self._watched.get(replica.replica_id)
            if watched is not None and replica.revision == entry.revision:
                return _shown_rung(watched)
        return None


def _shown_rung(watched: _Watched) -> StartRung:
    """Where a start comes from, as far as it has shown by now: what is fetched was on no disk of its node."""
    return StartRung.CLOUD if watched.is_fetched and watched.rung > StartRung.PEER else watched.rung


def _real_rung(watched: _Watched) -> StartRung:
    """Where a start came from that is over: what was not fetched was on its node."""
    return _shown_rung(watched) if watched.is_fetched else max(watched.rung, StartRung.DISK)
