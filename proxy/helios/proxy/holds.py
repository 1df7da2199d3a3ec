"""Requests that wait for a replica.

A held request costs memory in Envoy (its body is buffered there), so holds are bounded in count, per model and in all,
and in bytes. Each has an absolute deadline, counted from the request's own start, so that a hold that moves to another
proxy does not begin anew. Within a model, who is next is decided by priority and fair shares of tenants
(`admission/fair_queue`); one tenant's requests go in the order in which they came. Where a model's queue is full, a
request of a higher priority, or of a tenant that has less of it, puts another one out.

| state | event | next |
|---|---|---|
| — | admit | HELD, or Overloaded, QuotaExceeded |
| HELD | admit of one that goes before it, where the queue is full | shed |
| HELD | release, one by one in order | released |
| HELD | expire at or after its deadline | expired |
| HELD | cancel (the client left) | gone |
| HELD | take_all (the activation failed) | failed |

Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from helios.mesh.errors import HoldExpired, Overloaded, QuotaExceeded
from helios.proxy.activation.machine import ActivationState
from helios.proxy.admission.fair_queue import Entry, FairQueue
from helios.proxy.admission.keyring import ANYBODY, Caller


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """Bounds of what is held: requests of one model, of one tenant for it, of all models, and bytes of bodies (by
    content-length).
    """

    model_count: int = 512
    tenant_count: int = 256
    total_count: int = 4096
    total_bytes: int = 512 << 20


@dataclass(frozen=True, slots=True)
class Hold:
    """A request that waits. Times are monotonic seconds; `model` is the model's own name, `adapter` the one it names.

    `name` is what the request calls it: where the entry goes while it waits, the name may mean another one.

    Requests of one model for different adapters wait in lanes of their own; "" is the lane of the model itself.

    What a start is told of the request that asked for it: `requested_at`, its arrival in seconds since the epoch (0:
    not known), and `traceparent`, its W3C trace context.
    """

    hold_id: int
    request_id: str
    model: str
    size_bytes: int
    since: float
    deadline: float
    name: str = ""
    requested_at: float = 0.0
    traceparent: str = ""
    adapter: str = ""
    caller: Caller = ANYBODY
    cost_tokens: int = 1


@dataclass(frozen=True, slots=True)
class HoldStatistics:
    """What is held."""

    count: int
    size_bytes: int


class Holds:
    """The held requests.

    Invariants: count and bytes never exceed the limits and equal the sums of what is held; a hold leaves exactly once.
    """

    def __init__(self, limits: HoldLimits) -> None:
        self._limits = limits
        self._holds: dict[int, Hold] = {}
        self._by_model: dict[str, OrderedDict[int, Hold]] = {}
        self._lanes: dict[str, dict[str, FairQueue]] = {}
        self._tenants: dict[tuple[str, str], int] = {}
        # Entries of holds that left are skipped when met: a heap has no cheap removal.
        self._deadlines: list[tuple[float, int]] = []
        self._size_bytes = 0
        self._elsewhere: dict[str, int] = {}

    def admit(self, hold: Hold) -> Hold | None:
        """Begins to hold a request; returns the one that it puts out, where the model's queue was full.

        Raises:
            Overloaded: a bound is reached; `metadata["bound"]` says which.
            QuotaExceeded: TENANT_QUEUE_FULL, its key's tenant has too many of the model's places.
        """
        tenant = hold.caller.tenant
        if tenant and self._tenants.get((hold.model, tenant), 0) >= self._limits.tenant_count:
            raise QuotaExceeded(
                f"too many requests of {tenant!r} wait for the model '{hold.model}'; try again later",
                reason="TENANT_QUEUE_FULL",
                metadata={"model": hold.model, "bound": "tenant_count"},
            )
        shed = self._make_room(hold)
        lane = self._lanes.setdefault(hold.model, {}).setdefault(hold.adapter, FairQueue())
        lane.add(_entry(hold))
        self._holds[hold.hold_id] = hold
        self._by_model.setdefault(hold.model, OrderedDict())[hold.hold_id] = hold
        self._tenants[hold.model, tenant] = self._tenants.get((hold.model, tenant), 0) + 1
        heappush(self._deadlines, (hold.deadline, hold.hold_id))
        self._size_bytes += hold.size_bytes
        return shed

    def elsewhere(self, model: str, count: int) -> None:
        """Says how many requests wait for a model at other proxies, which count on this one to start it."""
        if count:
            self._elsewhere[model] = count
        else:
            self._elsewhere.pop(model, None)

    def elsewhere_count(self, model: str) -> int:
        """How many requests wait for a model at other proxies."""
        return self._elsewhere.get(model, 0)

    def first(self, model: str) -> Hold | None:
        """The hold of a model that came first, of this proxy's own."""
        queue = self._by_model.get(model)
        return next(iter(queue.values())) if queue else None

    def lanes(self, model: str) -> list[str]:
        """Adapters of a model that requests wait for; "" is the model itself."""
        return list(self._lanes.get(model, ()))

    def next_of_lane(self, model: str, adapter: str) -> list[Hold]:
        """Who goes on next for an adapter of a model: whoever's turn it is, else, if there is no place for that band,
        the first of the highest one.
        """
        lane = self._lanes.get(model, {}).get(adapter)
        keys = (lane.first(), lane.first_of_highest()) if lane is not None else ()
        return [self._holds[key] for key in dict.fromkeys(keys) if key is not None]

    def highest_band(self, model: str, adapter: str) -> int:
        """The highest band that waits for an adapter of a model; 0: nobody does."""
        lanes = self._lanes.get(model)
        lane = lanes.get(adapter) if lanes is not None else None
        return lane.highest_band if lane is not None else 0

    def take_lane(self, model: str, adapter: str) -> list[Hold]:
        """Ends all holds for an adapter of a model, first come first."""
        holds = [hold for hold in self._by_model.get(model, {}).values() if hold.adapter == adapter]
        for hold in holds:
            self.remove(hold.hold_id)
        return holds

    def release(self, hold_id: int) -> None:
        """Ends a hold whose turn has come: it counts for its tenant's share."""
        hold = self._holds[hold_id]
        self._lanes[hold.model][hold.adapter].serve(hold_id)
        self._forget(hold)

    def remove(self, hold_id: int) -> Hold | None:
        """Ends a hold without a turn: its client left, or it can't be served. None where it has ended already."""
        hold = self._holds.get(hold_id)
        if hold is None:
            return None
        self._lanes[hold.model][hold.adapter].drop(hold_id)
        self._forget(hold)
        return hold

    def take_all(self, model: str) -> list[Hold]:
        """Ends all holds of a model, first come first."""
        queue = self._by_model.get(model)
        holds = list(queue.values()) if queue else []
        for hold in holds:
            self.remove(hold.hold_id)
        return holds

    def expire(self, now: float) -> list[Hold]:
        """Ends the holds whose deadline is reached."""
        expired: list[Hold] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, hold_id = heappop(self._deadlines)
            hold = self.remove(hold_id)
            if hold is not None:
                expired.append(hold)
        return expired

    def count(self, model: str) -> int:
        """How many requests of a model are held, here and elsewhere."""
        own_count = len(self._by_model.get(model, ()))
        return own_count + self._elsewhere.get(model, 0) if self._elsewhere else own_count

    def models(self) -> list[str]:
        """Models that requests wait for, here or elsewhere."""
        if not self._elsewhere:
            return list(self._by_model)
        return [*self._by_model, *(model for model in self._elsewhere if model not in self._by_model)]

    def own_counts(self) -> dict[str, int]:
        """How many requests wait here, by model."""
        return {model: len(queue) for model, queue in self._by_model.items()}

    def statistics(self) -> HoldStatistics:
        """What is held, in all."""
        return HoldStatistics(len(self._holds), self._size_bytes)

    def _make_room(self, hold: Hold) -> Hold | None:
        """Raises Overloaded where a bound is reached and nobody has to go for the newcomer."""
        queue: Mapping[int, Hold] = self._by_model.get(hold.model, {})
        bound, shed = None, None
        if len(queue) >= self._limits.model_count:
            bound = "model_count"
            lane = self._lanes[hold.model].get(hold.adapter)
            victim = lane.victim_for(_entry(hold)) if lane is not None else None
            shed = self._holds[victim] if victim is not None else None
        elif len(self._holds) >= self._limits.total_count:
            bound = "total_count"
        freed_bytes = shed.size_bytes if shed is not None else 0
        if self._size_bytes - freed_bytes + hold.size_bytes > self._limits.total_bytes:
            bound, shed = "total_bytes", None
        if bound is not None and shed is None:
            raise too_many(hold.model, bound)
        return self.remove(shed.hold_id) if shed is not None else None

    def _forget(self, hold: Hold) -> None:
        del self._holds[hold.hold_id]
        queue, lanes = self._by_model[hold.model], self._lanes[hold.model]
        del queue[hold.hold_id]
        if not queue:
            # Shares of tenants are remembered while somebody waits.
            del self._by_model[hold.model], self._lanes[hold.model]
        elif not len(lanes[hold.adapter]):
            del lanes[hold.adapter]
        place = (hold.model, hold.caller.tenant)
        self._tenants[place] -= 1
        if not self._tenants[place]:
            del self._tenants[place]
        self._size_bytes -= hold.size_bytes
        if len(self._deadlines) > 64 + 2 * len(self._holds):
            self._deadlines = [(held.deadline, key) for key, held in self._holds.items()]
            heapify(self._deadlines)


