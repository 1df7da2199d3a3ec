"""Workers that are taken out of service."""

import sys
from dataclasses import replace
from types import FrameType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helios.mesh.errors import NotFound, PreconditionFailed
from helios.proxy.actions import Send
from helios.proxy.core import Core
from helios.proxy.fleet.commands import DrainReplica, StartReplica, StopReplica
from helios.proxy.fleet.state import Load, Replica, ReplicaState
from helios.proxy.routing.pick import Wishes
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import GIB, core, entry, hello, ready, replica


def two_workers() -> Core:
    """A model in use on `w`, beside an empty `v` that has less room."""
    subject = core()
    subject.models_replaced([entry(min_replicas=1)], 0.0, is_synced=True)
    subject.worker_hello(hello("w"), 0.0)
    subject.worker_hello(hello("v", memory_bytes=4 * GIB), 0.0)
    subject.tick(1.0)
    (asked,) = subject.fleet.replicas()
    assert asked.worker_id == "w"
    subject.replica_event("w", 1, ready(asked), 2.0)
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000"}), 2.0)
    return subject


def test_nothing_is_started_on_a_cordoned_worker_and_what_it_has_goes_on() -> None:
    subject = two_workers()
    subject.cordon("w", 3.0, is_cordoned=True)
    assert subject.pick(entry(), "q", 3.0) is not None
    subject.models_replaced([entry(min_replicas=1), entry("n", min_replicas=1)], 3.0, is_synced=True)
    subject.tick(4.0)
    assert [replica.worker_id for replica in subject.fleet.replicas_of("n")] == ["v"]
    subject.cordon("v", 5.0, is_cordoned=True)
    subject.model_upserted(entry("o", min_replicas=1), 5.0)
    assert not subject.fleet.replicas_of("o")
    subject.cordon("w", 6.0, is_cordoned=False)
    subject.tick(7.0)
    assert [replica.worker_id for replica in subject.fleet.replicas_of("o")] == ["w"]


