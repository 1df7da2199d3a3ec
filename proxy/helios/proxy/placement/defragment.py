"""Which replicas would have to move so that another one fits. Pure: a proposal, nothing is moved by it.

Memory that is free in pieces is of no use to a replica that needs it in one. Where each replica on some device could
run elsewhere as well, moving a few makes a place: start the other one, then drain this one, and no request is lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

from helios.mesh.gangs import Gang
from helios.proxy.placement.place import able_workers
from helios.proxy.placement.workers import Occupant, WorkerCapacity

# More moves than this cost more than the place is worth. The rest bounds what a proposal takes: it is made on the
# proxy's event loop, once a minute for a model.
_MOST_MOVES: Final = 2
_MOST_CANDIDATES: Final = 4
_MOST_WORKERS: Final = 4
_MOST_HOMES: Final = 32


@dataclass(frozen=True, slots=True)
class Move:
    """Run it there instead."""

    replica_id: str
    from_worker: str
    to_worker: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """After these moves the replica fits on this worker."""

    worker_id: str
    moves: tuple[Move, ...]

    @property
    def moved_bytes(self) -> int:
        """What the moved replicas book."""
        return sum(move.memory_bytes for move in self.moves)

    @property
    def text(self) -> str:
        """For people."""
        moves = ", ".join(f"{move.replica_id} to {move.to_worker}" for move in self.moves)
        return f"it would fit on {self.worker_id} after moving {moves}"


def propose(engine: str, workers: Sequence[WorkerCapacity]) -> Proposal | None:
    """Finds the fewest moves, then those with the least memory; None where two make no place.

    The four workers with the most free memory are looked at, the four smallest replicas of each, and 32 workers where
    they could go. Moves stay between workers of the same kind, with the same engines: what a replica would book on
    another is not known here.
    """
    best: Proposal | None = None
    able = [each for each in able_workers(engine, workers) if each.free_host_bytes >= each.needed_host_bytes]
    if sum(worker.free_bytes for worker in able) < min((worker.needed_bytes for worker in able), default=0):
        return None
    roomiest = sorted(able, key=lambda each: (-each.free_bytes, each.worker_id))
    for worker in roomiest[:_MOST_WORKERS]:
        candidates = sorted(worker.movable, key=lambda each: each.memory_bytes)[:_MOST_CANDIDATES]
        for count in range(1, min(_MOST_MOVES, len(candidates)) + 1):
            if best is not None and count > len(best.moves):
                break
            for chosen in combinations(candidates, count):
                size = sum(each.memory_bytes for each in chosen)
                if best is not None and (len(best.moves), best.moved_bytes) <= (count, size):
                    continue
                if worker.fit(chosen) is None:
                    continue
                moves = _rehouse(worker, chosen, roomiest[:_MOST_HOMES])
                if moves is not None:
                    best = Proposal(worker.worker_id, moves)
    return best


def _rehouse(
    origin: WorkerCapacity, chosen: Sequence[Occupant], workers: Sequence[WorkerCapacity]
) -> tuple[Move, ...] | None:
    """Finds a place elsewhere for each, the largest first; None where one has none."""
    left = {
        worker.worker_id: worker
        for worker in workers
        if worker is not origin and worker.has_gpus is origin.has_gpus and set(origin.engines) <= set(worker.engines)
    }
    moves: list[Move] = []
    for occupant in sorted(chosen, key=lambda each: -each.memory_bytes):
        fits: list[tuple[int, str, Gang]] = []
        for worker in left.values():
            gang = _as_needed(worker, occupant).fit()
            if gang is not None:
                fits.append((gang.left_bytes, worker.worker_id, gang))
        if not fits:
            return None
        _, worker_id, gang = min(fits, key=lambda fit: fit[:2])
        moves.append(Move(occupant.replica_id, origin.worker_id, worker_id, occupant.memory_bytes))
        left[worker_id] = _with(left[worker_id], replace(occupant, device_ids=gang.device_ids))
    return tuple(moves)


def _as_needed(worker: WorkerCapacity, occupant: Occupant) -> WorkerCapacity:
    count = max(1, len(occupant.device_ids))
    return replace(worker, needed_bytes=occupant.memory_bytes, device_count=count)


def _with(worker: WorkerCapacity, occupant: Occupant) -> WorkerCapacity:
    devices = tuple(
        replace(device, free_bytes=device.free_bytes - occupant.share_on(device.device_id)) for device in worker.devices
    )
    return replace(worker, devices=devices, free_slot_count=worker.free_slot_count - 1)
