"""The core as a whole: what clients and workers see of its decisions."""

from dataclasses import replace

import pytest

from helios.mesh.errors import HoldExpired, ModelNotFound, NoReadyReplica, Overloaded, PreconditionFailed
from helios.mesh.transfer.progress import TransferProgress
from helios.proxy import actions
from helios.proxy.activation.ends import OF_THE_WORKER
from helios.proxy.core import Core
from helios.proxy.fleet.commands import DrainReplica, EvictRevision, StartReplica, StopReplica
from helios.proxy.fleet.state import Load, ReplicaState
from helios.proxy.holds import HoldLimits
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import GIB, core, entry, hello, policy, ready, replica


def sent(todo: list[actions.Action]) -> list[object]:
    return [action.command.order for action in todo if isinstance(action, actions.Send)]


def warm(subject: Core, *, now: float = 0.0) -> None:
    """Brings one replica of the model m up and publishes it."""
    subject.worker_hello(hello(replicas=(replica(),)), now)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), now)


def known(subject: Core, *models: str) -> None:
    subject.models_replaced([entry(name) for name in models or ("m",)], 0.0, is_synced=True)


def test_a_ready_and_acknowledged_replica_is_picked() -> None:
    subject = core()
    known(subject)
    warm(subject)
    pick = subject.pick(entry(), "q1", 1.0)
    assert pick is not None
    assert pick.endpoints == "127.0.0.1:1000"
    assert [choice.replica_id for choice in pick.choices] == ["r"]
    assert pick.explain() == "the best of 1: 1.000 (queue 1.00, running 1.00, kv 1.00)"


def test_no_replica_is_picked_before_envoy_acknowledged_its_endpoint() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(replicas=(replica(),)), 0.0)
    assert subject.pick(entry(), "q1", 1.0) is None
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=100.0, now=1.0)
    assert sent(todo) == []
    todo = subject.endpoints_acknowledged(subject.fleet.endpoints(), 2.0)
    assert [action.pick.endpoints for action in todo if isinstance(action, actions.Release)] == ["127.0.0.1:1000"]


def test_an_unknown_model_is_not_found_only_while_the_catalogue_is_in_step() -> None:
    subject = core()
    assert subject.resolve("new") is None
    known(subject)
    with pytest.raises(ModelNotFound):
        subject.resolve("new")
    subject.catalogue.is_synced = False
    assert subject.resolve("new") is None
    assert subject.resolve("m") == entry()


def test_two_concurrent_first_requests_start_one_replica() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    first, todo = subject.hold(entry(), "q1", size_bytes=10, deadline=100.0, now=1.0)
    second, again = subject.hold(entry(), "q2", size_bytes=10, deadline=100.0, now=1.0)
    starts = sent([*todo, *again])
    assert len(starts) == 1
    assert isinstance(starts[0], StartReplica)
    asked = subject.fleet.replica(starts[0].replica_id)
    assert asked is not None
    subject.replica_event("w", 1, ready(asked), 5.0)
    todo = subject.endpoints_acknowledged(subject.fleet.endpoints(), 5.1)
    released = [action.hold for action in todo if isinstance(action, actions.Release)]
    assert released == [first, second]
    assert subject.traffic.ledger.reserved_count(asked.replica_id) == 2


def test_a_hold_expires_with_an_honest_retry_after() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    hold, _ = subject.hold(entry(), "q1", size_bytes=0, deadline=3.0, now=1.0)
    assert subject.expire_holds(2.9) == []
    (failed,) = subject.expire_holds(3.0)
    assert isinstance(failed, actions.Fail)
    assert failed.hold == hold
    assert isinstance(failed.error, HoldExpired)
    # The first start is guessed at 5 s, and 2 s have passed.
    assert failed.error.retry_after_seconds == pytest.approx(3.0)


def test_a_request_whose_time_is_over_is_not_held() -> None:
    subject = core()
    known(subject)
    with pytest.raises(HoldExpired):
        subject.hold(entry(), "q1", size_bytes=0, deadline=1.0, now=1.0)


def test_full_holds_shed_with_retry_after() -> None:
    subject = core(policy(holds=HoldLimits(model_count=1)))
    known(subject)
    subject.worker_hello(hello(), 0.0)
    subject.hold(entry(), "q1", size_bytes=0, deadline=9.0, now=1.0)
    with pytest.raises(Overloaded) as caught:
        subject.hold(entry(), "q2", size_bytes=0, deadline=9.0, now=1.0)
    assert caught.value.retry_after_seconds is not None