def test_requests_go_elsewhere_than_to_a_cordoned_worker_wherever_another_one_takes_them() -> None:
    subject = core()
    subject.models_replaced([entry(min_replicas=2)], 0.0, is_synced=True)
    for number, worker_id in enumerate(("v", "w")):
        there = replica(f"at-{worker_id}", worker_id=worker_id, address=f"127.0.0.1:100{number}")
        subject.worker_hello(hello(worker_id, replicas=(there,)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)

    def picked(count: int, now: float) -> set[str]:
        chosen = [subject.pick(entry(), f"{now}-{number}", now) for number in range(count)]
        return {candidate.replica_id for pick in chosen if pick is not None for candidate in pick.choices}

    assert picked(4, 1.0) == {"at-v", "at-w"}
    subject.cordon("w", 2.0, is_cordoned=True)
    # However much the other one has to do, and as the next host of a retry, too.
    assert picked(20, 2.0) == {"at-v"}
    assert ("at-w", "cordoned") in subject.traffic.exclusions("m")
    subject.load_report([LoadDelta("at-v", Load(waiting_count=99))], 3.0)
    assert picked(2, 3.0) == {"at-w"}, "a cordon makes nobody wait"
    assert ("at-w", "cordoned") not in subject.traffic.exclusions("m")
    subject.load_report([LoadDelta("at-v", Load())], 4.0)
    subject.cordon("v", 4.0, is_cordoned=True)
    assert picked(4, 4.0) == {"at-v", "at-w"}
    subject.cordon("w", 5.0, is_cordoned=False)
    assert picked(4, 5.0) == {"at-w"}


def many(count: int) -> Core:
    """So many replicas of a model on workers of their own, one of another model on `elsewhere`."""
    subject = core()
    subject.models_replaced([entry(min_replicas=count), entry("n", min_replicas=1)], 0.0, is_synced=True)
    for number in range(count):
        held = replica(f"r{number}", worker_id=f"w{number}", address=f"127.0.0.1:{1000 + number}")
        subject.worker_hello(hello(held.worker_id, replicas=(held,)), 0.0)
    other = replica("other", model="n", worker_id="elsewhere", address="127.0.0.1:999")
    subject.worker_hello(hello("elsewhere", replicas=(other,)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def call_count(subject: Core, request_id: str) -> int:
    """How many functions of Python a pick calls, with what is told of it; each turn of a generator is one."""
    count = 0

    def note(_frame: FrameType, event: str, _arg: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    try:
        subject.pick(entry(), request_id, 1.0)
        subject.traffic.exclusions("m")
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("cordoned", [("elsewhere",), tuple(f"unknown-{number}" for number in range(500))])
def test_a_cordon_of_other_models_workers_has_no_pick_look_at_each_replica(cordoned: tuple[str, ...]) -> None:
    subject = many(200)
    without = call_count(subject, "q1")
    for worker_id in cordoned:
        subject.cordon(worker_id, 1.0, is_cordoned=True)
    assert call_count(subject, "q2") <= without + 10


@given(
    moves=st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from("mmn"), st.sampled_from("vwx"), st.sampled_from((1, 1, 0))),
        min_size=2,
        max_size=12,
    ),
    cordoned=st.sets(st.sampled_from("vwx")),
    lost=st.sets(st.sampled_from("vwx"), max_size=1),
)
@example(moves=[("a", "m", "v", 1), ("b", "m", "x", 1), ("a", "m", "w", 1)], cordoned={"v"}, lost=set())
def test_cordons_count_for_replicas_where_they_are_now(
    moves: list[tuple[str, str, str, int]], cordoned: set[str], lost: set[str]
) -> None:
    subject = core()
    subject.models_replaced([entry("m", min_replicas=9), entry("n", min_replicas=9)], 0.0, is_synced=True)
    told: dict[str, dict[str, Replica]] = {worker_id: {} for worker_id in "vwx"}
    for key, model, worker_id, is_there in moves:
        held = replica(key, model=model, worker_id=worker_id, address=f"127.0.0.1:{1000 + ord(key)}")
        told[worker_id].pop(key, None)
        told[worker_id].update({key: held} if is_there else {})
        subject.worker_hello(hello(worker_id, replicas=tuple(told[worker_id].values())), 0.0)
        subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    for worker_id in cordoned:
        subject.cordon(worker_id, 1.0, is_cordoned=True)
    for worker_id in lost:
        subject.worker_lost(worker_id, 1.0)
    for model in "mn":
        candidates = [one for one in subject.fleet.replicas_of(model) if subject.traffic.is_candidate(one.replica_id)]
        shunned = {one.replica_id for one in candidates if one.worker_id in cordoned}
        expected = shunned if len(shunned) < len(candidates) else set[str]()
        told_of = {one for one, reason in subject.traffic.exclusions(model) if reason == "cordoned"}
        assert told_of == expected
        chosen = subject.pick(entry(model), f"q{model}", 1.0)
        picked = {choice.replica_id for choice in chosen.choices} if chosen is not None else set[str]()
        assert bool(picked) is bool(candidates)
        assert not picked & expected


def test_a_request_that_fits_on_a_cordoned_worker_alone_goes_there() -> None:
    subject = core()
    subject.models_replaced([entry(min_replicas=2)], 0.0, is_synced=True)
    for number, worker_id in enumerate(("v", "w")):
        address, tokens = f"127.0.0.1:100{number}", 1024 << 3 * number
        there = replica(f"at-{worker_id}", worker_id=worker_id, address=address)
        there = replace(there, max_context_tokens=tokens)
        subject.worker_hello(hello(worker_id, replicas=(there,)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    subject.cordon("w", 1.0, is_cordoned=True)
    for tokens, expected in ((100, "at-v"), (4096, "at-w"), (100_000, "at-v")):
        chosen = subject.pick(entry(), f"q{tokens}", 1.0, "", Wishes(context_tokens=tokens))
        assert chosen is not None
        assert [choice.replica_id for choice in chosen.choices] == [expected]


def test_a_cordon_outlives_the_worker_and_a_drained_one_stays_cordoned() -> None:
    subject = two_workers()
    sent = [action.command.order for action in subject.drain_worker("w", 3.0) if isinstance(action, Send)]
    assert [order.replica_id for order in sent if isinstance(order, DrainReplica | StopReplica)] == ["id-1"]
    assert subject.pick(entry(), "q", 3.0) is None, "a replica that drains takes nothing new"
    assert [order.model for order in sent if isinstance(order, StartReplica)] == ["m"]
    (started,) = (each for each in subject.fleet.replicas_of("m") if each.worker_id == "v")
    subject.replica_event("v", 1, ready(started, "127.0.0.1:1001"), 4.0)
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000", "127.0.0.1:1001"}), 4.0)
    assert subject.pick(entry(), "q", 4.0) is not None
    subject.worker_lost("w", 5.0)
    subject.worker_hello(hello("w", incarnation="2"), 6.0)
    assert [worker.hello.worker_id for worker in subject.fleet.open_workers()] == ["v"]


def test_a_worker_that_nobody_knows_is_not_cordoned() -> None:
    with pytest.raises(NotFound) as refused:
        core().check_worker("nobody")
    assert refused.value.reason == "WORKER_NOT_FOUND"


def test_nothing_is_staged_or_woken_on_a_cordoned_worker() -> None:
    subject = two_workers()
    subject.cordon("w", 3.0, is_cordoned=True)
    weighty = replace(entry(), weights_bytes=GIB)
    subject.lifecycle.warmth.keep_staged(weighty, "w")
    (worker, _) = subject.fleet.workers()
    assert not worker.staged
    asleep = replace(replica("asleep"), state=ReplicaState.ASLEEP)
    subject.replica_event("w", 2, asleep, 4.0)
    with pytest.raises(PreconditionFailed) as refused:
        subject.wake(asleep, 4.0)
    assert refused.value.reason == "WORKER_CORDONED"
