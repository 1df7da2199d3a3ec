"""Who holds which memory and which port on this node: the only place that says yes to a start.

Memory is booked when a start is accepted and released when the replica's whole process tree is gone, because a device
that still holds a dying engine is not free. A replica that sleeps holds what it leaves behind, and books the rest again
before it is woken. Ports are slots: an InferencePool takes at most 8 target ports, so a worker has at most 8 replicas,
on fixed consecutive ports in a cluster, on free ones where many workers share a machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from helios.mesh.errors import AlreadyExists, NotFound, Overloaded, PreconditionFailed
from helios.mesh.gangs import GangDevice, Way, choose_devices
from helios.worker.supervisor.records import Device, DeviceMeasure, DeviceUse, Health, MemoryItem, MemoryKind

MAX_SLOTS: Final = 8
NO_CAPACITY: Final = "NO_CAPACITY"


@dataclass(frozen=True, slots=True)
class Booking:
    """What one replica holds; each of its devices holds an equal share.

    Attributes:
        memory_bytes: Of all devices together, when it is awake.
        items: What that is made of; empty: not known.
        sleeping_bytes: Held instead while it sleeps; None: it is awake.
    """

    replica_id: str
    device_ids: tuple[str, ...]
    memory_bytes: int
    slot: int
    port: int
    items: tuple[MemoryItem, ...] = ()
    sleeping_bytes: int | None = None

    @property
    def held_bytes(self) -> int:
        """What it holds now, of all devices together."""
        return self.memory_bytes if self.sleeping_bytes is None else self.sleeping_bytes

    @property
    def held_items(self) -> tuple[MemoryItem, ...]:
        """What it holds now, item by item; they add up to ``held_bytes``."""
        if self.sleeping_bytes is not None:
            return (MemoryItem(MemoryKind.SLEEPING, self.sleeping_bytes),)
        known = sum(item.size_bytes for item in self.items)
        rest = self.memory_bytes - known
        return (*self.items, MemoryItem(MemoryKind.OVERHEAD, rest)) if rest else self.items

    @property
    def share_bytes(self) -> int:
        """What each of its devices holds now."""
        return share_of(self.held_bytes, len(self.device_ids))


def share_of(memory_bytes: int, device_count: int) -> int:
    """Returns one device's part, rounded up."""
    return -(-memory_bytes // device_count)


class Ledger:
    """Memory by device, and slots.

    Invariants: ``book`` and ``wake`` never take a device over its memory, and ``book`` no two replicas to one port; a
    gang is booked on all of its devices or on none; nothing is booked on a device that is not healthy; ``release``
    gives back exactly what was booked, once. ``adopt`` and ``regrow`` record what is a fact already, even beyond the
    limit (a setting was lowered between two starts of the supervisor); then nothing is booked until enough was freed.

    Args:
        devices: In the order of preference.
        slot_count: 1 to 8.
        base_port: Port of slot 0, the others follow; 0: ``pick_port`` is asked for each booking.
        pick_port: Returns a port that nobody listens on; it is given the ports that are booked.
    """

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        slot_count: int,
        base_port: int,
        pick_port: Callable[[frozenset[int]], int],
    ) -> None:
        if not 1 <= slot_count <= MAX_SLOTS:
            raise ValueError(f"slot_count is {slot_count}, not 1 to {MAX_SLOTS}")
        self._devices = {device.device_id: device for device in devices}
        self._measures: dict[str, DeviceMeasure] = {}
        self._slot_count = slot_count
        self._base_port = base_port
        self._pick_port = pick_port
        self._bookings: dict[str, Booking] = {}

    @property
    def bookings(self) -> tuple[Booking, ...]:
        """What is booked, oldest first."""
        return tuple(self._bookings.values())

    @property
    def slot_count(self) -> int:
        """How many replicas fit by number."""
        return self._slot_count

    def use(self) -> tuple[DeviceUse, ...]:
        """Returns each device with what is booked on it and what was measured of it."""
        return tuple(
            DeviceUse(device, self._booked_bytes(name), self._measures.get(name))
            for name, device in self._devices.items()
        )

    def device(self, device_id: str) -> Device | None:
        """Returns a device by its id."""
        return self._devices.get(device_id)

    def booking(self, replica_id: str) -> Booking | None:
        """Returns what a replica holds."""
        return self._bookings.get(replica_id)

    def note(self, measure: DeviceMeasure) -> tuple[str, ...]:
        """Takes what was measured; returns the replicas on a device that was lost with this very measure."""
        before = self._measures.get(measure.device_id)
        self._measures[measure.device_id] = measure
        if measure.health is not Health.LOST or (before is not None and before.health is Health.LOST):
            return ()
        return tuple(name for name, booking in self._bookings.items() if measure.device_id in booking.device_ids)

    def book(
        self,
        replica_id: str,
        memory_bytes: int,
        *,
        items: tuple[MemoryItem, ...] = (),
        device_ids: tuple[str, ...] = (),
        device_count: int = 1,
    ) -> Booking:
        """Books memory, in equal shares, and a slot.

        Args:
            replica_id: Who.
            memory_bytes: Of all devices together.
            items: What that is made of; their sum is at most ``memory_bytes``.
            device_ids: Exactly these devices; empty: one is the fullest that has room (best fit), several are those
                with room that reach each other fastest.
            device_count: How many, where ``device_ids`` is empty.

        Raises:
            AlreadyExists: The replica holds a booking.
            NotFound: DEVICE_NOT_FOUND.
            Overloaded: NO_CAPACITY; the message says what is short and by how much.
            PreconditionFailed: DEVICE_LOST, of a device that was named.
        """
        if replica_id in self._bookings:
            raise AlreadyExists(f"replica {replica_id} is booked already", metadata={"replica_id": replica_id})
        slot = self._free_slot()
        if slot is None:
            raise Overloaded(f"all {self._slot_count} slots of this worker are taken", reason=NO_CAPACITY)
        share_bytes = share_of(memory_bytes, len(device_ids) or device_count)
        if device_ids:
            self._check_named(device_ids, share_bytes)
        else:
            device_ids = self._choose(share_bytes, device_count)
        booking = Booking(replica_id, device_ids, memory_bytes, slot, self._port_of(slot), items)
        self._bookings[replica_id] = booking
        return booking

    def sleep(self, replica_id: str, left_bytes: int) -> None:
        """Gives back all but what a sleeping replica leaves behind, of all its devices together; unknown: nothing."""
        booking = self._bookings.get(replica_id)
        if booking is not None:
            self._bookings[replica_id] = replace(booking, sleeping_bytes=min(left_bytes, booking.memory_bytes))

    def wake(self, replica_id: str) -> None:
        """Books the whole of a sleeping replica again; nothing happens to one that is awake.

        Raises:
            NotFound: REPLICA_NOT_FOUND.
            Overloaded: NO_CAPACITY: others took the room meanwhile.
            PreconditionFailed: DEVICE_LOST.
        """
        booking = self._bookings.get(replica_id)
        if booking is None:
            raise NotFound(f"there is no replica {replica_id!r} on this worker", reason="REPLICA_NOT_FOUND")
        if booking.sleeping_bytes is None:
            return
        more = share_of(booking.memory_bytes, len(booking.device_ids)) - booking.share_bytes
        self._check_named(booking.device_ids, more)
        self._bookings[replica_id] = replace(booking, sleeping_bytes=None)

    def regrow(self, replica_id: str) -> None:
        """Records that a replica is awake, even where there is no room for it."""
        booking = self._bookings.get(replica_id)
        if booking is not None:
            self._bookings[replica_id] = replace(booking, sleeping_bytes=None)

    def adopt(
        self,
        replica_id: str,
        memory_bytes: int,
        port: int,
        *,
        items: tuple[MemoryItem, ...] = (),
        device_ids: tuple[str, ...] = (),
        sleeping_bytes: int | None = None,
    ) -> Booking:
        """Records a replica that runs already, on the port where it listens.

        ``device_ids`` that are not here any more (another driver, another setting) are replaced by the emptiest device.

        Raises:
            AlreadyExists: The replica holds a booking, or another one holds its port.
            Overloaded: NO_CAPACITY, where no slot is left.
        """
        if replica_id in self._bookings or port in self._ports():
            raise AlreadyExists(
                f"replica {replica_id} or its port {port} is booked already", metadata={"replica_id": replica_id}
            )
        own = port - self._base_port
        slot = own if self._base_port and 0 <= own < self._slot_count else self._free_slot()
        if slot is None or slot in self._slots():
            raise Overloaded(f"all {self._slot_count} slots of this worker are taken", reason=NO_CAPACITY)
        if not device_ids or any(name not in self._devices for name in device_ids):
            device_ids = (max(self._devices, key=self._free_bytes),)
        booking = Booking(replica_id, device_ids, memory_bytes, slot, port, items, sleeping_bytes)
        self._bookings[replica_id] = booking
        return booking

    def release(self, replica_id: str) -> Booking | None:
        """Gives back what the replica held and returns it; None where it held nothing."""
        return self._bookings.pop(replica_id, None)

    def _choose(self, share_bytes: int, device_count: int) -> tuple[str, ...]:
        healthy = [self._gang_device(device) for name, device in self._devices.items() if self._is_healthy(name)]
        gang = choose_devices(healthy, share_bytes, device_count)
        if gang is not None:
            return gang.device_ids
        free = [device.free_bytes for device in healthy]
        largest = max(free, default=0)
        if device_count == 1:
            raise _too_small(share_bytes, largest)
        fitting_count = sum(free_bytes >= share_bytes for free_bytes in free)
        raise Overloaded(
            f"the replica needs {_mib(share_bytes)} on each of {device_count} devices of one kind; "
            f"{fitting_count} of this worker's {len(self._devices)} have that free",
            reason=NO_CAPACITY,
            metadata={"needed_bytes": str(share_bytes), "free_bytes": str(max(largest, 0))},
        )

    def _gang_device(self, device: Device) -> GangDevice:
        return GangDevice(
            device.device_id,
            device.kind.name,
            self._free_bytes(device.device_id),
            bool(device.facts.parent_device_id),
            {link.device_id: Way[link.kind.value] for link in device.facts.links},
        )

    def _check_named(self, device_ids: tuple[str, ...], share_bytes: int) -> None:
        unknown = [name for name in device_ids if name not in self._devices]
        if unknown or len(set(device_ids)) < len(device_ids):
            what = unknown[0] if unknown else "named twice"
            raise NotFound(f"there is no such device on this worker: {what}", reason="DEVICE_NOT_FOUND")
        lost = [name for name in device_ids if not self._is_healthy(name)]
        if lost:
            measure = self._measures[lost[0]]
            message = f"device {lost[0]} can't be used: {measure.health_message or measure.health.value}"
            raise PreconditionFailed(message, reason="DEVICE_LOST", metadata={"device_id": lost[0]})
        tightest = min(map(self._free_bytes, device_ids))
        if tightest < share_bytes:
            raise _too_small(share_bytes, tightest)

    def _is_healthy(self, device_id: str) -> bool:
        measure = self._measures.get(device_id)
        return measure is None or measure.health is Health.HEALTHY

    def _free_bytes(self, device_id: str) -> int:
        return self._devices[device_id].memory_bytes - self._booked_bytes(device_id)

    def _booked_bytes(self, device_id: str) -> int:
        return sum(booking.share_bytes for booking in self._bookings.values() if device_id in booking.device_ids)

    def _slots(self) -> frozenset[int]:
        return frozenset(booking.slot for booking in self._bookings.values())

    def _ports(self) -> frozenset[int]:
        return frozenset(booking.port for booking in self._bookings.values())

    def _free_slot(self) -> int | None:
        taken = self._slots()
        ports = self._ports()
        for slot in range(self._slot_count):
            # A replica that was adopted from other settings may sit on the port of a slot that is not its own.
            if slot not in taken and not (self._base_port and self._base_port + slot in ports):
                return slot
        return None

    def _port_of(self, slot: int) -> int:
        return self._base_port + slot if self._base_port else self._pick_port(self._ports())


def _too_small(needed_bytes: int, free_bytes: int) -> Overloaded:
    return Overloaded(
        f"the replica needs {_mib(needed_bytes)} and the emptiest device has {_mib(max(free_bytes, 0))} free",
        reason=NO_CAPACITY,
        metadata={"needed_bytes": str(needed_bytes), "free_bytes": str(max(free_bytes, 0))},
    )


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):.0f} MiB"