def test_a_failed_start_releases_holds_with_the_reason_and_backs_off() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=1.0)
    (start,) = sent(todo)
    assert isinstance(start, StartReplica)
    gone = replica(start.replica_id, state=ReplicaState.FAILED)
    object.__setattr__(gone, "failure_reason", "ENGINE_DIED")
    todo = subject.replica_event("w", 1, gone, 2.0)
    (failed,) = [action for action in todo if isinstance(action, actions.Fail)]
    assert isinstance(failed.error, NoReadyReplica)
    assert failed.error.metadata["cause"] == "ENGINE_DIED"
    assert failed.error.retry_after_seconds == pytest.approx(1.0)
    assert sent(todo) == []
    _, todo = subject.hold(entry(), "q2", size_bytes=0, deadline=99.0, now=2.5)
    assert [type(action) for action in todo] == [actions.Fail, actions.ActivationFailed]
    _, todo = subject.hold(entry(), "q3", size_bytes=0, deadline=99.0, now=3.1)
    assert [type(order) for order in sent(todo)] == [StartReplica]


def refuse(subject: Core, todo: list[actions.Action], reason: str, now: float) -> list[actions.Action]:
    """The worker of the one start among these actions refuses it."""
    (send,) = [action for action in todo if isinstance(action, actions.Send)]
    command = send.command
    return subject.command_acknowledged(
        command.worker_id, command.command_id, refused_reason=reason, message="full", now=now
    )


def test_a_start_that_a_worker_refuses_for_what_it_is_fails_the_holds() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=1.0)
    todo = refuse(subject, todo, "INVALID_ENGINE_SETTINGS", 1.1)
    (failed,) = [action for action in todo if isinstance(action, actions.Fail)]
    assert failed.error.metadata["cause"] == "INVALID_ENGINE_SETTINGS"
    assert subject.fleet.replicas_of("m") == ()


@pytest.mark.parametrize("reason", sorted(OF_THE_WORKER))
def test_a_start_that_a_worker_has_no_room_for_goes_to_another_one_and_waits(reason: str) -> None:
    subject = core()
    known(subject)
    for name in ("w1", "w2"):
        subject.worker_hello(hello(name), 0.0)
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=1.0)
    first = refuse(subject, todo, reason, 1.1)
    second = refuse(subject, first, reason, 1.2)
    asked = [send.command.worker_id for send in (*todo, *first, *second) if isinstance(send, actions.Send)]
    assert sorted(asked) == ["w1", "w2"]
    assert not [action for action in second if isinstance(action, actions.Fail)]
    assert subject.holds.count("m") == 1
    # They are asked again, not at once, and for as long as the request waits.
    ordered: list[tuple[float, type]] = []
    for now in (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0):
        for name in ("w1", "w2"):
            subject.worker_seen(name, now)
        ordered += [(now, type(order)) for order in sent(subject.tick(now))]
    assert ordered == [(7.0, StartReplica)]