def too_many(model: str, bound: str) -> Overloaded:
    """The answer to a request for which there is no place, or that was put out for another one."""
    message = f"too many requests wait for the model '{model}'; try again later"
    return Overloaded(message, metadata={"model": model, "bound": bound})


def expired(
    hold: Hold, now: float, state: ActivationState, *, retry_after_seconds: float, has_candidates: bool
) -> HoldExpired:
    """The answer to a request that has waited for as long as it may; `state` is that of what it waited for."""
    progress = "is still starting" if state is ActivationState.STARTING else "has no replica that takes requests"
    if has_candidates and not hold.adapter:
        progress = "has more requests than it can answer"
    if hold.adapter:
        progress += f" for the adapter '{hold.adapter}'"
    waited_seconds = now - hold.since
    return HoldExpired(
        f"the model '{hold.model}' {progress} after {waited_seconds:.0f} s; try again in {retry_after_seconds:.0f} s",
        metadata={"model": hold.model, "waited_seconds": f"{waited_seconds:.1f}", "activation": state.name},
        retry_after_seconds=retry_after_seconds,
    )


def _entry(hold: Hold) -> Entry:
    caller = hold.caller
    return Entry(hold.hold_id, caller.tenant, caller.priority, caller.weight, max(1, hold.cost_tokens))
