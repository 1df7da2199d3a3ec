"""The express lane of a proxy: which models are fit for it.

Fit is a model of whose requests nothing has to be decided or counted here before they go: all of them go to one
replica whatever they say, or Envoy picks among few by what it is told (`granting`). Whether it is, is looked at after
every event; the lane itself is `lane`. The picker never sees what comes by the lane: it is accounted for by what
replicas report, and by what Envoy tells of its picks (`told`). Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from helios.mesh.routing import Choice
from helios.proxy.express.granting import LaneView, lane_view
from helios.proxy.express.lane import ExpressPolicy, Lane, Place
from helios.proxy.routing.pick import Pick
from helios.proxy.routing.table import Candidate, score

if TYPE_CHECKING:
    from helios.proxy.actions import Action, Send
    from helios.proxy.admission.keyring import Keyring
    from helios.proxy.catalogue import Catalogue, ModelEntry
    from helios.proxy.fleet.state import Replica
    from helios.proxy.holds import Holds
    from helios.proxy.traffic import Traffic

# Names of one model that Envoy compares with; those of a model with more aliases ask the picker.
_NAME_COUNT = 8
MAX_SHARED_REPLICAS: Final = 32
"""Envoy looks at each candidate for each request, in Lua; among more the picker is quicker."""
LEASE_SECONDS: Final = 0.5
"""For how long Envoy picks by what it was told. Five times what it asks after: an answer may be late, and a drain waits
for so long."""
# What Envoy picked at the last moment is at its replica after so long: a handshake, and a turn on a busy core.
_ON_ITS_WAY_SECONDS: Final = 0.25


class Outlook(NamedTuple):
    """What says whether a model is fit."""

    traffic: Traffic
    catalogue: Catalogue
    keyring: Keyring
    holds: Holds


class Express:
    """Looks at models and keeps the lane. It has no places where there are several proxies (`ProxySettings`): another
    one's view of a replica is not this one's.
    """

    def __init__(self, policy: ExpressPolicy, fit_by: Outlook, *, has_past: bool) -> None:
        """``has_past``: Envoys may still have the lane of an earlier run of this proxy."""
        self.lane = Lane(policy, has_past=has_past)
        self._traffic, self._catalogue, self._keyring, self._holds = fit_by

    def heard(self, replica: Replica | None, count: int) -> None:
        """So many requests began at a replica; None: one that is not known."""
        if replica is not None and count:
            self.lane.heard(replica.model, count)

    def unreached(self, address: str, now: float) -> None:
        """A request that nobody picked here could not be connected to the replica with this address, the only one that
        it was sent to.
        """
        for replica in self._traffic.fleet.replicas():
            if replica.address == address and self.lane.has_carried(replica.replica_id):
                self._traffic.breakers.failed(replica.replica_id, now)
                self._traffic.refresh(replica.replica_id)

    def look(self, todo: list[Action], now: float) -> list[Action]:
        """Takes out of the lane what an event has made unfit; returns what of its actions need not wait for that."""
        if self.lane.places:
            unfit = [place for place in self.lane.places if self.place_of(place.model) != place]
            if unfit:
                self.lane.leave(unfit, now)
        return self.lane.keep_back(todo, now)

    def tick(self, now: float) -> list[Send]:
        """Lets models in, about every second; returns orders that need not wait any more."""
        self.lane.count()
        places = {model: self.place_of(model) for model in self.lane.asked_for()}
        self.lane.choose({model: place for model, place in places.items() if place is not None}, now)
        return self.lane.expire(now)

    def place_of(self, model: str) -> Place | None:
        """A model's place in the lane; None where it is not fit."""
        entry = self._catalogue.get(model)
        if entry is None or not self._is_fit(entry):
            return None
        replicas = self._traffic.fleet.replicas_of(model)
        if len(replicas) == 1:
            (replica,) = replicas
            return Place(replica.replica_id, model, self._names(entry), replica.address, replica.revision)
        return Place("", model, self._names(entry), "", entry.revision)

    def _is_fit(self, entry: ModelEntry) -> bool:
        replicas = self._traffic.fleet.replicas_of(entry.name)
        if self._keyring.is_required or not replicas:
            return False
        if entry.is_adapter or entry.adapters or entry.role or entry.canary or entry.is_durable or "@" in entry.name:
            # Its requests differ.
            return False
        if self._traffic.rules_of(entry.name).keeps_places or self._holds.count(entry.name):
            return False
        return self._takes_all(entry, replicas[0]) if len(replicas) == 1 else self._can_share(entry, len(replicas))

    def _takes_all(self, entry: ModelEntry, replica: Replica) -> bool:
        return (
            replica.revision == entry.revision
            and self._traffic.is_candidate(replica.replica_id)
            and replica.replica_id not in self._traffic.busy
            and replica.worker_id not in self._traffic.fleet.cordoned
        )

    def _can_share(self, entry: ModelEntry, replica_count: int) -> bool:
        """Whether Envoy can pick among a model's replicas. It takes the best one, and draws none."""
        takes_best = self._traffic.routing.draw is None or self._traffic.rules_of(entry.name).choice is Choice.BEST
        has_candidate = self._traffic.table.count(entry.name, entry.revision) > 0
        return takes_best and has_candidate and replica_count <= MAX_SHARED_REPLICAS

    def _names(self, entry: ModelEntry) -> tuple[str, ...]:
        names = [
            name for name in (entry.name, *entry.aliases) if self._catalogue.find(name) is entry and "@" not in name
        ]
        return tuple(names[:_NAME_COUNT])

    def lease(self, entry: ModelEntry, now: float) -> LaneView | None:
        """Has Envoy pick by what this returns, for LEASE_SECONDS; None: it is to ask the picker."""
        place = self.place_of(entry.name)
        if place is None or not place.is_shared or place not in self.lane.places:
            return None
        view = lane_view(self._traffic, entry)
        if view is not None:
            addresses = {one.replica_id: one.address for one in view.candidates if one.room != 0}
            self.lane.leased(addresses, now + LEASE_SECONDS + _ON_ITS_WAY_SECONDS)
            self._traffic.losses.is_kept = True
        return view

    def pick_of(self, replica_id: str) -> Pick | None:
        """The pick that was not made for a request at a replica; None where it can't have come by the lane."""
        replica = self._traffic.fleet.replica(replica_id) if self.lane.has_carried(replica_id) else None
        if replica is None:
            return None
        # That there were several is known, of those that are left only where there still are.
        replica_count = len(self._traffic.fleet.replicas_of(replica.model))
        count = max(2, replica_count) if self.lane.has_shared(replica_id) else 1
        weights = self._traffic.rules_of(replica.model).weights
        return Pick(replica.model, replica.revision, (self._scored(replica),), count, is_express=True, weights=weights)

    def picks_told(self, model: str, replica_ids: frozenset[str]) -> dict[str, Pick]:
        """For each of some replicas that is a model's, what all picks of it have in common that Envoy tells of."""
        found: dict[str, Pick] = {}
        weights = self._traffic.rules_of(model).weights
        for replica_id in replica_ids:
            replica = self._traffic.fleet.replica(replica_id)
            if replica is None or replica.model != model:
                continue
            candidates = self._traffic.table.snapshot(model, replica.revision)
            known = next((one for one in candidates if one.replica_id == replica_id), None)
            choices = (known or self._scored(replica),)
            count = len(candidates) + (known is None)
            found[replica_id] = Pick(model, replica.revision, choices, count, choices, "", True, weights)
        return found

    def _scored(self, replica: Replica) -> Candidate:
        weights = self._traffic.rules_of(replica.model).weights
        return score(replica.replica_id, replica.address, replica.load, 0, weights=weights)
