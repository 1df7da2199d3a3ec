"""Measures devices and replicas, over and over, for as long as the worker runs."""

import asyncio
from typing import Final, Protocol

from helios.worker.supervisor.process_tree import find_tree
from helios.worker.supervisor.records import DeviceMeasure, ReplicaState, ReplicaView, WorkerView

# Walking the pages of a process costs the kernel some 20 ms a GiB (4 ms of each second, for one replica at every fifth
# round), and what a replica holds hardly changes: it is measured once a minute, and soon after its state changed.
_ROUNDS: Final = 30
# A change below this share is noise, and every change is an event to every proxy.
_WORTH_TELLING: Final = 0.01


class Inventory(Protocol):
    """What measures."""

    def measure(self) -> tuple[DeviceMeasure, ...]:
        """Measures each device. Blocks."""
        ...

    def process_bytes(self, pids: frozenset[int]) -> int | None:
        """Returns what processes hold; None where that can't be told. Blocks."""
        ...


class Listener(Protocol):
    """Who is told: the supervisor."""

    def view(self) -> WorkerView:
        """Returns the worker as it stands."""
        ...

    def note_measure(self, measure: DeviceMeasure) -> None:
        """Takes what was measured of a device."""
        ...

    def note_memory(self, replica_id: str, measured_bytes: int) -> None:
        """Takes what a replica holds."""
        ...


async def keep_measuring(inventory: Inventory, listener: Listener, *, interval_seconds: float) -> None:
    """Measures until cancelled. What did not change is not told again."""
    told: dict[str, DeviceMeasure] = {}
    seen: set[tuple[str, ReplicaState]] = set()
    number = 0
    while True:
        for measure in await asyncio.to_thread(inventory.measure):
            if told.get(measure.device_id) != measure:
                told[measure.device_id] = measure
                listener.note_measure(measure)
        measurable = _measurable(listener.view())
        for replica in measurable.values():
            # Soon after it became ready or fell asleep, and then now and again.
            if (replica.replica_id, replica.state) not in seen or number % _ROUNDS == 0:
                await _measure_replica(inventory, listener, replica)
        seen = {(replica.replica_id, replica.state) for replica in measurable.values()}
        number += 1
        await asyncio.sleep(interval_seconds)


def _measurable(worker: WorkerView) -> dict[str, ReplicaView]:
    """Returns the replicas that stand still: ready, or asleep; not those that still fall asleep."""
    return {
        replica.replica_id: replica
        for replica in worker.replicas
        if replica.state is ReplicaState.READY or replica.sleeping_bytes is not None
    }


async def _measure_replica(inventory: Inventory, listener: Listener, replica: ReplicaView) -> None:
    if replica.process is None:
        return
    tree = await asyncio.to_thread(find_tree, replica.process)
    pids = frozenset(entry.identity.pid for entry in tree)
    held = await asyncio.to_thread(inventory.process_bytes, pids)
    now = _measurable(listener.view()).get(replica.replica_id)
    if now is None or now.state is not replica.state:
        # It fell asleep or woke meanwhile: what was measured says nothing of what it holds now.
        return
    known = replica.memory_bytes if replica.state is ReplicaState.ASLEEP else replica.measured_bytes
    if held and abs(held - known) > _WORTH_TELLING * held:
        listener.note_memory(replica.replica_id, held)
