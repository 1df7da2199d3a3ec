"""Where many replicas go at once, when not all of them fit. Pure.

One after the other, the largest first, is best fit decreasing: quick, and some percent off where a large replica leaves
a rest that nothing fills. So a few orders are tried, then parts of the best one are taken out and put back in another
order for as long as that is allowed to take; what is better stays (large neighbourhood search). A test holds the result
to a twentieth of what an exact solver finds.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from helios.proxy.placement.place import Placed, place
from helios.proxy.placement.workers import WorkerCapacity

_ROUNDS: Final = 10
# Of what is placed, taken out in one round at most.
_MOST_TAKEN_OUT: Final = 8


@dataclass(frozen=True, slots=True)
class Want:
    """A replica that is to be placed; `engine` empty is the worker's default."""

    name: str
    needed_bytes: int
    device_count: int = 1
    engine: str = ""


@dataclass(slots=True)
class _Packed:
    """What is placed where, and what is left of the workers."""

    workers: dict[str, WorkerCapacity]
    places: dict[Want, Placed] = field(default_factory=dict)

    @property
    def placed_bytes(self) -> int:
        return sum(want.needed_bytes for want in self.places)

    def add(self, wants: Iterable[Want]) -> "_Packed":
        """Places as many as fit, in their order."""
        for want in wants:
            able = [
                replace(worker, needed_bytes=want.needed_bytes, device_count=want.device_count)
                for worker in self.workers.values()
            ]
            plan = place(want.engine, able, may_preempt=False)
            if isinstance(plan, Placed):
                self.places[want] = plan
                self._book(want, plan, 1)
        return self

    def without(self, wants: Iterable[Want]) -> "_Packed":
        """A copy that lacks these."""
        rest = _Packed(dict(self.workers), dict(self.places))
        for want in wants:
            rest._book(want, rest.places.pop(want), -1)
        return rest

    def _book(self, want: Want, placed: Placed, count: int) -> None:
        worker = self.workers[placed.worker_id]
        share_bytes = -(-want.needed_bytes // want.device_count) * count
        self.workers[placed.worker_id] = replace(
            worker,
            free_slot_count=worker.free_slot_count - count,
            devices=tuple(
                replace(d, free_bytes=d.free_bytes - share_bytes) if d.device_id in placed.device_ids else d
                for d in worker.devices
            ),
        )


def pack(wants: Sequence[Want], workers: Iterable[WorkerCapacity], *, rounds: int = _ROUNDS) -> dict[str, Placed]:
    """Places as much memory as it can; returns the places by name, in an order in which they can be taken.

    Args:
        wants: Each with a name of its own.
        workers: With what is free; what a replica needs is the wants'.
        rounds: How often to look for something better. One costs as much as placing some ten replicas.
    """
    start = {worker.worker_id: worker for worker in workers}
    orders = (
        sorted(wants, key=lambda want: (-want.device_count, -want.needed_bytes)),
        sorted(wants, key=lambda want: -want.needed_bytes),
        sorted(wants, key=lambda want: -want.needed_bytes // want.device_count),
    )
    best = _Packed(dict(start))
    for order in orders:
        best = max(best, _Packed(dict(start)).add(order), key=lambda packed: packed.placed_bytes)
        if len(best.places) == len(wants):
            break
    for number in range(rounds):
        missing = [want for want in wants if want not in best.places]
        if not missing or not best.places:
            break
        placed = _shuffled(best.places, number)
        if number % 2:
            # All of a worker: what is in the way of a large one lies there together.
            emptied = best.places[placed[0]].worker_id
            out = [want for want in placed if best.places[want].worker_id == emptied]
        else:
            out = placed[: number // 2 % _MOST_TAKEN_OUT + 1]
        other = best.without(out).add(_shuffled([*missing, *out], -number))
        if other.placed_bytes >= best.placed_bytes:
            best = other
    return {want.name: placed for want, placed in best.places.items()}


def _shuffled(wants: Iterable[Want], number: int) -> list[Want]:
    """The wants in an order that has nothing to do with them, and is the same for the same number."""
    return sorted(wants, key=lambda want: zlib.crc32(f"{number} {want.name}".encode()))