def test_a_worker_that_is_not_heard_of_may_have_room_that_no_other_one_has() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello("large"), 0.0)
    subject.worker_hello(hello("small", memory_bytes=GIB // 2), 0.0)
    subject.worker_lost("large", 1.0)
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=1.5)
    assert not [action for action in todo if isinstance(action, actions.Fail)]
    assert [type(order) for order in sent(subject.worker_seen("large", 2.0))] == [StartReplica]
    subject = core()
    known(subject)
    subject.worker_hello(hello("large"), 0.0)
    subject.worker_hello(hello("small", memory_bytes=GIB // 2), 0.0)
    subject.worker_lost("large", 1.0)
    subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=1.5)
    # It does not come back: after so long it is believed in no more.
    subject.worker_seen("small", 31.0)
    (failed,) = [action for action in subject.tick(31.1) if isinstance(action, actions.Fail)]
    assert failed.error.reason == "NO_CAPACITY"


def test_a_client_that_leaves_is_not_counted_any_more() -> None:
    subject = core()
    known(subject)
    hold, _ = subject.hold(entry(), "q1", size_bytes=7, deadline=99.0, now=1.0)
    subject.cancel_hold(hold)
    assert subject.holds.statistics().count == 0
    assert subject.holds.statistics().size_bytes == 0


def test_an_unreachable_workers_replicas_are_unpicked_but_keep_their_endpoints() -> None:
    subject = core()
    known(subject)
    warm(subject)
    subject.worker_hello(hello("with room"), 0.0)
    subject.worker_lost("w", 10.0)
    assert subject.pick(entry(), "q1", 11.0) is None
    assert subject.fleet.endpoints() == {"127.0.0.1:1000"}
    hold, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=11.0)
    # Back in time: no duplicate was started where there was room, and it is picked again.
    for now in (12.0, 20.0):
        todo += subject.worker_seen("with room", now) + subject.tick(now)
    assert sent(todo) == []
    todo = subject.worker_hello(hello(replicas=(replica(),), incarnation="2"), 21.0)
    assert [action.hold for action in todo if isinstance(action, actions.Release)] == [hold]
    assert sent(todo) == []


def test_a_worker_that_stays_away_is_replaced_after_its_grace() -> None:
    subject = core()
    known(subject)
    warm(subject)
    subject.worker_lost("w", 10.0)
    subject.tick(41.0)
    assert subject.fleet.endpoints() == frozenset()
    todo = subject.worker_hello(hello("w2"), 42.0)
    _, more = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=42.0)
    assert [type(order) for order in sent([*todo, *more])] == [StartReplica]


def test_a_silent_worker_is_unpicked() -> None:
    subject = core()
    known(subject)
    warm(subject)
    subject.tick(2.9)
    assert subject.pick(entry(), "q1", 2.9) is not None
    subject.tick(3.1)
    assert subject.pick(entry(), "q2", 3.1) is None


def test_a_silent_worker_that_speaks_again_is_picked_again() -> None:
    subject = core()
    known(subject)
    warm(subject)
    subject.tick(3.1)
    hold, _ = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=3.2)
    todo = subject.worker_seen("w", 4.0)
    assert [action.hold for action in todo if isinstance(action, actions.Release)] == [hold]


def test_a_worker_that_is_silent_beyond_its_grace_has_to_say_hello_again() -> None:
    subject = core()
    known(subject)
    warm(subject)
    subject.tick(3.1)
    assert actions.Disconnect("w") in subject.tick(34.0)
    subject.worker_seen("w", 35.0)
    assert subject.pick(entry(), "q1", 35.0) is None


def test_a_reconnect_resends_unacknowledged_commands_with_the_same_id() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=1.0)
    (first,) = [action for action in todo if isinstance(action, actions.Send)]
    subject.worker_lost("w", 2.0)
    todo = subject.worker_hello(hello(), 3.0)
    (again,) = [action for action in todo if isinstance(action, actions.Send)]
    assert again.command == first.command
    assert len(subject.fleet.replicas_of("m")) == 1


def test_a_start_lost_with_its_worker_is_tried_again_and_holds_go_on() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=1.0)
    (send,) = [action for action in todo if isinstance(action, actions.Send)]
    subject.command_acknowledged("w", send.command.command_id, refused_reason="", message="", now=1.1)
    todo = subject.worker_hello(hello(incarnation="2"), 4.0)
    assert [type(order) for order in sent(todo)] == [StartReplica]
    assert subject.holds.count("m") == 1


def test_a_restarted_proxy_starts_nothing_until_its_workers_are_back() -> None:
    subject = core(known_workers=["w", "w2"])
    known(subject)
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=0.5)
    # The one that is back has room; the other one may have a replica.
    todo += subject.worker_hello(hello("w2"), 1.0) + subject.tick(1.5)
    assert sent(todo) == []
    assert not subject.is_resynchronised
    todo = subject.worker_hello(hello("w", replicas=(replica(),)), 2.0)
    assert subject.is_resynchronised
    assert sent(todo) == []
    todo = subject.endpoints_acknowledged(subject.fleet.endpoints(), 2.1)
    assert len([action for action in todo if isinstance(action, actions.Release)]) == 1


def test_a_restarted_proxy_goes_on_after_the_grace_time() -> None:
    subject = core(known_workers=["gone", "w"])
    known(subject)
    subject.worker_hello(hello("w"), 0.2)
    subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=0.5)
    subject.worker_seen("w", 4.8)
    assert sent(subject.tick(4.9)) == []
    todo = subject.tick(5.0)
    assert actions.FleetResynchronised(is_complete=False) in todo
    assert [type(order) for order in sent(todo)] == [StartReplica]


