"""Who holds which memory and which port on this node: the only place that says yes to a start.

Memory is booked when a start is accepted and released when the replica's whole process tree is gone, because a device
that still holds a dying engine is not free. Ports are slots: an InferencePool takes at most 8 target ports, so a
worker has at most 8 replicas, on fixed consecutive ports in a cluster, on free ones where many workers share a
machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from helios.mesh.errors import AlreadyExists, Overloaded
from helios.worker.supervisor.records import Device, DeviceUse

MAX_SLOTS: Final = 8
NO_CAPACITY: Final = "NO_CAPACITY"


@dataclass(frozen=True, slots=True)
class Booking:
    """What one replica holds."""

    replica_id: str
    device_id: str
    memory_bytes: int
    slot: int
    port: int


class Ledger:
    """Memory by device, and slots.

    Invariants: ``book`` never takes a device over its memory nor two replicas to one port; ``release`` gives back
    exactly what was booked, once. ``adopt`` records what is a fact already, even beyond the limit (a setting was
    lowered between two starts of the supervisor); then nothing is booked until enough was released.

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
        """Returns each device with what is booked on it."""
        return tuple(DeviceUse(device, self._booked_bytes(name)) for name, device in self._devices.items())

    def book(self, replica_id: str, memory_bytes: int) -> Booking:
        """Books memory on the fullest device that has room (best fit), and a slot.

        Raises:
            AlreadyExists: The replica holds a booking.
            Overloaded: NO_CAPACITY; the message says what is short and by how much.
        """
        if replica_id in self._bookings:
            raise AlreadyExists(f"replica {replica_id} is booked already", metadata={"replica_id": replica_id})
        slot = self._free_slot()
        if slot is None:
            raise Overloaded(f"all {self._slot_count} slots of this worker are taken", reason=NO_CAPACITY)
        free = {name: device.memory_bytes - self._booked_bytes(name) for name, device in self._devices.items()}
        fitting = [name for name, free_bytes in free.items() if free_bytes >= memory_bytes]
        if not fitting:
            largest = max(free.values(), default=0)
            raise Overloaded(
                f"the replica needs {_mib(memory_bytes)} and the emptiest device has {_mib(max(largest, 0))} free",
                reason=NO_CAPACITY,
                metadata={"needed_bytes": str(memory_bytes), "free_bytes": str(max(largest, 0))},
            )
        device_id = min(fitting, key=lambda name: free[name])
        booking = Booking(replica_id, device_id, memory_bytes, slot, self._port_of(slot))
        self._bookings[replica_id] = booking
        return booking

    def adopt(self, replica_id: str, memory_bytes: int, port: int) -> Booking:
        """Records a replica that runs already, on the port where it listens.

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
        device_id = max(self._devices, key=lambda name: self._devices[name].memory_bytes - self._booked_bytes(name))
        booking = Booking(replica_id, device_id, memory_bytes, slot, port)
        self._bookings[replica_id] = booking
        return booking

    def release(self, replica_id: str) -> Booking | None:
        """Gives back what the replica held and returns it; None where it held nothing."""
        return self._bookings.pop(replica_id, None)

    def _booked_bytes(self, device_id: str) -> int:
        return sum(booking.memory_bytes for booking in self._bookings.values() if booking.device_id == device_id)

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


def _mib(count_bytes: int) -> str:
    return f"{count_bytes / (1 << 20):.0f} MiB"
