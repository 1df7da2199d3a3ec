"""Asleep and staged: what a model that nobody uses keeps, and how it comes back."""

from dataclasses import replace

import pytest

from helios.mesh.errors import PreconditionFailed, Unavailable
from helios.proxy import actions
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.fleet.commands import (
    DrainReplica,
    EvictRevision,
    Order,
    SleepReplica,
    StageRevision,
    StartReplica,
    StopReplica,
    UnstageRevision,
    WakeReplica,
)
from helios.proxy.fleet.state import Device, DeviceKind, Replica, ReplicaState, Staged, StagedState, WorkerHello
from helios.proxy.sizing import MeasuredSizes, SizingPolicy, replica_size
from tests.proxy.support import GIB, MIB, core, entry, hello, policy, ready, replica

S = ReplicaState


def orders(todo: list[actions.Action]) -> list[Order]:
    return [action.command.order for action in todo if isinstance(action, actions.Send)]


def acknowledge(subject: Core, todo: list[actions.Action], reason: str = "", now: float = 0.0) -> list[actions.Action]:
    """Answers the first command of `todo`."""
    command = next(action.command for action in todo if isinstance(action, actions.Send))
    return subject.command_acknowledged(
        command.worker_id, command.command_id, refused_reason=reason, message="", now=now
    )


def world(
    *replicas: Replica, models: tuple[ModelEntry, ...] = (), host_gib: int = 0, staged: tuple[Staged, ...] = ()
) -> Core:
    """A worker with these replicas, whose endpoints Envoy knows."""
    subject = core(policy(idle_seconds=50.0))
    subject.models_replaced(models or (entry(),), 0.0, is_synced=True)
    told = replace(hello(replicas=replicas), host_memory_bytes=host_gib * GIB, staged=staged)
    subject.worker_hello(told, 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def pass_time(subject: Core, now: float) -> list[actions.Action]:
    subject.worker_seen("w", now)
    return subject.tick(now)


def sleeper(**changes: object) -> Replica:
    return replace(replica(), can_sleep=True, **changes)  # type: ignore[arg-type]


def sized(name: str, revision: str, gib: int = 1) -> ModelEntry:
    return replace(entry(name, revision=revision), weights_bytes=gib * GIB)


def staged(name: str, revision: str) -> Staged:
    return Staged(revision, name, StagedState.STAGED, "w", GIB)


def test_an_idle_replica_that_can_sleep_is_put_to_sleep_and_not_drained() -> None:
    subject = world(sleeper())
    todo = pass_time(subject, 60.0)
    assert orders(todo) == [SleepReplica("r")]
    assert subject.pick(entry(), "q", 60.0) is None
    assert subject.fleet.endpoints() == frozenset()
    assert orders(pass_time(subject, 61.0)) == []


def test_news_from_before_an_order_do_not_undo_it() -> None:
    subject = world(sleeper())
    todo = pass_time(subject, 60.0)
    subject.replica_event("w", 1, sleeper(measured_bytes=5), 60.1)
    assert subject.pick(entry(), "q", 60.2) is None
    acknowledge(subject, todo, now=60.3)
    subject.replica_event("w", 2, sleeper(state=S.ASLEEP), 60.4)
    _, todo = subject.hold(entry(), "q2", size_bytes=0, deadline=99.0, now=61.0)
    subject.replica_event("w", 3, sleeper(state=S.ASLEEP, measured_bytes=6), 61.1)
    believed = subject.fleet.replica("r")
    assert believed is not None
    assert believed.state is S.WAKING
    acknowledge(subject, todo, now=61.2)
    subject.replica_event("w", 4, sleeper(wake_count=1), 61.3)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 61.4)
    assert subject.pick(entry(), "q3", 61.5) is not None


def test_an_order_to_sleep_outlives_a_stream_that_broke_before_its_answer() -> None:
    subject = world(sleeper())
    assert orders(pass_time(subject, 60.0)) == [SleepReplica("r")]
    subject.worker_lost("w", 60.1)
    assert orders(subject.worker_hello(hello(replicas=(sleeper(),)), 60.2)) == [SleepReplica("r")]
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000"}), 60.3)
    assert subject.pick(entry(), "q", 60.4) is None


def test_a_sleeping_replica_is_not_what_a_policy_promised() -> None:
    models = (replace(sized("m", "sha256:1"), min_replicas=1), sized("n", "sha256:2", 3))
    awake = replica("awake", address="127.0.0.1:1001")
    subject = world(sleeper(state=S.ASLEEP), awake, models=models)
    worker = subject.fleet.worker("w")
    assert worker is not None
    victims = subject.lifecycle.room.capacity(worker, models[1], 100.0).victims
    assert [victim.replica_id for victim in victims] == ["r"]