def test_an_old_revision_gets_no_request_and_is_drained() -> None:
    subject = core()
    known(subject)
    warm(subject)
    newer = entry(revision="sha256:2")
    todo = subject.model_upserted(newer, 1.0)
    assert [type(order) for order in sent(todo)] == [DrainReplica, StartReplica]
    assert subject.pick(newer, "q1", 1.0) is None


def test_answers_end_at_an_old_revision_unless_its_room_is_waited_for() -> None:
    subject = core()
    known(subject)
    warm(subject)
    assert subject.pick(entry(), "q1", 0.5) is not None
    newer = entry(revision="sha256:2")
    todo = subject.model_upserted(newer, 1.0)
    assert [type(order) for order in sent(todo)] == [DrainReplica, StartReplica]
    assert DrainReplica("r", 3600.0) in sent(todo)
    subject = core()
    known(subject)
    subject.worker_hello(hello(replicas=(replica(),), memory_bytes=GIB), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    assert subject.pick(entry(), "q1", 0.5) is not None
    assert sent(subject.model_upserted(newer, 1.0))[0] == DrainReplica("r", 3600.0)
    subject.worker_seen("w", 2.0)
    _, todo = subject.hold(newer, "q2", size_bytes=0, deadline=99.0, now=2.0)
    assert sent(todo) == [DrainReplica("r", 30.0)], "all of the model's requests wait"
    todo = subject.replica_event("w", 1, replica(state=ReplicaState.STOPPED), 3.0)
    assert [type(order) for order in sent(todo)] == [StartReplica]


def test_a_deleted_models_replicas_are_drained_and_holds_told() -> None:
    subject = core()
    known(subject)
    warm(subject)
    subject.endpoints_acknowledged(frozenset(), 0.5)
    subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=1.0)
    todo = subject.model_deleted("m", 1.0)
    assert [type(order) for order in sent(todo)] == [DrainReplica]
    (failed,) = [action for action in todo if isinstance(action, actions.Fail)]
    assert isinstance(failed.error, ModelNotFound)


def test_nothing_is_kept_of_a_deleted_models_use() -> None:
    subject = core()
    known(subject)
    warm(subject)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.5)
    assert subject.pick(entry(), "q1", 1.0) is not None
    subject.drain_model(entry(), 2.0)
    assert (subject.traffic.forgotten(), subject.traffic.last_wanted_at("m")) == ({"m": 2.0}, 1.0)
    subject.model_deleted("m", 3.0)
    subject.tick(4.0)
    subject.replica_event("w", 1, replica(state=ReplicaState.STOPPED), 5.0)
    assert (subject.traffic.forgotten(), dict(subject.traffic.uses())) == ({}, {})
    assert subject.traffic.last_wanted_at("m") == 0.0


def test_the_breaker_takes_a_failing_replica_out_and_lets_one_probe_in() -> None:
    subject = core()
    known(subject)
    warm(subject)
    for number in range(3):
        subject.load_report([LoadDelta("r", Load(), finished=((f"q{number}", 14),))], 1.0)
    assert subject.pick(entry(), "q9", 1.0) is None
    subject.worker_seen("w", 3.0)
    subject.tick(3.1)
    assert subject.pick(entry(), "probe", 3.1) is not None
    assert subject.pick(entry(), "too early", 3.1) is None
    subject.load_report([LoadDelta("r", Load(), finished=(("probe", 0),))], 3.2)
    assert subject.pick(entry(), "q10", 3.3) is not None


