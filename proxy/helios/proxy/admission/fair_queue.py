"""Who is next, where requests wait: bands of priority, and in each band tenants by their weights. Pure.

Within a band this is start-time fair queueing: a tenant's turn comes at a virtual time that grows by what its requests
cost, over its weight; the tenant with the earliest turn is next, and one that comes anew begins at the present. Tags
are given to tenants and not to requests, so a request that leaves the queue has cost its tenant nothing.

The highest band goes first, but after `RELIEF` of its requests in a row one of the band below comes that has waited
longest for that: nobody starves, and the highest band is held up by one request in `RELIEF` + 1.

Bounds, for tenants f and g that wait all the time in one band, which hypothesis holds this to: what they are served,
each over its weight, differs by at most the largest cost of f over its weight plus that of g over its own.

Source: Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

RELIEF: Final = 7
"""Requests of higher bands between two of a lower one, which so has an eighth: enough to go on, little to be felt."""


class Entry(NamedTuple):
    """A request that waits; `cost` is in tokens, at least 1."""

    key: int
    tenant: str
    band: int
    weight: int
    cost: int


class _Flow:
    """What waits of one tenant in one band, first come first."""

    __slots__ = ("entries", "starts_at")

    def __init__(self, starts_at: float) -> None:
        self.entries: OrderedDict[int, Entry] = OrderedDict()
        self.starts_at = starts_at


class _Band:
    """Start-time fair queueing among tenants.

    A tenant without requests is remembered until the present has passed its turn: who leaves and comes back is served
    no earlier for it.
    """

    def __init__(self) -> None:
        self._flows: dict[str, _Flow] = {}
        self._now = 0.0
        self.count = 0

    def add(self, entry: Entry) -> None:
        flow = self._flows.get(entry.tenant)
        if flow is None:
            flow = self._flows[entry.tenant] = _Flow(self._now)
        elif not flow.entries:
            flow.starts_at = max(flow.starts_at, self._now)
        flow.entries[entry.key] = entry
        self.count += 1

    def first(self) -> Entry:
        # Tenants that wait for one model are few; equal turns go to the tenant that came first.
        flow = min((flow for flow in self._flows.values() if flow.entries), key=lambda one: one.starts_at)
        return next(iter(flow.entries.values()))

    def serve(self, entry: Entry) -> None:
        flow = self._flows[entry.tenant]
        self._now = max(self._now, flow.starts_at)
        flow.starts_at += entry.cost / entry.weight
        self.drop(entry)
        for tenant in [name for name, one in self._flows.items() if not one.entries and one.starts_at <= self._now]:
            del self._flows[tenant]

    def drop(self, entry: Entry) -> None:
        del self._flows[entry.tenant].entries[entry.key]
        self.count -= 1

    def longest(self) -> list[Entry]:
        """What waits of the tenant of which most does."""
        return list(max((flow.entries for flow in self._flows.values()), key=len).values())


class FairQueue:
    """Requests that wait for the same thing.

    Invariants: each request leaves exactly once; where anything waits, `first` is something that waits.
    """

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._bands: dict[int, _Band] = {}
        self._since_relief = 0
        self._served = 0
        self._served_at: dict[int, int] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Has a request wait."""
        self._entries[entry.key] = entry
        self._bands.setdefault(entry.band, _Band()).add(entry)

    def first(self) -> int | None:
        """Who is next; None where nobody waits."""
        waiting = self._waiting()
        if not waiting:
            return None
        band = max(waiting)
        if self._since_relief >= RELIEF and len(waiting) > 1:
            waiting.remove(band)
            band = min(waiting, key=lambda number: self._served_at.get(number, 0))
        return self._bands[band].first().key

    @property
    def highest_band(self) -> int:
        """The highest band of which anybody waits; 0: nobody does."""
        return max(self._waiting(), default=0)

    def first_of_highest(self) -> int | None:
        """Who is next of the highest band, whoever's turn it is; None where nobody waits."""
        waiting = self._waiting()
        return self._bands[max(waiting)].first().key if waiting else None

    def serve(self, key: int) -> None:
        """A request's turn has come: it leaves, and its tenant has had it. It is the `first` one, or another."""
        waiting = self._waiting()
        entry = self._entries.pop(key)
        self._bands[entry.band].serve(entry)
        self._served += 1
        self._served_at[entry.band] = self._served
        # Counted only while somebody of a lower band waits, who is then relieved.
        is_held_up = len(waiting) > 1 and entry.band == max(waiting)
        self._since_relief = self._since_relief + 1 if is_held_up else 0

    def drop(self, key: int) -> None:
        """A request leaves without its turn: its client left, its time is over."""
        entry = self._entries.pop(key)
        self._bands[entry.band].drop(entry)

    def victim_for(self, newcomer: Entry) -> int | None:
        """Whom a newcomer may put out of a full queue: the last of a lower band, else of a tenant that has more.

        None where it is the newcomer who has to go.
        """
        lowest = min(self._waiting(), default=newcomer.band + 1)
        if lowest > newcomer.band:
            return None
        theirs = self._bands[lowest].longest()
        if lowest < newcomer.band:
            return theirs[-1].key
        own_count = sum(entry.tenant == newcomer.tenant for entry in self._entries.values())
        return theirs[-1].key if len(theirs) > own_count + 1 else None

    def _waiting(self) -> list[int]:
        return [number for number, band in self._bands.items() if band.count]
