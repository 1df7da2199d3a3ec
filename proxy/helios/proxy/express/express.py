"""The express lane of a proxy: which models are fit for it.

Fit is a model whose requests all go to one replica whatever they say, and of which nothing has to be decided or counted
before they do. Whether it is, is looked at after every event; the lane itself is `lane`. What comes by the lane is
accounted for by what replicas report: the picker never sees it. Pure.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from helios.proxy.express.lane import ExpressPolicy, Lane, Place
from helios.proxy.routing.pick import Pick
from helios.proxy.routing.table import score

if TYPE_CHECKING:
    from helios.proxy.actions import Action, Send
    from helios.proxy.admission.keyring import Keyring
    from helios.proxy.catalogue import Catalogue, ModelEntry
    from helios.proxy.fleet.state import Replica
    from helios.proxy.holds import Holds
    from helios.proxy.traffic import Traffic

# Names of one model that Envoy compares with; those of a model with more aliases ask the picker.
_NAME_COUNT = 8


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

    def look(self, todo: list[Action], now: float) -> list[Action]:
        """Takes out of the lane what an event has made unfit; returns what of its actions need not wait for that."""
        if self.lane.places:
            unfit = [place for place in self.lane.places if self.place_of(place.model) != place]
            if unfit:
                self.lane.leave(unfit, now)
        return self.lane.keep_back(todo, now)

    def tick(self, now: float) -> list[Send]:
        """Lets models in, about every second; returns orders that have waited for as long as they may."""
        self.lane.count()
        places = {model: self.place_of(model) for model in self.lane.asked_for()}
        self.lane.choose({model: place for model, place in places.items() if place is not None}, now)
        return self.lane.expire(now)

    def place_of(self, model: str) -> Place | None:
        """A model's place in the lane; None where it is not fit."""
        entry = self._catalogue.get(model)
        if entry is None or not self._is_fit(entry):
            return None
        (replica,) = self._traffic.fleet.replicas_of(model)
        return Place(replica.replica_id, model, self._names(entry), replica.address, replica.revision)

    def _is_fit(self, entry: ModelEntry) -> bool:
        replicas = self._traffic.fleet.replicas_of(entry.name)
        if self._keyring.is_required:
            return False
        if entry.is_adapter or entry.adapters or entry.role or entry.canary or entry.is_durable or "@" in entry.name:
            # Its requests differ.
            return False
        if self._traffic.rules_of(entry.name).keeps_places:
            return False
        return len(replicas) == 1 and not self._holds.count(entry.name) and self._takes_all(entry, replicas[0])

    def _takes_all(self, entry: ModelEntry, replica: Replica) -> bool:
        return (
            replica.revision == entry.revision
            and self._traffic.is_candidate(replica.replica_id)
            and replica.replica_id not in self._traffic.busy
            and replica.worker_id not in self._traffic.fleet.cordoned
        )

    def _names(self, entry: ModelEntry) -> tuple[str, ...]:
        names = [
            name for name in (entry.name, *entry.aliases) if self._catalogue.find(name) is entry and "@" not in name
        ]
        return tuple(names[:_NAME_COUNT])

    def pick_of(self, replica_id: str) -> Pick | None:
        """The pick that was not made for a request at a replica; None where it can't have come by the lane."""
        replica = self._traffic.fleet.replica(replica_id) if self.lane.has_carried(replica_id) else None
        if replica is None:
            return None
        weights = self._traffic.rules_of(replica.model).weights
        candidate = score(replica_id, replica.address, replica.load, 0, weights=weights)
        return Pick(replica.model, replica.revision, (candidate,), 1, is_express=True, weights=weights)
