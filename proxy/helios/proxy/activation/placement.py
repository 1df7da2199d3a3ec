"""Where a replica goes. Pure and thin: the worker with the engine and the most free memory.

Where nothing has room, the least recently used idle replicas of other models make room, as few as suffice. Where
draining replicas will make room by themselves, waiting is the plan; for those that may drain for minutes, only where
nothing else gives way.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Victim:
    """A replica that may be drained for another one: idle, or a spare (on its way to take another one's place)."""

    replica_id: str
    memory_bytes: int
    last_used_at: float
    is_spare: bool = False


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker has left, what draining replicas will give back, and what could be freed.

    Memory is what a replica on as many devices as it wants could have, `needed_bytes` what it books there (processes on
    a GPU take more than on a CPU). `late_bytes` and `late_count` are of replicas that drain for longer than a start can
    wait. `is_staged`: its weights are in memory there. The host's memory is what it has beside a GPU's; nothing is
    drained for it.
    """

    worker_id: str
    engines: tuple[str, ...]
    needed_bytes: int
    memory_bytes: int
    free_bytes: int
    free_slot_count: int
    draining_bytes: int = 0
    draining_count: int = 0
    late_bytes: int = 0
    late_count: int = 0
    victims: tuple[Victim, ...] = ()
    is_staged: bool = False
    needed_host_bytes: int = 0
    free_host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Placed:
    """Start it here; `reason` is for people."""

    worker_id: str
    reason: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Preempt:
    """Drain these, on this worker, then look again."""

    worker_id: str
    replica_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Room is coming: replicas are draining, or no worker is here yet."""

    reason: str
    message: str


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
        workers: workers that can be reached.
        may_preempt: whether idle replicas of other models may be drained for it; spares give way to any start.
    """
    able = [worker for worker in workers if not engine or engine in worker.engines]
    if not able:
        what = f"with the engine '{engine}' " if engine and workers else ""
        return Wait("NO_WORKER", f"no worker {what}is connected")
    roomy = [worker for worker in able if worker.free_host_bytes >= worker.needed_host_bytes]
    if not roomy:
        roomiest = max(able, key=lambda worker: worker.free_host_bytes)
        return Impossible(
            "NO_CAPACITY",
            f"a replica needs {_gib(roomiest.needed_host_bytes)} of host memory beside its device's,"
            f" and {_gib(max(0, roomiest.free_host_bytes))} is what a worker has at most",
        )
    able = roomy
    fitting = [worker for worker in able if worker.free_bytes >= worker.needed_bytes and worker.free_slot_count > 0]
    if fitting:
        chosen = max(fitting, key=lambda worker: (worker.is_staged, worker.free_bytes, worker.worker_id))
        most = f"has the most memory free of {len(fitting)} that fit" if len(fitting) > 1 else "fits"
        if chosen.is_staged:
            most = "has its weights in memory"
        reason = (
            f"{chosen.worker_id} {most}: {_gib(chosen.free_bytes)} of {_gib(chosen.memory_bytes)} free, "
            f"{_gib(chosen.needed_bytes)} needed"
        )
        return Placed(chosen.worker_id, reason)
    large_enough = [worker for worker in able if worker.memory_bytes >= worker.needed_bytes]
    if not large_enough:
        largest = max(able, key=lambda worker: worker.memory_bytes)
        return Impossible(
            "NO_CAPACITY",
            f"a replica needs {_gib(largest.needed_bytes)} of memory, "
            f"the largest worker has {_gib(largest.memory_bytes)}",
        )
    if any(_will_fit(worker) for worker in large_enough):
        return Wait("NO_CAPACITY", "replicas of other models are draining to make room")
    for may_take_idle in (False, True) if may_preempt else (False,):
        plans = [plan for worker in large_enough if (plan := _preempt(worker, may_take_idle)) is not None]
        if plans:
            return min(plans, key=lambda plan: len(plan.replica_ids))
    if any(_will_fit(worker, late=True) for worker in large_enough):
        return Wait("NO_CAPACITY", "a replica that another one replaced still has requests")
    needed_bytes = min(worker.needed_bytes for worker in large_enough)
    return Impossible(
        "NO_CAPACITY", f"no worker has {_gib(needed_bytes)} of memory free; replicas of other models are in use"
    )


def _will_fit(worker: WorkerCapacity, *, late: bool = False) -> bool:
    """Whether what drains makes enough room; `late`: together with what drains for long."""
    coming_bytes = worker.draining_bytes + (worker.late_bytes if late else 0)
    slot_count = worker.free_slot_count + worker.draining_count + (worker.late_count if late else 0)
    return worker.free_bytes + coming_bytes >= worker.needed_bytes and slot_count > 0


def _preempt(worker: WorkerCapacity, may_take_idle: bool) -> Preempt | None:
    free_bytes = worker.free_bytes + worker.draining_bytes
    slot_count = worker.free_slot_count + worker.draining_count
    chosen: list[str] = []
    victims = [victim for victim in worker.victims if victim.is_spare or may_take_idle]
    # Nothing is lost with a spare but the work on it.
    for victim in sorted(victims, key=lambda victim: (not victim.is_spare, victim.last_used_at)):
        chosen.append(victim.replica_id)
        free_bytes += victim.memory_bytes
        slot_count += 1
        if free_bytes >= worker.needed_bytes and slot_count > 0:
            return Preempt(worker.worker_id, tuple(chosen))
    return None


def _gib(count: int) -> str:
    return f"{count / (1 << 30):.1f} GiB"