def test_an_idle_replica_makes_room_for_another_model() -> None:
    subject = core()
    known(subject, "m", "n")
    subject.worker_hello(hello(replicas=(replica(),), memory_bytes=GIB), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    _, todo = subject.hold(entry("n"), "q1", size_bytes=0, deadline=99.0, now=1.0)
    assert sent(todo) == [DrainReplica("r", 30.0)]
    todo = subject.replica_event("w", 1, replica(state=ReplicaState.STOPPED), 2.0)
    assert [type(order) for order in sent(todo)] == [StartReplica]
    # The model that gave way is not started again by itself, though there is room by then.
    todo = subject.worker_hello(hello("another"), 3.0) + subject.tick(3.0)
    assert sent(todo) == []
    _, todo = subject.hold(entry(), "q2", size_bytes=0, deadline=99.0, now=3.5)
    assert [type(order) for order in sent(todo)] == [StartReplica]


def test_a_busy_replica_is_waited_for_where_it_may_give_way_and_said_to_be_in_the_way_where_not() -> None:
    subject = core()
    known(subject, "m", "n")
    subject.worker_hello(hello(replicas=(replica(),), memory_bytes=GIB), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    assert subject.pick(entry(), "q0", 0.5) is not None
    _, todo = subject.hold(entry("n"), "q1", size_bytes=0, deadline=99.0, now=1.0)
    assert sent(todo) == []
    assert not [action for action in todo if isinstance(action, actions.Fail)]
    # What the policy promises never gives way.
    todo = subject.model_upserted(entry(min_replicas=1), 2.0) + subject.tick(3.0)
    (failed,) = [action for action in todo if isinstance(action, actions.Fail)]
    assert isinstance(failed.error, NoReadyReplica)
    assert failed.error.reason == "NO_CAPACITY"


@pytest.mark.parametrize("was_used", [False, True], ids=["first", "again"])
def test_a_start_that_takes_longer_than_a_model_may_be_idle_comes_up_though_who_asked_has_left(
    *, was_used: bool
) -> None:
    """Killed before it is ready, it would never come up for clients that wait for less than a start takes."""
    subject = core(policy(idle_seconds=20.0))
    known(subject)
    subject.worker_hello(hello(), 0.0)
    if was_used:
        subject.traffic.use("m", -1000.0)
    hold, todo = subject.hold(entry(), "q", size_bytes=1, deadline=100.0, now=1.0)
    (start,) = sent(todo)
    assert isinstance(start, StartReplica)
    subject.cancel_hold(hold)
    for now in range(2, 30):
        subject.worker_seen("w", now)
        assert sent(subject.tick(float(now))) == []
    asked = subject.fleet.replica(start.replica_id)
    assert asked is not None
    subject.replica_event("w", 1, ready(asked), 30.0)
    # Whoever was told to come again then finds it.
    for now in range(30, 50):
        subject.worker_seen("w", now)
        assert sent(subject.tick(float(now))) == []
    subject.worker_seen("w", 51.0)
    assert sent(subject.tick(51.0)) == [DrainReplica(start.replica_id, 30.0)]


def test_a_start_may_take_as_long_as_it_likes_while_it_gets_further() -> None:
    """No fixed time is enough for every model: a hundred gigabytes over a slow line take hours."""
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    _, todo = subject.hold(entry(), "q", size_bytes=1, deadline=9000.0, now=0.0)
    (start,) = sent(todo)
    assert isinstance(start, StartReplica)
    asked = subject.fleet.replica(start.replica_id)
    assert asked is not None
    orders: list[object] = []
    for minute in range(1, 121):
        fetch = TransferProgress(minute << 30, 200 << 30)
        coming = replace(asked, state=ReplicaState.FETCHING, fetch=fetch)
        orders += sent(subject.replica_event("w", minute, coming, 60.0 * minute))
        orders += sent(subject.tick(60.0 * minute))
    assert orders == []
    subject.worker_seen("w", 7400.0)
    assert sent(subject.tick(7400.0)) == []
    # Nothing comes any more: five minutes, and what 1 GiB takes from the slowest disk.
    for now in (7510.0, 7520.0):
        subject.worker_seen("w", now)
        orders += sent(subject.tick(now))
    assert orders == [StopReplica(start.replica_id)]
    assert "no further" in subject.lifecycle.failure("m")


def test_min_replicas_are_kept_without_a_request() -> None:
    subject = core()
    subject.models_replaced([entry(min_replicas=1)], 0.0, is_synced=True)
    todo = subject.worker_hello(hello(), 1.0)
    todo += subject.tick(1.0)
    assert [type(order) for order in sent(todo)] == [StartReplica]


def test_an_idle_model_goes_to_zero() -> None:
    subject = core(policy(idle_seconds=60.0))
    known(subject)
    warm(subject)
    subject.worker_seen("w", 59.0)
    assert sent(subject.tick(59.0)) == []
    subject.worker_seen("w", 61.0)
    assert sent(subject.tick(61.0)) == [DrainReplica("r", 30.0)]
    assert subject.pick(entry(), "q", 61.0) is None


def test_a_crashed_replica_of_a_model_in_use_comes_back_by_itself() -> None:
    subject = core()
    known(subject)
    warm(subject)
    gone = replica(state=ReplicaState.FAILED)
    todo = subject.replica_event("w", 1, gone, 2.0)
    assert [type(order) for order in sent(todo)] == [StartReplica]


def test_evicting_drains_then_drops_the_bytes() -> None:
    subject = core()
    known(subject)
    warm(subject)
    count, todo = subject.evict(entry(), 1.0)
    assert count == 1
    assert sent(todo) == [DrainReplica("r", 30.0)]
    todo = subject.replica_event("w", 1, replica(state=ReplicaState.STOPPED), 2.0)
    todo += subject.tick(2.0)
    assert sent(todo) == [EvictRevision("sha256:1")]
    with pytest.raises(PreconditionFailed):
        subject.evict(entry(min_replicas=1), 3.0)


def test_scaling_down_stops_what_is_not_ready_yet() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    todo = subject.preload(entry(), 1.0)
    assert [type(order) for order in sent(todo)] == [StartReplica]
    todo = subject.drain_model(entry(), 2.0)
    assert [type(order) for order in sent(todo)] == [StopReplica]


def test_a_model_scaled_to_zero_stays_there_until_it_is_asked_for() -> None:
    subject = core()
    known(subject)
    warm(subject)
    assert subject.pick(entry(), "q1", 1.0) is not None
    assert sent(subject.drain_model(entry(), 2.0)) == [DrainReplica("r", 30.0)]
    # It drains, and its last request ends: neither is a new use.
    assert sent(subject.replica_event("w", 1, replica(state=ReplicaState.DRAINING), 2.1)) == []
    assert sent(subject.load_report([LoadDelta("r", Load(), ("q1",), (("q1", 0),))], 2.2)) == []
    assert sent(subject.replica_event("w", 2, replica(state=ReplicaState.STOPPED), 2.3)) == []
    assert sent(subject.tick(2.9)) == []
    _, todo = subject.hold(entry(), "q2", size_bytes=0, deadline=99.0, now=2.9)
    assert [type(order) for order in sent(todo)] == [StartReplica]


def test_stopping_a_start_on_purpose_is_no_failure_of_the_model() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    (start,) = sent(subject.preload(entry(), 1.0))
    assert isinstance(start, StartReplica)
    subject.drain_model(entry(), 2.0)
    subject.replica_event("w", 1, replica(start.replica_id, state=ReplicaState.STOPPED), 2.1)
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=2.2)
    assert [type(order) for order in sent(todo)] == [StartReplica]


def test_a_request_that_comes_while_the_model_stops_starts_it_anew() -> None:
    subject = core()
    known(subject)
    subject.worker_hello(hello(), 0.0)
    subject.preload(entry(), 1.0)
    subject.drain_model(entry(), 2.0)
    _, todo = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=2.0)
    assert [type(order) for order in sent(todo)] == [StartReplica]


