"""Where a replica goes, and who gives way where there is no room. Pure.

Of workers with room, in this order: one with GPUs; one where it takes the fewest devices; one in the zone with the
fewest replicas of the model, then with the fewest itself, so that no zone or node that fails takes a model with it; one
that has the weights in memory, then on its disk; one where it has fewer stages; one whose devices reach each other
fastest; on GPUs the one where the least room is left over (best fit), so that what needs a whole device finds one; on
processors the one with the most room, because replicas share cores.

Where nothing has room, draining replicas are waited for; then idle replicas give way, on the worker where the least is
lost with them; then those in use that have had their turn. What may drain for minutes is waited for only where nothing
else gives way. Where replicas are in their turn, the wait is for its end.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Final

from helios.mesh.gangs import Gang
from helios.proxy.placement.parallelism import Split
from helios.proxy.placement.workers import Occupant, WorkerCapacity

# Every set of so few victims is looked at, on so many of the workers where the least is lost.
_EXACT_VICTIMS: Final = 8
_EXACT_WORKERS: Final = 8


@dataclass(frozen=True, slots=True)
class Placed:
    """Start it here, on these devices; `reason` is for people."""

    worker_id: str
    reason: str = field(default="", compare=False)
    device_ids: tuple[str, ...] = field(default=(), compare=False)
    split: Split | None = field(default=None, compare=False)
    """How its ranks are grouped, where that was open."""


@dataclass(frozen=True, slots=True)
class Preempt:
    """Drain these, on this worker, then look again; `device_ids` is where the replica would go then."""

    worker_id: str
    replica_ids: tuple[str, ...]
    device_ids: tuple[str, ...] = field(default=(), compare=False)
    share_bytes: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Wait:
    """Room is coming: replicas are draining, or no worker is here yet.

    `leaving` are those that take their time, and are waited for by somebody now.
    """

    reason: str
    message: str
    leaving: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, slots=True)
class Impossible:
    """No room, and none is coming."""

    reason: str
    message: str


Plan = Placed | Preempt | Wait | Impossible


def place(engine: str, workers: list[WorkerCapacity], *, may_preempt: bool) -> Plan:
    """Finds room for a replica.

    Args:
        engine: what runs it; empty is the worker's default.
        workers: workers that can be reached; one may come several times, with other ways to split the model.
        may_preempt: whether idle replicas of other models may be drained for it; what has no value gives way to any
            start.
    """
    able = able_workers(engine, workers)
    if not able:
        what = f"with the engine '{engine}' is connected" if engine and workers else "is connected, or all are cordoned"
        return Wait("NO_WORKER", f"no worker {what}")
    roomy = [worker for worker in able if worker.free_host_bytes >= worker.needed_host_bytes]
    if not roomy:
        roomiest = max(able, key=lambda worker: worker.free_host_bytes)
        return Impossible(
            "NO_CAPACITY",
            f"a replica needs {_gib(roomiest.needed_host_bytes)} of host memory beside its device's,"
            f" and {_gib(max(0, roomiest.free_host_bytes))} is what a worker has at most",
        )
    placed = _best(roomy)
    if placed is not None:
        return placed
    large_enough = [worker for worker in roomy if worker.memory_bytes >= worker.needed_bytes]
    if not large_enough:
        return Impossible("NO_CAPACITY", _too_large(roomy))
    if any(worker.draining and worker.fit(worker.draining) for worker in large_enough):
        return Wait("NO_CAPACITY", "replicas of other models are draining to make room")
    preempted = _cheapest(large_enough, may_take_idle=may_preempt)
    if preempted is None and may_preempt and any(worker.turn_over for worker in large_enough):
        turns_over = [replace(each, victims=(*each.victims, *each.turn_over)) for each in large_enough]
        preempted = _cheapest(turns_over, may_take_idle=True)
    if preempted is not None:
        return preempted
    late = next((worker.late for worker in large_enough if _fits_late(worker, may_preempt=may_preempt)), ())
    if late:
        leaving = tuple(occupant.replica_id for occupant in late) if may_preempt else ()
        return Wait("NO_CAPACITY", "replicas that are needed no more still have requests", leaving)
    if may_preempt and any(_fits_in_turn(worker) for worker in large_enough):
        return Wait("NO_CAPACITY", "models that are in use give way in turn")
    return Impossible("NO_CAPACITY", _no_room(large_enough))


def able_workers(engine: str, workers: Iterable[WorkerCapacity]) -> list[WorkerCapacity]:
    """Workers that have the engine; empty is any."""
    return [worker for worker in workers if not engine or engine in worker.engines]


def _best(workers: list[WorkerCapacity]) -> Placed | None:
    fits = [(worker, gang) for worker in workers if (gang := worker.fit()) is not None]
    if not fits:
        return None
    worker, gang = min(fits, key=lambda each: _price(*each))
    return Placed(worker.worker_id, _reason(worker, gang, len(fits)), gang.device_ids, worker.split)


def _price(worker: WorkerCapacity, gang: Gang) -> tuple[object, ...]:
    return (
        not worker.has_gpus,
        worker.device_count,
        worker.same_zone_count,
        worker.same_model_count,
        not worker.is_staged,
        not worker.is_on_disk,
        worker.split.pipeline if worker.split is not None else 1,
        gang.slowest or 0,
        gang.left_bytes if worker.has_gpus else -gang.left_bytes,
        worker.worker_id,
    )


def _reason(worker: WorkerCapacity, gang: Gang, fit_count: int) -> str:
    """Why there, in words: the first that told it from the others."""
    if fit_count == 1:
        why = "is the only one that fits"
    elif worker.is_staged:
        why = "has its weights in memory"
    elif worker.is_on_disk:
        why = "has its weights on disk"
    elif worker.has_gpus:
        why = f"is where the least is left over of {fit_count} that fit"
    else:
        why = f"has the most memory free of {fit_count} that fit"
    where = f" on {', '.join(gang.device_ids)}" if worker.has_gpus else ""
    needed = worker.needed_bytes
    return f"{worker.worker_id} {why}: {_gib(gang.left_bytes + needed)} free{where}, {_gib(needed)} needed"


def _cheapest(workers: list[WorkerCapacity], *, may_take_idle: bool) -> Preempt | None:
    offers = [
        (worker, victims)
        for worker in workers
        if (victims := [victim for victim in worker.victims if may_take_idle or not victim.value])
    ]
    plans: list[tuple[WorkerCapacity, list[Occupant], tuple[Occupant, ...]]] = []
    best = math.inf
    # No set costs less than the cheapest of a worker's victims, so the rest need not be looked at once one costs less.
    for worker, victims in sorted(offers, key=lambda offer: min(victim.value for victim in offer[1])):
        if min(victim.value for victim in victims) > best:
            break
        chosen = _enough(worker, victims)
        if chosen is not None:
            plans.append((worker, victims, chosen))
            best = min(best, _loss(chosen))
    plans.sort(key=lambda plan: _cost(plan[0], plan[2]))
    closer = [(worker, _least(worker, victims, chosen)) for worker, victims, chosen in plans[:_EXACT_WORKERS]]
    if not closer:
        return None
    worker, chosen = min(closer, key=lambda plan: _cost(*plan))
    gang = worker.fit((*worker.draining, *chosen))
    assert gang is not None
    victim_ids = tuple(victim.replica_id for victim in chosen)
    return Preempt(worker.worker_id, victim_ids, gang.device_ids, worker.share_bytes)


def _fits_late(worker: WorkerCapacity, *, may_preempt: bool) -> bool:
    # Whoever would have to give way, too, stays until the late ones are gone.
    idle = worker.victims if may_preempt else ()
    return bool(worker.late) and worker.fit((*worker.draining, *worker.late, *idle)) is not None


def _fits_in_turn(worker: WorkerCapacity) -> bool:
    later = (*worker.turn_over, *worker.in_turn)
    return bool(later) and worker.fit((*worker.draining, *worker.late, *worker.victims, *later)) is not None


def _cost(worker: WorkerCapacity, chosen: tuple[Occupant, ...]) -> tuple[float, int, str]:
    return _loss(chosen), len(chosen), worker.worker_id


def _enough(worker: WorkerCapacity, victims: list[Occupant]) -> tuple[Occupant, ...] | None:
    """Victims whose going makes room, none of which could stay; None where all of them are too few.

    They are taken in the order of their value, from all devices, and from each device alone where one is enough.
    """
    if worker.fit((*worker.draining, *victims)) is None:
        return None
    orders = [sorted(victims, key=lambda victim: victim.value)]
    if worker.device_count == 1:
        orders += [
            [victim for victim in orders[0] if device.device_id in victim.device_ids] for device in worker.devices
        ]
    found = [chosen for order in orders if (chosen := _first_of(worker, order)) is not None]
    return min(found, key=lambda chosen: (_loss(chosen), len(chosen)))


def _first_of(worker: WorkerCapacity, order: list[Occupant]) -> tuple[Occupant, ...] | None:
    gone = list(worker.draining)
    chosen: list[Occupant] = []
    for victim in order:
        chosen.append(victim)
        if worker.fit((*gone, *chosen)) is None:
            continue
        # The last one made it fit, so it stays; of the others, the dearest is spared first.
        for other in sorted(chosen[:-1], key=lambda each: -each.value):
            rest = [each for each in chosen if each is not other]
            if worker.fit((*gone, *rest)) is not None:
                chosen = rest
        return tuple(chosen)
    return None


def _least(worker: WorkerCapacity, victims: list[Occupant], known: tuple[Occupant, ...]) -> tuple[Occupant, ...]:
    """The victims with which the least is lost, by looking at every set of them where that is cheap."""
    best = known
    if len(known) < 2 or len(victims) > _EXACT_VICTIMS:
        return known
    for count in range(1, len(victims) + 1):
        for chosen in combinations(victims, count):
            is_less = (_loss(chosen), count) < (_loss(best), len(best))
            if is_less and worker.fit((*worker.draining, *chosen)) is not None:
                best = chosen
    return best


def _loss(victims: Iterable[Occupant]) -> float:
    return sum(victim.value for victim in victims)


def _too_large(workers: list[WorkerCapacity]) -> str:
    largest = max(workers, key=lambda worker: worker.memory_bytes)
    count = largest.device_count
    where = f"of memory on {count} devices of a node" if count > 1 else "of memory"
    return f"a replica needs {_gib(largest.needed_bytes)} {where}, the largest worker has {_gib(largest.memory_bytes)}"


def _no_room(workers: list[WorkerCapacity]) -> str:
    least = min(workers, key=lambda worker: worker.needed_bytes)
    each = f" on each of {least.device_count} devices" if least.device_count > 1 else ""
    return f"no worker has {_gib(least.share_bytes)} of memory free{each}; replicas of other models are in use"


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