def test_a_busy_replica_is_not_put_to_sleep() -> None:
    subject = world(sleeper())
    assert subject.pick(entry(), "q", 1.0) is not None
    assert orders(pass_time(subject, 10.0)) == []


def test_a_request_wakes_a_sleeping_replica_instead_of_starting_another() -> None:
    subject = world(sleeper(state=S.ASLEEP))
    hold, todo = subject.hold(entry(), "q", size_bytes=0, deadline=99.0, now=1.0)
    assert orders(todo) == [WakeReplica("r")]
    assert acknowledge(subject, todo) == []
    _, again = subject.hold(entry(), "q2", size_bytes=0, deadline=99.0, now=2.0)
    assert orders(again) == []
    todo = subject.replica_event("w", 1, sleeper(wake_count=1), 3.0)
    assert [a.seconds for a in todo if isinstance(a, actions.ActivationDone)] == [2.0]
    todo = subject.endpoints_acknowledged(subject.fleet.endpoints(), 3.0)
    assert next(action.hold for action in todo if isinstance(action, actions.Release)) == hold
    # Waking says nothing of how long a start takes.
    assert subject.lifecycle.estimates.expected_seconds("m", 0) == 5.0


@pytest.mark.parametrize("reason", ["CANARY_FAILED", "WAKE_FAILED", "WAKE_TIMEOUT"])
def test_a_replica_that_fails_to_wake_is_replaced_at_once_while_the_request_waits(reason: str) -> None:
    subject = world(sleeper(state=S.ASLEEP))
    _, todo = subject.hold(entry(), "q", size_bytes=0, deadline=99.0, now=1.0)
    acknowledge(subject, todo)
    todo = subject.replica_event("w", 1, sleeper(state=S.FAILED, failure_reason=reason), 2.0)
    (start,) = orders(todo)
    assert isinstance(start, StartReplica)
    assert not [action for action in todo if isinstance(action, actions.Fail)]


def test_a_wake_that_is_refused_for_want_of_room_leads_to_the_next_rung() -> None:
    subject = world(sleeper(state=S.ASLEEP))
    _, todo = subject.hold(entry(), "q", size_bytes=0, deadline=99.0, now=1.0)
    todo = acknowledge(subject, todo, "NO_CAPACITY", now=2.0)
    (start,) = orders(todo)
    assert isinstance(start, StartReplica)
    sleeping = subject.fleet.replica("r")
    assert sleeping is not None
    assert sleeping.state is S.ASLEEP


def test_however_many_refuse_to_wake_the_request_waits_for_the_next_rung() -> None:
    asleep = [sleeper(replica_id=f"r{number}", state=S.ASLEEP, memory_bytes=MIB) for number in range(5)]
    subject = world(*asleep)
    _, todo = subject.hold(entry(), "q", size_bytes=0, deadline=99.0, now=1.0)
    for _ in asleep:
        (order,) = orders(todo)
        assert isinstance(order, WakeReplica)
        todo = acknowledge(subject, todo, "NO_CAPACITY", now=2.0)
        assert not [action for action in todo if isinstance(action, actions.Fail)]
    assert [type(order) for order in orders(todo)] == [StartReplica]


