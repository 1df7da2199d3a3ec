"""Models of which a share of the requests goes to another revision: which one answers, and whose replicas are whose.

A canary is an entry of its own (``catalog/addressed``), with its own replicas. It is in use while its model is, so it
is started and kept with it; but nobody waits for it: while it has no replica that takes a request at once (none, or
busy ones), and where it can't be started at all, its share goes to the served revision. Who sends a part of the
requests elsewhere to see whether that works does not want those to fail that would have been answered. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

from helios.proxy.activation import machine
from helios.proxy.catalogue import Catalogue, ModelEntry, addressed_name
from helios.proxy.fleet.state import Replica
from helios.proxy.routing.rules import NORMAL_BAND
from helios.proxy.routing.split import Splitter
from helios.proxy.traffic import Traffic

if TYPE_CHECKING:
    from helios.proxy.lifecycle import Lifecycle

# Each request of its model asks for a canary that has no replica; once a second is enough.
_WANT_SECONDS: Final = 1.0


class Assignment(NamedTuple):
    """Which entry answers a request, and why, for people; without `why` and `outcome` where there is no choice.

    `outcome` is "served", "canary", or "fallback": it was the canary's, which had no replica that took it at once.
    """

    entry: ModelEntry
    why: str = ""
    outcome: str = ""


class Rollouts:
    """The rollouts of all models. Times are monotonic seconds."""

    def __init__(self, *, traffic: Traffic, catalogue: Catalogue, lifecycle: Lifecycle) -> None:
        self._traffic = traffic
        self._catalogue = catalogue
        self._lifecycle = lifecycle
        self._splitter = Splitter()
        self._wanted_at: dict[str, float] = {}

    def assign(self, entry: ModelEntry, name: str, key: str, now: float, *, band: int = NORMAL_BAND) -> Assignment:
        """Which revision of a model answers a request for `name`, of a band of priority.

        Requests that name a revision or an adapter are not split. `key` stands for a conversation or a user.
        """
        canary = self._catalogue.get(entry.canary) if entry.canary_percent else None
        if canary is None or "@" in name or name in entry.adapters:
            return Assignment(entry)
        self._traffic.use(canary.name, now)
        is_ready = self._traffic.takes_requests(canary, band)
        if not is_ready and now - self._wanted_at.get(canary.name, -_WANT_SECONDS) >= _WANT_SECONDS:
            self._wanted_at[canary.name] = now
            self._lifecycle.want(canary, now)
        by = "key" if key else "turn"
        if not self._splitter.takes_canary(entry, key):
            why = f"{entry.canary_percent} % go to {canary.name}, not this one, by its {by}"
            return Assignment(entry, why, "served")
        why = f"{entry.canary_percent} % go to {canary.name}, this one by its {by}"
        return self.still(Assignment(canary, why, "canary"), entry, band=band)

    def still(self, assigned: Assignment, served: ModelEntry, *, band: int = NORMAL_BAND) -> Assignment:
        """An assignment as it is now: what is the canary's goes to what is served unless a replica takes it at once."""
        if assigned.outcome != "canary" or self._traffic.takes_requests(assigned.entry, band):
            return assigned
        return Assignment(served, f"{assigned.why}, but no replica there takes requests", "fallback")

    def changed(self, entry: ModelEntry, now: float) -> None:
        """A model, or one of its revisions' entries, is new or another one now."""
        if not entry.canary:
            self._splitter.forget(entry.name)
        self.rehome((entry.name, addressed_name(entry.name, entry.revision)), now)

    def deleted(self, name: str) -> None:
        """An entry is gone."""
        self._splitter.forget(name)
        self._wanted_at.pop(name, None)

    def at_home(self, replica: Replica) -> Replica:
        """A replica as that of the entry which has its revision now, whichever of its model's it was started for.

        So a canary that is promoted, or a tag's revision that is served, goes on with the replicas that it has. One
        that drains stays where it is.
        """
        known = self._traffic.fleet.replica(replica.replica_id)
        if known is not None and self._traffic.is_draining(known):
            return replace(replica, model=known.model)
        base = replica.model.partition("@")[0]
        own = self._catalogue.get(base)
        if own is None:
            return replica
        home = base if own.revision == replica.revision else addressed_name(base, replica.revision)
        is_there = home == base or self._catalogue.get(home) is not None
        return replace(replica, model=home) if is_there and home != replica.model else replica

    def rehome(self, models: Iterable[str], now: float) -> None:
        """Gives the replicas of some models to the entries which have their revisions now."""
        for replica in [replica for model in list(models) for replica in self._traffic.fleet.replicas_of(model)]:
            after = self.at_home(replica)
            if after.model != replica.model:
                # Whoever waits for its start does so at its new home, which adopts it.
                self._lifecycle.handle(replica.model, machine.Withdrawn(replica.replica_id), now)
                self._traffic.fleet.believe(after)
                self._traffic.rehomed(replica, after)
