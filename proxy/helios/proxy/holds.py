"""Requests that wait for a replica.

A held request costs memory in Envoy (its body is buffered there), so holds are bounded in count, per model and in all,
and in bytes. Each has an absolute deadline, counted from the request's own start, so that a hold that moves to another
proxy does not begin anew. Within a model, holds are released in the order in which they came.

| state | event | next |
|---|---|---|
| — | admit | HELD, or Overloaded |
| HELD | take, one by one in order | released |
| HELD | expire at or after its deadline | expired |
| HELD | cancel (the client left) | gone |
| HELD | take_all (the activation failed) | failed |

Pure.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from helios.mesh.errors import Overloaded


@dataclass(frozen=True, slots=True)
class HoldLimits:
    """Bounds of what is held: requests of one model, of all models, and bytes of bodies (by content-length)."""

    model_count: int = 512
    total_count: int = 4096
    total_bytes: int = 512 << 20


@dataclass(frozen=True, slots=True)
class Hold:
    """A request that waits. Times are monotonic seconds; `model` is the model's own name, `adapter` the one it names.

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
    requested_at: float = 0.0
    traceparent: str = ""
    adapter: str = ""


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
        self._lanes: dict[str, dict[str, OrderedDict[int, Hold]]] = {}
        # Entries of holds that left are skipped when met: a heap has no cheap removal.
        self._deadlines: list[tuple[float, int]] = []
        self._size_bytes = 0

    def admit(self, hold: Hold) -> None:
        """Begins to hold a request.

        Raises:
            Overloaded: a bound is reached; `metadata["bound"]` says which.
        """
        queue = self._by_model.get(hold.model)
        bound = None
        if queue is not None and len(queue) >= self._limits.model_count:
            bound = "model_count"
        elif len(self._holds) >= self._limits.total_count:
            bound = "total_count"
        elif self._size_bytes + hold.size_bytes > self._limits.total_bytes:
            bound = "total_bytes"
        if bound is not None:
            message = f"too many requests wait for the model '{hold.model}' to start; try again later"
            raise Overloaded(message, metadata={"model": hold.model, "bound": bound})
        self._holds[hold.hold_id] = hold
        self._by_model.setdefault(hold.model, OrderedDict())[hold.hold_id] = hold
        lanes = self._lanes.setdefault(hold.model, {})
        lanes.setdefault(hold.adapter, OrderedDict())[hold.hold_id] = hold
        heappush(self._deadlines, (hold.deadline, hold.hold_id))
        self._size_bytes += hold.size_bytes

    def first(self, model: str) -> Hold | None:
        """The hold of a model that came first."""
        queue = self._by_model.get(model)
        return next(iter(queue.values())) if queue else None

    def lanes(self, model: str) -> list[str]:
        """Adapters of a model that requests wait for; "" is the model itself."""
        return list(self._lanes.get(model, ()))

    def first_of_lane(self, model: str, adapter: str) -> Hold | None:
        """The hold for an adapter of a model that came first."""
        lane = self._lanes.get(model, {}).get(adapter)
        return next(iter(lane.values())) if lane else None

    def take_lane(self, model: str, adapter: str) -> list[Hold]:
        """Ends all holds for an adapter of a model, first come first."""
        holds = list(self._lanes.get(model, {}).get(adapter, {}).values())
        for hold in holds:
            self.remove(hold.hold_id)
        return holds

    def remove(self, hold_id: int) -> Hold | None:
        """Ends a hold: released, or its client left. None where it has ended already."""
        hold = self._holds.pop(hold_id, None)
        if hold is None:
            return None
        queue = self._by_model[hold.model]
        del queue[hold_id]
        if not queue:
            del self._by_model[hold.model]
        lanes = self._lanes[hold.model]
        del lanes[hold.adapter][hold_id]
        if not lanes[hold.adapter]:
            del lanes[hold.adapter]
        if not lanes:
            del self._lanes[hold.model]
        self._size_bytes -= hold.size_bytes
        if len(self._deadlines) > 64 + 2 * len(self._holds):
            self._deadlines = [(held.deadline, key) for key, held in self._holds.items()]
            heapify(self._deadlines)
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

    def next_deadline(self) -> float | None:
        """The earliest deadline, perhaps of a hold that has ended; None where there is none."""
        return self._deadlines[0][0] if self._deadlines else None

    def count(self, model: str) -> int:
        """How many requests of a model are held."""
        return len(self._by_model.get(model, ()))

    def models(self) -> list[str]:
        """Models that requests wait for."""
        return list(self._by_model)

    def statistics(self) -> HoldStatistics:
        """What is held, in all."""
        return HoldStatistics(len(self._holds), self._size_bytes)
