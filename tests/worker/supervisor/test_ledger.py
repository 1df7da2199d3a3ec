"""Memory and slots: never over-committed by a start, never lost, never given back twice."""

from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.mesh.errors import AlreadyExists, NotFound, Overloaded, PreconditionFailed
from helios.worker.supervisor.host_ledger import HostLedger
from helios.worker.supervisor.ledger import Booking, Ledger
from helios.worker.supervisor.records import (
    Device,
    DeviceFacts,
    DeviceKind,
    DeviceLink,
    DeviceMeasure,
    Health,
    HostUse,
    LinkKind,
    MemoryItem,
    MemoryKind,
)

GIB = 1 << 30


def device(name: str, gib: int) -> Device:
    return Device(name, DeviceKind.CPU, gib * GIB)


def ledger(*, gib: int = 8, slots: int = 8, base_port: int = 9000) -> Ledger:
    return Ledger(
        [device("cpu:0", gib)], slot_count=slots, base_port=base_port, pick_port=lambda taken: 7000 + len(taken)
    )


def test_a_start_beyond_the_memory_is_refused_with_what_is_short() -> None:
    book = ledger(gib=2)
    book.book("a", GIB)
    with pytest.raises(Overloaded, match=r"needs 2048 MiB.*has 1024 MiB free") as caught:
        book.book("b", 2 * GIB)
    assert caught.value.reason == "NO_CAPACITY"


def test_a_start_beyond_the_slots_is_refused() -> None:
    book = ledger(slots=1)
    book.book("a", 1)
    with pytest.raises(Overloaded, match="all 1 slots"):
        book.book("b", 1)


def test_ports_are_consecutive_from_the_base_and_are_used_again() -> None:
    book = ledger(slots=3)
    assert [book.book(name, 1).port for name in "abc"] == [9000, 9001, 9002]
    book.release("b")
    assert book.book("d", 1).port == 9001


def test_without_a_base_port_a_free_one_is_picked() -> None:
    book = ledger(base_port=0)
    assert [book.book(name, 1).port for name in "ab"] == [7000, 7001]


def test_the_fullest_device_that_has_room_is_taken() -> None:
    book = Ledger(
        [device("cpu:0", 8), device("cpu:1", 2)], slot_count=8, base_port=0, pick_port=lambda taken: len(taken) + 1
    )
    assert book.book("small", GIB).device_ids == ("cpu:1",)
    assert book.book("large", 4 * GIB).device_ids == ("cpu:0",)


def test_adopting_records_a_fact_even_beyond_the_limit_and_blocks_starts() -> None:
    book = ledger(gib=1)
    assert book.adopt("old", 2 * GIB, 9005) == Booking("old", ("cpu:0",), 2 * GIB, 5, 9005)
    with pytest.raises(Overloaded, match="0 MiB free"):
        book.book("new", 1)


def test_an_adopted_port_of_other_settings_is_not_given_to_a_slot() -> None:
    book = ledger(slots=2)
    book.adopt("foreign", 1, 12345)
    assert book.book("a", 1).port == 9001
    with pytest.raises(AlreadyExists):
        book.adopt("b", 1, 12345)


