"""The gate: slots, the cap, a start before a prefetch, equal shares."""

import threading
import time

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.mesh.errors import Unavailable
from helios.mesh.transfer.gate import DownloadGate, Flow, GatePolicy, Priority, Ticket

SLOTS = 3
RATE = 100
CHUNK = 50


def test_transfers_of_one_priority_get_the_same_share() -> None:
    policy = GatePolicy(slot_count=1)
    flows = [policy.open(Priority.START) for _ in range(3)]
    for _ in range(30):
        waiting = [policy.ask(flow, CHUNK) for flow in flows for _ in range(4)]
        granted = policy.grant(0.0)
        assert len(granted) == 1
        for ticket in waiting:
            policy.end(ticket, 0.0)
    assert [flow.served_bytes for flow in flows] == [10 * CHUNK] * 3


def test_a_later_transfer_neither_waits_for_its_peers_nor_makes_them_wait() -> None:
    policy = GatePolicy(slot_count=1)
    old = policy.open(Priority.START)
    for _ in range(100):
        ticket = policy.ask(old, CHUNK)
        assert policy.grant(0.0) == [ticket]
        policy.end(ticket, 0.0)
    new = policy.open(Priority.START)
    order = []
    for _ in range(6):
        tickets = [policy.ask(old, CHUNK), policy.ask(new, CHUNK)]
        order += [ticket.flow is new for ticket in policy.grant(0.0)]
        for ticket in tickets:
            policy.end(ticket, 0.0)
    assert sum(order) == 3


def test_a_prefetch_that_somebody_comes_to_wait_for_reads_beside_other_starts() -> None:
    policy = GatePolicy(slot_count=1)
    priority = Priority.PREFETCH
    prefetch = policy.open(lambda: priority)
    for _ in range(100):
        ticket = policy.ask(prefetch, CHUNK)
        assert policy.grant(0.0) == [ticket]
        policy.end(ticket, 0.0)
    start = policy.open(Priority.START)
    order = []
    for number in range(12):
        priority = Priority.START if number >= 6 else Priority.PREFETCH
        tickets = [policy.ask(prefetch, CHUNK), policy.ask(start, CHUNK)]
        order += [ticket.flow is prefetch for ticket in policy.grant(0.0)]
        for ticket in tickets:
            policy.end(ticket, 0.0)
    assert order[:6] == [False] * 6
    assert sum(order[6:]) == 3, "what it got before counts for nothing: the same share from now on"


def test_nothing_less_urgent_is_begun_while_a_transfer_reads_and_all_is_when_it_only_waits() -> None:
    policy = GatePolicy(slot_count=SLOTS)
    start, prefetch = policy.open(Priority.START), policy.open(Priority.PREFETCH)
    reading = policy.ask(start, CHUNK)
    waiting = policy.ask(prefetch, CHUNK)
    assert policy.grant(0.0) == [reading]
    policy.end(reading, 1.0)
    assert policy.grant(1.1) == [], "between two of its chunks"
    assert policy.grant(2.0) == [waiting], "its source asked for a pause"
    another = policy.ask(prefetch, CHUNK)
    assert policy.grant(2.0) == [another]
    policy.end(another, 2.1)
    reading, another = policy.ask(start, CHUNK), policy.ask(prefetch, CHUNK)
    assert policy.grant(2.1) == [reading]
    policy.end(reading, 2.2)
    policy.close(start)
    assert policy.grant(2.2) == [another], "it has ended"


def test_a_chunk_larger_than_any_burst_passes_and_is_paid_for() -> None:
    policy = GatePolicy(slot_count=2, bytes_per_second=RATE)
    flow = policy.open(Priority.START)
    first, second = policy.ask(flow, 10 * RATE), policy.ask(flow, 1)
    assert policy.grant(0.0) == [first]
    assert policy.wait_seconds() == pytest.approx(10.0)
    assert policy.grant(9.9) == []
    assert policy.grant(10.0) == [second]


def test_a_waiter_is_ended_by_its_check() -> None:
    gate = DownloadGate(slot_count=1)
    cancelled = threading.Event()

    def check() -> None:
        if cancelled.is_set():
            raise Unavailable("cancelled")

    with gate.flow(Priority.START) as flow, gate.admit(flow, 1, check):
        timer = threading.Timer(0.05, cancelled.set)
        timer.start()
        started = time.monotonic()
        with pytest.raises(Unavailable), gate.admit(flow, 1, check):
            pytest.fail("the only slot is taken")
        assert time.monotonic() - started < 2.0
        timer.join()
    # The slot of the one that was cancelled is nobody's.
    with gate.flow(Priority.START) as flow, gate.admit(flow, 1, lambda: None):
        pass


class GateRules(RuleBasedStateMachine):
    """Transfers come, ask, end and go in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = GatePolicy(slot_count=SLOTS, bytes_per_second=RATE)
        self.now = 0.0
        self.flows: list[Flow] = []
        self.waiting: list[Ticket] = []
        self.granted: list[Ticket] = []
        self.granted_bytes = 0

    @rule(priority=st.sampled_from(Priority))
    def open(self, priority: Priority) -> None:
        self.flows.append(self.policy.open(priority))

    @precondition(lambda self: self.flows)
    @rule(data=st.data(), count=st.integers(1, CHUNK))
    def ask(self, data: st.DataObject, count: int) -> None:
        self.waiting.append(self.policy.ask(data.draw(st.sampled_from(self.flows)), count))

    @rule(seconds=st.floats(0, 2))
    def grant(self, seconds: float) -> None:
        self.now += seconds
        granted = self.policy.grant(self.now)
        reading = [ticket.flow.priority for ticket in self.granted]
        for ticket in granted:
            assert all(ticket.flow.priority <= priority for priority in reading), "nothing less urgent is begun"
            self.waiting.remove(ticket)
            self.granted.append(ticket)
            self.granted_bytes += ticket.count
            assert all(ticket.flow.priority <= other.flow.priority for other in self.waiting if other not in granted)
        if not granted and self.waiting and len(self.granted) < SLOTS and not self.policy.wait_seconds():
            urgent = min(ticket.flow.priority for ticket in self.waiting)
            # A slot is free and somebody waits, and it is not the cap.
            assert any(flow.priority < urgent and flow.is_reading(self.now) for flow in self.flows)

    @precondition(lambda self: self.waiting + self.granted)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        ticket = data.draw(st.sampled_from(self.waiting + self.granted))
        (self.granted if ticket.is_granted else self.waiting).remove(ticket)
        self.policy.end(ticket, self.now)

    @precondition(lambda self: self.flows)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        flow = data.draw(st.sampled_from(self.flows))
        if any(ticket.flow is flow for ticket in self.waiting + self.granted):
            return
        self.flows.remove(flow)
        self.policy.close(flow)

    @invariant()
    def never_more_than_the_slots_at_a_time(self) -> None:
        assert len(self.granted) <= SLOTS

    @invariant()
    def never_faster_than_the_cap_by_more_than_one_chunk(self) -> None:
        assert self.granted_bytes <= self.now * RATE + CHUNK + 1 + 1e-6


TestGatePolicy = GateRules.TestCase
