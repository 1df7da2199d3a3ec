"""What waits for a proxy: nothing lost, nothing twice, nothing out of order, and bounded."""

from datetime import UTC, datetime

import hypothesis.strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.worker.supervisor.commands import Ack
from helios.worker.supervisor.outbox import LoadReport, Outbox, ReplicaEvent
from helios.worker.supervisor.records import FinishedRequest, Load, LoadDelta, Order, ReplicaState, ReplicaView


def view(replica_id: str, state: ReplicaState) -> ReplicaView:
    return ReplicaView(Order(replica_id, "m", "sha256:0", "vllm", 1, 1, 0, datetime(2026, 1, 1, tzinfo=UTC)), state)


def finished(request_id: str) -> FinishedRequest:
    return FinishedRequest(request_id, 0, 1, 1, None, 0.1)


def box(capacity: int = 100) -> Outbox:
    return Outbox(lambda _: None, capacity)


def test_loads_wait_until_due_and_fold_into_the_last_one() -> None:
    outbox = box()
    outbox.put_delta(LoadDelta("a", Load(running_requests=1), started=("1",)))
    outbox.put_delta(LoadDelta("a", Load(running_requests=2), started=("2",)))
    assert outbox.take(is_load_due=False) == []
    assert outbox.take(is_load_due=True) == [
        LoadReport((LoadDelta("a", Load(running_requests=2), started=("1", "2")),))
    ]
    assert len(outbox) == 0


def test_the_end_of_a_request_is_sent_at_once() -> None:
    outbox = box()
    outbox.put_delta(LoadDelta("a", Load(), started=("1",)))
    assert not outbox.has_urgent
    outbox.put_delta(LoadDelta("a", Load(), finished=(finished("1"),)))
    assert outbox.has_urgent
    [report] = outbox.take(is_load_due=False)
    assert isinstance(report, LoadReport)
    assert report.deltas[0].started == ("1",)


def test_the_last_load_of_a_replica_leaves_before_its_end() -> None:
    outbox = box()
    outbox.put_delta(LoadDelta("a", Load(), started=("1",)))
    outbox.put_event(ReplicaEvent(1, view("a", ReplicaState.FAILED)))
    kinds = [type(message) for message in outbox.take(is_load_due=False)]
    assert kinds == [LoadReport, ReplicaEvent]


def test_a_box_that_is_full_empties_itself_and_stays_given_up() -> None:
    outbox = box(capacity=3)
    for number in range(10):
        outbox.put_ack(Ack(str(number)))
        outbox.put_delta(LoadDelta("a", Load(), started=(str(number),)))
    assert outbox.is_overflowed
    assert len(outbox) == 0


class Deliveries(RuleBasedStateMachine):
    """Puts and takes in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox = box(capacity=10_000)
        self.number = 0
        self.ordered_in: list[object] = []
        self.ordered_out: list[object] = []
        self.requests_in: list[str] = []
        self.requests_out: list[str] = []

    @rule(replica_id=st.sampled_from("ab"), is_end=st.booleans())
    def event(self, replica_id: str, is_end: bool) -> None:
        self.number += 1
        event = ReplicaEvent(self.number, view(replica_id, ReplicaState.STOPPED if is_end else ReplicaState.READY))
        self.outbox.put_event(event)
        self.ordered_in.append(event)

    @rule()
    def ack(self) -> None:
        self.number += 1
        self.outbox.put_ack(Ack(str(self.number)))
        self.ordered_in.append(Ack(str(self.number)))

    @rule(replica_id=st.sampled_from("ab"), is_finished=st.booleans())
    def load(self, replica_id: str, is_finished: bool) -> None:
        self.number += 1
        name = str(self.number)
        delta = (
            LoadDelta(replica_id, Load(), (), (finished(name),))
            if is_finished
            else LoadDelta(replica_id, Load(), (name,))
        )
        self.outbox.put_delta(delta)
        self.requests_in.append(name)

    @rule(is_load_due=st.booleans())
    def take(self, is_load_due: bool) -> None:
        for message in self.outbox.take(is_load_due=is_load_due):
            if isinstance(message, LoadReport):
                for delta in message.deltas:
                    self.requests_out += [*delta.started, *(request.request_id for request in delta.finished)]
            else:
                self.ordered_out.append(message)

    @invariant()
    def events_and_acks_leave_in_order(self) -> None:
        assert self.ordered_out == self.ordered_in[: len(self.ordered_out)]

    @invariant()
    def requests_leave_at_most_once(self) -> None:
        assert len(self.requests_out) == len(set(self.requests_out))

    def teardown(self) -> None:
        self.take(is_load_due=True)
        assert self.ordered_out == self.ordered_in
        assert sorted(self.requests_out) == sorted(self.requests_in)


TestDeliveries = Deliveries.TestCase