def test_a_deleted_models_bytes_leave_the_nodes_unless_another_model_has_them() -> None:
    alone, shared = core(), core()
    known(alone)
    known(shared, "m", "same bytes")
    for subject, orders in ((alone, [EvictRevision("sha256:1")]), (shared, [])):
        warm(subject)
        subject.model_deleted("m", 1.0)
        todo = subject.replica_event("w", 1, replica(state=ReplicaState.STOPPED), 2.0)
        todo += subject.tick(2.0)
        assert [order for order in sent(todo) if isinstance(order, EvictRevision)] == orders


def test_a_worker_that_runs_anew_may_do_what_it_could_not_do_for_good() -> None:
    subject = core()
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(hello(), 0.0)

    def starts(now: float) -> list[actions.Action]:
        _, todo = subject.hold(entry(), f"q{now}", size_bytes=0, deadline=999.0, now=now)
        return [a for a in todo if isinstance(a, actions.Send) and isinstance(a.command.order, StartReplica)]

    (asked,) = starts(1.0)
    assert isinstance(asked, actions.Send)
    subject.command_acknowledged(
        "w", asked.command.command_id, refused_reason="UNKNOWN_ENGINE", message="not here", now=2.0
    )
    assert starts(3.0) == []
    subject.worker_hello(hello(), 4.0)
    assert starts(5.0) == []
    subject.worker_hello(hello(incarnation="2"), 6.0)
    assert len(starts(7.0)) == 1
