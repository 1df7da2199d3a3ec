"""Memory and slots: never over-committed by a start, never lost, never given back twice."""

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.mesh.errors import AlreadyExists, Overloaded
from helios.worker.supervisor.ledger import Booking, Ledger
from helios.worker.supervisor.records import Device, DeviceKind

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
    assert book.book("small", GIB).device_id == "cpu:1"
    assert book.book("large", 4 * GIB).device_id == "cpu:0"


def test_adopting_records_a_fact_even_beyond_the_limit_and_blocks_starts() -> None:
    book = ledger(gib=1)
    assert book.adopt("old", 2 * GIB, 9005) == Booking("old", "cpu:0", 2 * GIB, 5, 9005)
    with pytest.raises(Overloaded, match="0 MiB free"):
        book.book("new", 1)


def test_an_adopted_port_of_other_settings_is_not_given_to_a_slot() -> None:
    book = ledger(slots=2)
    book.adopt("foreign", 1, 12345)
    assert book.book("a", 1).port == 9001
    with pytest.raises(AlreadyExists):
        book.adopt("b", 1, 12345)


class Bookings(RuleBasedStateMachine):
    """Books, adopts and releases in any order."""

    names = st.sampled_from("abcdefghijkl")

    def __init__(self) -> None:
        super().__init__()
        self.book = Ledger(
            [device("cpu:0", 8), device("cpu:1", 3)], slot_count=5, base_port=9000, pick_port=lambda taken: 1
        )
        self.expected: dict[str, Booking] = {}
        self.adopted: set[str] = set()

    @rule(name=names, memory_bytes=st.integers(0, 5 * GIB))
    def start(self, name: str, memory_bytes: int) -> None:
        try:
            booking = self.book.book(name, memory_bytes)
        except (Overloaded, AlreadyExists):
            return
        assert name not in self.expected
        self.expected[name] = booking

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
            holders = [b for b in self.book.bookings if b.device_id == use.device.device_id]
            started = sum(b.memory_bytes for b in holders if b.replica_id not in self.adopted)
            assert started <= use.device.memory_bytes
            assert use.booked_bytes == sum(b.memory_bytes for b in holders)

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
