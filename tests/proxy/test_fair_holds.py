"""Queues of the whole core: a busy engine's place goes to who is next by rank and share, and nobody is lost."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helios.mesh.errors import Overloaded, QuotaExceeded
from helios.proxy import actions
from helios.proxy.admission.keyring import ANYBODY, Caller
from helios.proxy.core import Core
from helios.proxy.fleet.state import Load, ReplicaState
from helios.proxy.holds import Hold, HoldLimits, Holds
from helios.proxy.traffic import LoadDelta, RoutingPolicy
from tests.proxy.support import core, entry, hello, policy, replica

HOG = Caller("key-1", "hog")
SMALL = Caller("key-2", "small")
HEAVY = Caller("key-3", "heavy", weight=3)
BOSS = Caller("key-4", "boss", priority=3)
BATCH = Caller("key-5", "batch", priority=1)


def busy_core(*, limits: HoldLimits | None = None, queue_count: int = 2) -> Core:
    """A core whose one replica has as many requests waiting as it may have."""
    settings = replace(policy(holds=limits), routing=RoutingPolicy(queue_count=queue_count))
    subject = core(settings)
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(hello(replicas=(replica(),)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    report(subject, 0.0, waiting=queue_count)
    return subject


def report(subject: Core, now: float, *, waiting: int) -> list[str]:
    """The replica tells its load; returns which requests went there for it."""
    picked = subject.traffic.ledger.statistics().reserved_count
    todo = subject.load_report([LoadDelta("r", Load(running_count=8, waiting_count=waiting))], now)
    released = [action.hold.request_id for action in todo if isinstance(action, actions.Release)]
    # What was sent there has arrived by the next report.
    arrived = tuple(released)
    subject.load_report([LoadDelta("r", Load(8, waiting + len(released) if waiting else 2), arrived)], now)
    assert subject.traffic.ledger.statistics().reserved_count == picked
    return released


def hold(subject: Core, request_id: str, caller: Caller = ANYBODY, *, size_bytes: int = 400) -> list[actions.Action]:
    assert subject.pick(entry(), request_id, 1.0) is None
    _, todo = subject.hold(entry(), request_id, size_bytes=size_bytes, deadline=99.0, now=1.0, caller=caller)
    return todo


def test_a_replica_with_a_free_engine_takes_all() -> None:
    subject = busy_core()
    subject.load_report([LoadDelta("r", Load(running_count=200))], 1.0)
    assert all(subject.pick(entry(), f"q{number}", 1.0) for number in range(100))


def test_a_busy_engine_is_picked_again_when_it_has_room() -> None:
    subject = busy_core()
    hold(subject, "q1")
    hold(subject, "q2")
    assert report(subject, 2.0, waiting=2) == []
    # One waits, so one more may.
    assert report(subject, 3.0, waiting=1) == ["q1"]
    assert subject.traffic.is_candidate("r"), "it has endpoints and readiness, just no room"
    assert report(subject, 4.0, waiting=1) == ["q2"]


def test_what_is_on_its_way_counts_as_waiting_and_its_end_makes_room() -> None:
    subject = busy_core()
    subject.load_report([LoadDelta("r", Load(8, 1))], 1.0)
    assert subject.pick(entry(), "lost", 1.0) is not None
    assert subject.pick(entry(), "q1", 1.0) is None
    hold(subject, "q1")
    subject.worker_seen("w", 15.0)
    todo = subject.tick(1.0 + 15.0)
    assert [action.hold.request_id for action in todo if isinstance(action, actions.Release)] == ["q1"]


def test_another_replica_takes_what_a_busy_one_does_not() -> None:
    subject = busy_core()
    other = replica("s", address="127.0.0.1:1001")
    subject.worker_hello(hello(replicas=(replica(), other)), 1.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 1.0)
    subject.load_report([LoadDelta("r", Load(8, 2)), LoadDelta("s", Load(300, 0))], 1.0)
    picked = subject.pick(entry(), "q", 1.0)
    assert picked is not None
    assert [choice.replica_id for choice in picked.choices] == ["s"]


def test_a_replica_that_ends_while_it_is_busy_is_forgotten() -> None:
    subject = busy_core()
    failed = replace(replica(), state=ReplicaState.FAILED, failure_reason="CRASHED")
    assert subject.traffic.busy == {"r"}
    subject.replica_event("w", 1, failed, 1.0)
    # While any is busy, every pick of every model looks for it among its candidates.
    assert subject.traffic.busy == set()


def test_a_small_tenant_does_not_wait_behind_a_hog() -> None:
    subject = busy_core()
    for number in range(20):
        hold(subject, f"hog {number}", HOG)
    hold(subject, "small", SMALL)
    order = [name for now in range(2, 6) for name in report(subject, float(now), waiting=1)]
    assert order.index("small") <= 1


def test_a_weight_is_a_share() -> None:
    subject = busy_core()
    for number in range(40):
        hold(subject, f"hog {number}", HOG)
        hold(subject, f"heavy {number}", HEAVY)
    order = [name.partition(" ")[0] for now in range(2, 42) for name in report(subject, float(now), waiting=1)]
    assert len(order) == 40
    assert 28 <= order.count("heavy") <= 32


def test_rank_goes_first_and_the_lowest_has_its_turns() -> None:
    subject = busy_core()
    for number in range(20):
        hold(subject, f"batch {number}", BATCH)
        hold(subject, f"boss {number}", BOSS)
    order = [name.partition(" ")[0] for now in range(2, 18) for name in report(subject, float(now), waiting=1)]
    assert order == (["boss"] * 7 + ["batch"]) * 2


def test_a_tenant_has_its_part_of_a_queue_and_no_more() -> None:
    subject = busy_core(limits=HoldLimits(model_count=10, tenant_count=3))
    for number in range(3):
        hold(subject, f"hog {number}", HOG)
    with pytest.raises(QuotaExceeded) as caught:
        hold(subject, "hog 3", HOG)
    assert caught.value.reason == "TENANT_QUEUE_FULL"
    assert caught.value.retry_after_seconds is not None
    hold(subject, "small", SMALL)


def test_whoever_is_put_out_is_told_so_with_a_time() -> None:
    subject = busy_core(limits=HoldLimits(model_count=3))
    for number in range(3):
        hold(subject, f"batch {number}", BATCH)
    todo = hold(subject, "boss", BOSS)
    failed = [action for action in todo if isinstance(action, actions.Fail)]
    assert [action.hold.request_id for action in failed] == ["batch 2"]
    assert isinstance(failed[0].error, Overloaded)
    assert failed[0].error.retry_after_seconds is not None
    with pytest.raises(Overloaded):
        hold(subject, "batch 3", BATCH)


@given(callers=st.lists(st.sampled_from([HOG, SMALL, HEAVY, BOSS, BATCH, ANYBODY]), min_size=1, max_size=30))
def test_every_request_that_is_held_is_served_once(callers: list[Caller]) -> None:
    subject = busy_core()
    for number, caller in enumerate(callers):
        hold(subject, f"q{number}", caller)
    served = [name for now in range(2, 2 + len(callers)) for name in report(subject, float(now), waiting=1)]
    assert sorted(served) == sorted(f"q{number}" for number in range(len(callers)))


class FairHoldsMachine(RuleBasedStateMachine):
    """Holds of many callers against a plain dict."""

    LIMITS = HoldLimits(model_count=4, tenant_count=2, total_count=6, total_bytes=100)

    @initialize()
    def begin(self) -> None:
        self.holds = Holds(self.LIMITS)
        self.held: dict[int, Hold] = {}
        self.next_id = 0

    @rule(
        model=st.sampled_from("ab"),
        caller=st.sampled_from([HOG, SMALL, HEAVY, BOSS, BATCH, ANYBODY]),
        size=st.integers(0, 40),
        adapter=st.sampled_from(["", "x"]),
    )
    def admit(self, model: str, caller: Caller, size: int, adapter: str) -> None:
        self.next_id += 1
        hold = Hold(
            self.next_id, "q", model, size, 0.0, 9.0, adapter=adapter, caller=caller, cost_tokens=1 + self.next_id % 7
        )
        try:
            shed = self.holds.admit(hold)
        except (Overloaded, QuotaExceeded):
            return
        self.held[hold.hold_id] = hold
        if shed is not None:
            assert shed.model == model
            assert (shed.caller.priority, shed.caller.tenant) != (caller.priority, caller.tenant)
            assert shed.caller.priority <= caller.priority
            del self.held[shed.hold_id]

    @rule(model=st.sampled_from("ab"), adapter=st.sampled_from(["", "x"]))
    def release(self, model: str, adapter: str) -> None:
        lane = [hold for hold in self.held.values() if (hold.model, hold.adapter) == (model, adapter)]
        first = next(iter(self.holds.next_of_lane(model, adapter)), None)
        assert (first is None) == (not lane)
        if first is not None:
            # Of one tenant and rank, the one that came first.
            mates = [one.hold_id for one in lane if one.caller == first.caller]
            assert first.hold_id == min(mates)
            self.holds.release(first.hold_id)
            del self.held[first.hold_id]

    @rule(number=st.integers(1, 40))
    def leave(self, number: int) -> None:
        assert self.holds.remove(number) == self.held.pop(number, None)

    @rule(model=st.sampled_from("ab"), adapter=st.sampled_from(["", "x"]))
    def fail_a_lane(self, model: str, adapter: str) -> None:
        lane = [hold for hold in self.held.values() if (hold.model, hold.adapter) == (model, adapter)]
        assert self.holds.take_lane(model, adapter) == lane
        for hold in lane:
            del self.held[hold.hold_id]

    @invariant()
    def test_no_bound_is_exceeded(self) -> None:
        statistics = self.holds.statistics()
        assert statistics.count == len(self.held) <= 6
        assert statistics.size_bytes == sum(hold.size_bytes for hold in self.held.values()) <= 100
        for model in "ab":
            of_model = [hold for hold in self.held.values() if hold.model == model]
            assert self.holds.count(model) == len(of_model) <= 4
            for caller in (HOG, SMALL, HEAVY, BOSS, BATCH):
                assert sum(hold.caller == caller for hold in of_model) <= 2


TestFairHolds = FairHoldsMachine.TestCase