def test_room_that_a_waking_replica_needs_is_nobody_elses() -> None:
    subject = core()
    subject.models_replaced([entry(), entry("other", revision="sha256:2")], 0.0, is_synced=True)
    asleep = sleeper(state=S.ASLEEP, memory_bytes=MIB)
    subject.worker_hello(hello(replicas=(asleep,), memory_bytes=GIB + GIB // 2), 0.0)
    _, waking = subject.hold(entry(), "q1", size_bytes=0, deadline=99.0, now=1.0)
    assert orders(waking) == [WakeReplica("r")]
    # Its worker, which carries orders out one after the other, would refuse a start.
    _, todo = subject.hold(entry("other", revision="sha256:2"), "q2", size_bytes=0, deadline=99.0, now=1.0)
    assert orders(todo) == []
    assert not [action for action in todo if isinstance(action, actions.Fail)]
    acknowledge(subject, waking, "NO_CAPACITY", now=1.1)
    sleeping = subject.fleet.replica("r")
    assert sleeping is not None
    assert (sleeping.state, sleeping.memory_bytes) == (S.ASLEEP, MIB)


def test_a_replica_whose_sleep_is_used_up_is_drained_and_one_that_is_busy_stays() -> None:
    subject = world(sleeper())
    todo = pass_time(subject, 60.0)
    (drain,) = orders(acknowledge(subject, todo, "SLEEP_CYCLES_USED_UP", now=61.0))
    assert isinstance(drain, DrainReplica)
    subject = world(sleeper())
    todo = pass_time(subject, 60.0)
    assert acknowledge(subject, todo, "REPLICA_BUSY", now=61.0) == [], "asked again at once, it would refuse again"
    believed = subject.fleet.replica("r")
    assert believed is not None
    assert believed.state is S.READY
    assert orders(pass_time(subject, 62.0)) == [SleepReplica("r")]


def test_a_sleeping_replica_makes_room_for_a_model_that_is_wanted() -> None:
    models = (entry("m"), entry("other"))
    subject = world(sleeper(state=S.ASLEEP, memory_bytes=8 * GIB), models=models)
    _, todo = subject.hold(models[1], "q", size_bytes=0, deadline=99.0, now=1.0)
    assert orders(todo) == [StopReplica("r")]


def test_the_last_replica_of_an_idle_model_leaves_its_weights_staged() -> None:
    subject = world(replica(), models=(sized("m", "sha256:1"),), host_gib=2)
    todo = pass_time(subject, 60.0)
    assert orders(todo) == [StageRevision("sha256:1", "m", GIB), DrainReplica("r", 30.0)]


def test_what_was_used_longest_ago_gives_way_to_what_is_staged_now() -> None:
    models = tuple(sized(name, f"sha256:{name}") for name in "abm")
    held = (staged("a", "sha256:a"), staged("b", "sha256:b"))
    subject = world(replica(revision="sha256:m"), models=models, host_gib=2, staged=held)
    subject.traffic.use("b", 10.0)
    subject.traffic.use("a", 20.0)
    assert orders(pass_time(subject, 100.0))[:2] == [UnstageRevision("sha256:b"), StageRevision("sha256:m", "m", GIB)]


def test_a_model_larger_than_the_host_memory_evicts_nobody() -> None:
    models = (sized("a", "sha256:a"), sized("m", "sha256:1", gib=3))
    subject = world(replica(), models=models, host_gib=2, staged=(staged("a", "sha256:a"),))
    assert orders(pass_time(subject, 60.0)) == [DrainReplica("r", 30.0)]


def test_short_memory_takes_staged_weights_first_one_at_a_time() -> None:
    models = (sized("a", "sha256:a"), sized("b", "sha256:b"))
    held = (staged("a", "sha256:a"), staged("b", "sha256:b"))
    subject = world(models=models, host_gib=4, staged=held)
    full = Device("cpu:0", DeviceKind.UNKNOWN, 0, 0, used_ratio=0.95)
    subject.devices_measured("w", [full], 1.0)
    assert len(orders(pass_time(subject, 2.0))) == 1
    assert len(orders(pass_time(subject, 3.0))) == 1
    assert orders(pass_time(subject, 4.0)) == []


def test_a_start_goes_where_the_weights_are_in_memory() -> None:
    subject = core()
    model = sized("m", "sha256:1")
    subject.models_replaced([model], 0.0, is_synced=True)
    subject.worker_hello(hello("roomy", memory_bytes=64 * GIB), 0.0)
    subject.worker_hello(replace(hello("warm"), host_memory_bytes=GIB, staged=(staged("m", "sha256:1"),)), 0.0)
    _, todo = subject.hold(model, "q", size_bytes=0, deadline=99.0, now=1.0)
    (sent,) = [action.command for action in todo if isinstance(action, actions.Send)]
    assert sent.worker_id == "warm"


def test_an_operator_stages_and_unstages() -> None:
    model = sized("m", "sha256:1")
    subject = world(replica(), models=(model,), host_gib=2)
    told, count, todo = subject.stage(model, 1.0)
    assert (told.state, told.worker_id, count) == (StagedState.STAGING, "w", 1)
    assert orders(todo) == [StageRevision("sha256:1", "m", GIB), DrainReplica("r", 30.0)]
    subject.staged_event("w", 1, staged("m", "sha256:1"), 2.0)
    assert [worker.hello.worker_id for worker in subject.fleet.staged_on("sha256:1")] == ["w"]
    assert orders(subject.unstage(model, 3.0)[1]) == [UnstageRevision("sha256:1")]
    assert subject.unstage(model, 4.0) == (0, [])


def test_staging_says_why_it_can_not_be() -> None:
    model = sized("m", "sha256:1")
    with pytest.raises(Unavailable) as refused:
        world(models=(model,)).stage(model, 1.0)
    assert refused.value.reason == "NO_CAPACITY"
    pinned = replace(model, min_replicas=1)
    with pytest.raises(PreconditionFailed):
        world(models=(pinned,), host_gib=2).stage(pinned, 1.0)
    empty = core()
    empty.models_replaced([model], 0.0, is_synced=True)
    with pytest.raises(Unavailable) as refused:
        empty.stage(model, 1.0)
    assert refused.value.reason == "NO_WORKER"


def test_evicting_a_model_takes_it_out_of_memory_first() -> None:
    model = sized("m", "sha256:1")
    subject = world(models=(model,), host_gib=2, staged=(staged("m", "sha256:1"),))
    _, todo = subject.evict(model, 1.0)
    assert orders(todo) == [UnstageRevision("sha256:1"), EvictRevision("sha256:1")]


def test_an_operator_puts_to_sleep_and_wakes_or_hears_why_not() -> None:
    subject = world(sleeper())
    held = subject.fleet.replica("r")
    assert held is not None
    assert orders(subject.sleep(held, 1.0)) == [SleepReplica("r")]
    asleep = subject.fleet.replica("r")
    assert asleep is not None
    assert orders(subject.wake(asleep, 2.0)) == [WakeReplica("r")]
    for item, reason in (
        (replica(), "SLEEP_UNSUPPORTED"),
        (sleeper(state=S.LOADING), "REPLICA_NOT_READY"),
    ):
        with pytest.raises(PreconditionFailed) as refused:
            world(item).sleep(item, 1.0)
        assert refused.value.reason == reason


def test_an_operator_can_t_put_to_sleep_what_a_policy_promises() -> None:
    model = replace(entry(), min_replicas=1)
    subject = world(sleeper(), models=(model,))
    with pytest.raises(PreconditionFailed) as refused:
        subject.sleep(sleeper(), 1.0)
    assert (refused.value.reason, refused.value.metadata["min_replicas"]) == ("MODEL_PINNED", "1")
    assert subject.pick(model, "q", 1.0) is not None, "it is as awake as before"


def test_a_lost_device_takes_its_memory_out_of_placement_until_it_is_back() -> None:
    gpus = tuple(Device(f"cuda:{n}", DeviceKind.CUDA, 8 * GIB, 0) for n in range(2))
    subject = core()
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(WorkerHello("w", "1", "node", gpus, ("vllm",), 8, ()), 0.0)
    worker = subject.fleet.worker("w")
    assert worker is not None
    assert [device.free_bytes for device in worker.gang_devices()] == [8 * GIB, 8 * GIB]
    assert [worker.memory_bytes_of(count) for count in (1, 2, 3)] == [8 * GIB, 16 * GIB, 0]
    subject.devices_measured("w", [replace(gpus[0], is_healthy=False)], 1.0)
    assert [(device.device_id, device.free_bytes) for device in worker.gang_devices()] == [("cuda:1", 8 * GIB)]
    on_second = replace(replica(), device_ids=("cuda:1",))
    subject.replica_event("w", 1, on_second, 2.0)
    assert [device.free_bytes for device in worker.gang_devices()] == [7 * GIB]
    subject.devices_measured("w", [gpus[0]], 3.0)
    assert [device.free_bytes for device in worker.gang_devices()] == [8 * GIB, 7 * GIB]


def test_what_replicas_were_measured_to_hold_corrects_what_the_next_one_books() -> None:
    model = replace(
        entry(), weights_bytes=257 * MIB, layer_count=30, vocabulary_size=49_152, parameter_count=134_515_008
    )
    subject = world(models=(model,))
    before = subject.lifecycle.room.size(model)
    assert sum(size for _, size in before.items) == before.memory_bytes
    kv_cache_bytes = before.kv_cache_bytes
    held = replace(replica(), memory_items=before.items, memory_bytes=before.memory_bytes)
    subject.replica_event("w", 1, replace(held, measured_bytes=before.memory_bytes + 200 * MIB), 1.0)
    after = subject.lifecycle.room.size(model)
    assert after.kv_cache_bytes == kv_cache_bytes
    assert after.memory_bytes > before.memory_bytes + 200 * MIB
    assert sum(size for _, size in after.items) == after.memory_bytes


def test_what_was_started_with_other_settings_says_nothing_of_these() -> None:
    subject = world()
    _, todo = subject.hold(entry(), "q", size_bytes=0, deadline=99.0, now=1.0)
    (start,) = orders(todo)
    assert isinstance(start, StartReplica)
    changed = entry(engine_settings='{"dtype": "float32"}')
    subject.model_upserted(changed, 2.0)
    before = subject.lifecycle.room.size(changed)
    held = replace(replica(start.replica_id), memory_items=start.memory_items, measured_bytes=4 * GIB)
    subject.replica_event("w", 1, held, 3.0)
    assert subject.lifecycle.room.size(changed) == before
    # Taken over from another proxy: nobody knows better than what is served.
    subject.replica_event("w", 2, replace(held, replica_id="other", address="127.0.0.1:1001"), 4.0)
    assert subject.lifecycle.room.size(changed).memory_bytes > before.memory_bytes


def test_a_gpu_in_the_fleet_does_not_change_what_replicas_on_cpus_book() -> None:
    settings = policy()
    sizing = replace(settings.lifecycle.sizing, gpu_overhead_bytes=settings.lifecycle.sizing.overhead_bytes + 2 * GIB)
    subject = core(replace(settings, lifecycle=replace(settings.lifecycle, sizing=sizing)))
    subject.models_replaced([entry()], 0.0, is_synced=True)
    small = hello("cpu", memory_bytes=2 * GIB)
    subject.worker_hello(small, 0.0)
    alone = subject.lifecycle.room.size(entry())
    gpu = Device("cuda:0", DeviceKind.CUDA, 2 * GIB, 0)
    subject.worker_hello(WorkerHello("gpu", "1", "node", (gpu,), ("vllm",), 8, ()), 0.0)
    assert subject.lifecycle.room.size(entry()).memory_bytes == alone.memory_bytes + 2 * GIB
    _, todo = subject.hold(entry(), "q", size_bytes=0, deadline=99.0, now=1.0)
    (sent,) = [action.command for action in todo if isinstance(action, actions.Send)]
    assert isinstance(sent.order, StartReplica)
    assert (sent.worker_id, sent.order.memory_bytes) == ("cpu", alone.memory_bytes)
    # What is measured on one kind says nothing of the other.
    held = replace(replica(sent.order.replica_id), worker_id="cpu", memory_items=sent.order.memory_items)
    subject.replica_event("cpu", 1, replace(held, measured_bytes=alone.memory_bytes + 300 * MIB), 2.0)
    workers = {worker.hello.worker_id: worker for worker in subject.fleet.workers()}
    sizes = {name: subject.lifecycle.room.size_on(worker, entry()) for name, worker in workers.items()}
    assert sizes["cpu"].memory_bytes > alone.memory_bytes + 300 * MIB
    assert sizes["gpu"].memory_bytes == alone.memory_bytes + 2 * GIB


def test_an_untouched_cache_does_not_shrink_what_is_booked_below_the_overhead() -> None:
    sizing = SizingPolicy(overhead_bytes=GIB, context_count=1, min_kv_cache_bytes=MIB, max_kv_cache_bytes=GIB)
    measured = MeasuredSizes()
    measured.record("sha256:1", "", measured_bytes=10, given_bytes=MIB)
    assert replica_size(entry(), sizing, measured=measured).memory_bytes == GIB + MIB


def test_a_replica_that_is_asked_for_is_told_what_its_memory_is_made_of() -> None:
    subject = world()
    _, todo = subject.hold(entry(), "q", size_bytes=0, deadline=99.0, now=1.0)
    (start,) = orders(todo)
    assert isinstance(start, StartReplica)
    assert sum(size for _, size in start.memory_items) == start.memory_bytes
    asked = subject.fleet.replica(start.replica_id)
    assert asked is not None
    assert ready(asked).memory_items == start.memory_items


def test_the_weights_of_an_older_revision_are_given_back() -> None:
    models = (sized("m", "sha256:1"), sized("n", "sha256:2"))
    held = (staged("m", "sha256:1"), staged("n", "sha256:2"))
    subject = world(models=models, host_gib=4, staged=held)
    subject.models_replaced(models, 0.5, is_synced=False)
    subject.model_upserted(sized("m", "sha256:3"), 1.0)
    assert orders(pass_time(subject, 2.0)) == [], "the registry may know better"
    subject.models_replaced((sized("m", "sha256:3"), models[1]), 3.0, is_synced=True)
    assert orders(pass_time(subject, 4.0)) == [UnstageRevision("sha256:1")]
    assert orders(pass_time(subject, 5.0)) == []


def test_an_operator_s_sleep_may_be_repeated_and_what_is_on_its_way_out_is_not_woken() -> None:
    subject = world(sleeper(state=S.ASLEEP))
    held = subject.fleet.replica("r")
    assert held is not None
    assert orders(subject.sleep(held, 1.0)) == []
    assert orders(subject.drain_model(entry(), 2.0)) == [StopReplica("r")]
    with pytest.raises(PreconditionFailed):
        subject.wake(held, 3.0)
    with pytest.raises(PreconditionFailed):
        subject.sleep(held, 3.0)