def gpus(count: int = 4, gib: int = 80) -> list[Device]:
    """Cards in pairs: 0 and 1, 2 and 3 have NVLink, the rest goes through the processor."""

    def links(number: int) -> tuple[DeviceLink, ...]:
        others = [other for other in range(count) if other != number]
        kinds = {other: LinkKind.NVLINK if other // 2 == number // 2 else LinkKind.SYSTEM for other in others}
        return tuple(DeviceLink(f"cuda:{other}", kinds[other]) for other in others)

    return [
        Device(f"cuda:{number}", DeviceKind.CUDA, gib * GIB, DeviceFacts(links=links(number)))
        for number in range(count)
    ]


def gpu_ledger(devices: list[Device]) -> Ledger:
    return Ledger(devices, slot_count=8, base_port=9000, pick_port=lambda _: 1)


def test_a_gang_is_booked_in_equal_shares_on_the_devices_that_are_closest() -> None:
    book = gpu_ledger(gpus())
    book.book("small", GIB, device_ids=("cuda:0",))
    assert book.book("gang", 160 * GIB, device_count=2).device_ids == ("cuda:2", "cuda:3")
    assert [use.booked_bytes // GIB for use in book.use()] == [1, 0, 80, 80]


def test_a_gang_that_does_not_fit_on_all_of_its_devices_books_none() -> None:
    book = gpu_ledger(gpus(2))
    book.book("small", 50 * GIB, device_ids=("cuda:1",))
    with pytest.raises(Overloaded, match="on each of 2 devices of one kind; 1 of this worker's 2"):
        book.book("gang", 100 * GIB, device_count=2)
    with pytest.raises(Overloaded):
        book.book("gang", 100 * GIB, device_ids=("cuda:0", "cuda:1"))
    assert [use.booked_bytes // GIB for use in book.use()] == [0, 50]


def test_slices_of_a_card_are_no_gang() -> None:
    slices = [
        Device(f"cuda:0/mig:{n}", DeviceKind.CUDA, 40 * GIB, DeviceFacts(parent_device_id="cuda:0")) for n in (0, 1)
    ]
    book = gpu_ledger(slices)
    with pytest.raises(Overloaded):
        book.book("gang", 2 * GIB, device_count=2)
    assert book.book("single", GIB).device_ids == ("cuda:0/mig:0",)


@pytest.mark.parametrize("health", [Health.LOST, Health.DEGRADED])
def test_nothing_is_booked_on_a_device_that_is_not_healthy(health: Health) -> None:
    book = gpu_ledger(gpus(2))
    book.book("victim", GIB, device_ids=("cuda:0",))
    lost = book.note(DeviceMeasure("cuda:0", health, "fell off the bus"))
    assert lost == (("victim",) if health is Health.LOST else ())
    assert book.note(DeviceMeasure("cuda:0", health, "still gone")) == ()
    assert book.book("other", GIB).device_ids == ("cuda:1",)
    with pytest.raises(PreconditionFailed, match="cuda:0 can't be used: still gone"):
        book.book("third", GIB, device_ids=("cuda:0",))
    with pytest.raises(Overloaded):
        book.book("gang", 2 * GIB, device_count=2)


def test_a_sleeping_replica_holds_what_it_left_and_wakes_only_where_there_is_room() -> None:
    book = gpu_ledger(gpus(1, gib=10))
    items = (MemoryItem(MemoryKind.WEIGHTS, 6 * GIB), MemoryItem(MemoryKind.KV_CACHE, 2 * GIB))
    booking = book.book("a", 9 * GIB, items=items)
    assert booking.held_items == (*items, MemoryItem(MemoryKind.OVERHEAD, GIB))
    book.sleep("a", GIB)
    asleep = book.booking("a")
    assert asleep is not None
    assert asleep.held_items == (MemoryItem(MemoryKind.SLEEPING, GIB),)
    book.book("b", 9 * GIB)
    with pytest.raises(Overloaded):
        book.wake("a")
    book.release("b")
    book.wake("a")
    assert book.booking("a") == booking


def test_host_memory_is_booked_once_a_revision_and_corrected_when_its_size_is_known() -> None:
    host = HostLedger(10)
    host.book("r1", 4)
    host.book("r1", 6)
    with pytest.raises(Overloaded, match="MiB are free to stage"):
        host.book("r2", 5)
    assert host.use() == HostUse(10, 6)
    host.release("r1")
    host.release("r1")
    assert host.use() == HostUse(10, 0)


class Bookings(RuleBasedStateMachine):
    """Books, adopts, puts to sleep, wakes and releases in any order, on one device or several."""

    names = st.sampled_from("abcdefghijkl")

    def __init__(self) -> None:
        super().__init__()
        devices = [device("cpu:0", 8), device("cpu:1", 3), *gpus(3, gib=4)]
        self.book = Ledger(devices, slot_count=5, base_port=9000, pick_port=lambda taken: 1)
        self.unhealthy: set[str] = set()
        self.expected: dict[str, Booking] = {}
        self.adopted: set[str] = set()

    @rule(
        name=names,
        memory_bytes=st.integers(0, 9 * GIB),
        count=st.integers(1, 3),
        named=st.sampled_from([(), (), ("cuda:0",), ("cuda:0", "cuda:2"), ("cpu:1", "cpu:1"), ("nowhere",)]),
    )
    def start(self, name: str, memory_bytes: int, count: int, named: tuple[str, ...]) -> None:
        try:
            booking = self.book.book(name, memory_bytes, device_count=count, device_ids=named)
        except (Overloaded, AlreadyExists, NotFound, PreconditionFailed):
            return
        assert name not in self.expected
        assert len(set(booking.device_ids)) == (len(named) or count)
        assert not self.unhealthy & set(booking.device_ids)
        self.expected[name] = booking

    @rule(name=names, left_bytes=st.integers(0, 9 * GIB))
    def fall_asleep(self, name: str, left_bytes: int) -> None:
        self.book.sleep(name, left_bytes)
        if (booking := self.expected.get(name)) is not None:
            self.expected[name] = replace(booking, sleeping_bytes=min(left_bytes, booking.memory_bytes))

    @rule(name=names, is_fact=st.booleans())
    def wake(self, name: str, is_fact: bool) -> None:
        try:
            if is_fact:
                self.book.regrow(name)
            else:
                self.book.wake(name)
        except (Overloaded, NotFound, PreconditionFailed):
            return
        if (booking := self.expected.get(name)) is not None:
            if is_fact and booking.sleeping_bytes is not None:
                self.adopted.add(name)
            self.expected[name] = replace(booking, sleeping_bytes=None)

    @rule(device_id=st.sampled_from(["cpu:0", "cuda:0", "cuda:1"]), health=st.sampled_from(Health))
    def measure(self, device_id: str, health: Health) -> None:
        self.book.note(DeviceMeasure(device_id, health))
        (self.unhealthy.discard if health is Health.HEALTHY else self.unhealthy.add)(device_id)

    @rule(name=names, memory_bytes=st.integers(0, 5 * GIB), port=st.integers(8998, 9006))
    def adopt(self, name: str, memory_bytes: int, port: int) -> None:
        try:
            booking = self.book.adopt(name, memory_bytes, port)
        except (Overloaded, AlreadyExists):
            return
        self.expected[name] = booking
        self.adopted.add(name)

    @rule(name=names)
    def release(self, name: str) -> None:
        assert self.book.release(name) == self.expected.pop(name, None)
        self.adopted.discard(name)

    @invariant()
    def never_over_commits_by_a_start(self) -> None:
        for use in self.book.use():
            holders = [b for b in self.book.bookings if use.device.device_id in b.device_ids]
            if not any(b.replica_id in self.adopted for b in holders):
                assert use.booked_bytes <= use.device.memory_bytes
            assert use.booked_bytes == sum(b.share_bytes for b in holders)

    @invariant()
    def items_add_up_to_what_is_held(self) -> None:
        for booking in self.book.bookings:
            assert sum(item.size_bytes for item in booking.held_items) == booking.held_bytes
            assert booking.share_bytes * len(booking.device_ids) >= booking.held_bytes

    @invariant()
    def slots_and_ports_have_one_holder(self) -> None:
        slots = [b.slot for b in self.book.bookings]
        ports = [b.port for b in self.book.bookings]
        assert len(set(slots)) == len(slots) <= 5
        assert len(set(ports)) == len(ports)

    @invariant()
    def holds_exactly_what_was_booked(self) -> None:
        assert {b.replica_id: b for b in self.book.bookings} == self.expected


TestBookings = Bookings.TestCase
