"""What placement knows of a worker: devices, who is on them, and what a replica would take there. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from helios.mesh.gangs import Gang, GangDevice, choose_devices
from helios.proxy.placement.parallelism import Split, choose_groups


@dataclass(frozen=True, slots=True)
class Occupant:
    """A replica that takes room on a worker, in equal shares of its devices.

    Attributes:
        device_ids: empty: the worker has not said yet, so it may be on any.
        value: what is lost where it gives way, for comparison with others: expected seconds of waiting, an hour. 0 is
            of one that nobody would miss.
    """

    replica_id: str
    memory_bytes: int
    device_ids: tuple[str, ...] = ()
    value: float = 0.0

    def share_on(self, device_id: str) -> int:
        """What it takes of a device; of an unknown place, all of it, wherever one looks."""
        if not self.device_ids:
            return self.memory_bytes
        return -(-self.memory_bytes // len(self.device_ids)) if device_id in self.device_ids else 0


@dataclass(frozen=True, slots=True)
class WorkerCapacity:
    """What a worker has left for a replica of a certain model, what comes back by itself, and what could be freed.

    Attributes:
        needed_bytes: what the replica books there, of all its devices together: processes on a GPU take more.
        device_count: how many devices it runs on there.
        split: how its ranks are grouped, where that was chosen for this worker; None: as the model's settings say.
        devices: those that can be used, with what nobody books.
        memory_bytes: what such a replica could have at most if the worker were empty.
        draining: replicas that go within seconds.
        late: replicas that drain for longer than a start can wait.
        victims: replicas that may be drained for this one.
        turn_over: replicas in use that may be drained for it, because it has waited for long enough, and they have
            had their turn.
        in_turn: replicas that give way in their turn, and not yet.
        movable: replicas that serve, and that another worker could have instead.
        same_model_count: replicas of the model that are there.
        same_zone_count: replicas of the model in its zone; 0 where it does not tell its zone.
        is_staged: the weights are in memory there.
        is_on_disk: the weights are on the node.
        has_gpus: whether devices have memory of their own. On processors replicas share cores, too.
        needed_host_bytes: host memory that it books beside its device's; nothing is drained for it.
    """

    worker_id: str
    engines: tuple[str, ...]
    needed_bytes: int
    devices: tuple[GangDevice, ...]
    memory_bytes: int
    free_slot_count: int
    device_count: int = 1
    split: Split | None = None
    draining: tuple[Occupant, ...] = ()
    late: tuple[Occupant, ...] = ()
    victims: tuple[Occupant, ...] = ()
    turn_over: tuple[Occupant, ...] = ()
    in_turn: tuple[Occupant, ...] = ()
    movable: tuple[Occupant, ...] = ()
    same_model_count: int = 0
    same_zone_count: int = 0
    is_staged: bool = False
    is_on_disk: bool = False
    has_gpus: bool = False
    needed_host_bytes: int = 0
    free_host_bytes: int = 0

    @property
    def share_bytes(self) -> int:
        """What the replica books on each of its devices."""
        return -(-self.needed_bytes // self.device_count)

    @property
    def free_bytes(self) -> int:
        """What nobody books, of all devices."""
        return sum(max(0, device.free_bytes) for device in self.devices)

    def fit(self, gone: Iterable[Occupant] = ()) -> Gang | None:
        """Where the replica would go once these are gone; None where it does not fit even then."""
        gone = tuple(gone)
        if self.free_slot_count + len(gone) < 1:
            return None
        devices = self.devices
        if gone:
            devices = tuple(
                replace(d, free_bytes=d.free_bytes + sum(one.share_on(d.device_id) for one in gone)) for d in devices
            )
        if self.split is not None:
            return choose_groups(devices, self.share_bytes, self.split)
        return choose_devices(devices, self.share_bytes, self.device_count)
