"""Workers that are taken out of service."""

from dataclasses import replace

import pytest

from helios.mesh.errors import NotFound, PreconditionFailed
from helios.proxy.actions import Send
from helios.proxy.core import Core
from helios.proxy.fleet.commands import DrainReplica, StartReplica, StopReplica
from helios.proxy.fleet.state import Load, ReplicaState
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
