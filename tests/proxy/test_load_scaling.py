"""How many replicas load asks for, and what the proxy does about it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.proxy.actions import ActivationDone, ActivationFailed, Fail, Send
from helios.proxy.activation.machine import ActivationState
from helios.proxy.core import Core
from helios.proxy.fleet.commands import DrainReplica, StartReplica, WakeReplica
from helios.proxy.fleet.state import Device, DeviceKind, Load, Replica, ReplicaState, WorkerHello
from helios.proxy.scaling.load import LoadDecision, LoadPolicy, LoadSample, LoadScaler, ScalingMode
from helios.proxy.traffic import LoadDelta
from tests.proxy.support import GIB, core, entry, hello, policy, ready, replica

POLICY = LoadPolicy(target_ratio=0.5)
# With 20 requests at once, a replica is to have 10.
CAPACITY = 20


def sample(request_count: int, replica_count: int = 1, **fields: object) -> LoadSample:
    values = {"waiting_count": 0, "kv_usage_ratio": 0.0, "replica_capacity": CAPACITY} | fields
    return LoadSample(request_count=request_count, replica_count=replica_count, **values)  # type: ignore[arg-type]


def observe(scaler: LoadScaler, request_count: int, start: float, seconds: int, replica_count: int = 1) -> LoadDecision:
    for second in range(seconds):
        scaler.observe(sample(request_count, replica_count), start + second)
    return scaler.decision


def test_as_many_are_asked_for_as_the_mean_load_needs() -> None:
    decision = observe(LoadScaler(POLICY), 25, 0, 60, replica_count=3)
    assert decision == LoadDecision(3, "25.0 requests at once, 10 a replica", asked=3)
    assert observe(LoadScaler(POLICY), 10, 0, 60).count == 1
    assert observe(LoadScaler(POLICY), 0, 0, 60).count == 1


def test_a_burst_of_a_second_asks_for_nothing_and_one_that_lasts_is_a_panic() -> None:
    scaler = LoadScaler(POLICY)
    observe(scaler, 5, 0, 60)
    assert scaler.observe(sample(30), 60).count == 1
    assert observe(scaler, 40, 61, 5).count == 4
    assert "in 6 s" in scaler.decision.reason
    # In a panic nothing goes, and as many stay for five minutes as were asked for.
    assert observe(scaler, 0, 66, 300, replica_count=4).count == 4
    assert "now 1" in scaler.decision.reason
    assert observe(scaler, 0, 366, 120, replica_count=4).count == 1


def test_full_kv_caches_ask_for_one_more_where_requests_wait_for_them() -> None:
    full = sample(4, replica_count=2, kv_usage_ratio=0.95, waiting_count=2)
    assert LoadScaler(POLICY).observe(full, 0).count == 3
    assert LoadScaler(POLICY).observe(replace(full, waiting_count=0), 0).count == 1
    assert LoadScaler(POLICY).observe(replace(full, kv_usage_ratio=0.5), 0).count == 1


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 8)), min_size=1, max_size=200))
def test_counts_are_bounded_by_the_most_load_and_never_fall_too_soon(steps: list[tuple[int, int]]) -> None:
    scaler = LoadScaler(replace(POLICY, keep_seconds=30))
    decisions = [scaler.observe(sample(*step), now) for now, step in enumerate(steps)]
    counts = [decision.count for decision in decisions]
    most = max(request_count for request_count, _ in steps)
    assert min(counts) >= 1
    assert max(counts) <= max(1, -(-most // 10))
    for now, count in enumerate(counts):
        asked = [decision.asked for decision in decisions[max(0, now - 30) : now + 1]]
        assert count >= max(asked), "what was asked for stays for 30 s"


# What the proxy does.
GPUS = tuple(Device(f"cuda:{n}", DeviceKind.CUDA, 2 * GIB, 0) for n in range(2))


def starts(subject: Core, now: float) -> list[StartReplica]:
    """What a tick orders to be started."""
    subject.worker_seen("w", now)
    orders = [action.command.order for action in subject.tick(now) if isinstance(action, Send)]
    return [order for order in orders if isinstance(order, StartReplica)]


def busy(mode: ScalingMode, devices: tuple[Device, ...], *, max_replicas: int = 0) -> tuple[Core, Replica]:
    """A proxy whose only replica has had 100 requests for a while."""
    settings = policy(idle_seconds=30.0)
    load = LoadPolicy(mode=mode, stable_seconds=10, keep_seconds=10)
    subject = core(replace(settings, lifecycle=replace(settings.lifecycle, load=load)))
    subject.models_replaced([replace(entry(min_replicas=1), max_replicas=max_replicas)], 0.0, is_synced=True)
    subject.worker_hello(WorkerHello("w", "1", "node", devices, ("vllm",), 8, ()), 0.0)
    subject.tick(6.0)
    (asked,) = subject.fleet.replicas()
    subject.replica_event("w", 1, ready(asked), 7.0)
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000"}), 7.0)
    told(subject, asked.replica_id, 100, 7.0)
    return subject, asked


def told(subject: Core, replica_id: str, count: int, now: float) -> None:
    subject.load_report([LoadDelta(replica_id, Load(running_count=count))], now)


@pytest.mark.parametrize("max_replicas", [0, 2])
def test_load_starts_another_replica_and_its_end_drains_one(max_replicas: int) -> None:
    subject, first = busy(ScalingMode.ON, GPUS, max_replicas=max_replicas)
    ordered = [order for second in range(8, 15) for order in starts(subject, float(second))]
    assert [order.device_ids != first.device_ids for order in ordered] == [True], (
        "as many as there are devices without one"
    )
    (second,) = (each for each in subject.fleet.replicas() if each.replica_id != first.replica_id)
    told_of = subject.replica_event("w", 2, ready(second, "127.0.0.1:1001"), 15.0)
    assert [action.replica_id for action in told_of if isinstance(action, ActivationDone)] == [second.replica_id]
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000", "127.0.0.1:1001"}), 15.0)
    assert not starts(subject, 16.0)
    told(subject, first.replica_id, 0, 17.0)
    for now in range(18, 60):
        starts(subject, float(now))
    assert sum(not subject.traffic.is_draining(each) for each in subject.fleet.replicas()) == 1
    decisions = [(each.from_count, each.to_count) for each in subject.lifecycle.wants.decisions.kept]
    assert decisions[0][0] == 1
    assert max(to_count for _, to_count in decisions) == 3
    assert decisions[-1][1] == 1


@pytest.mark.parametrize(
    ("mode", "devices", "max_replicas"),
    [
        (ScalingMode.ADVISE, GPUS, 0),
        (ScalingMode.OFF, GPUS, 0),
        (ScalingMode.ON, GPUS, 1),
        (ScalingMode.ON, GPUS[:1], 0),
        (ScalingMode.ON, (Device("cpu:0", DeviceKind.CPU, 8 * GIB, 0),), 0),
    ],
)
def test_nothing_is_started_where_it_must_not_or_can_not(
    mode: ScalingMode, devices: tuple[Device, ...], max_replicas: int
) -> None:
    subject, _ = busy(mode, devices, max_replicas=max_replicas)
    assert not [order for second in range(8, 30) for order in starts(subject, float(second))]
    assert bool(subject.lifecycle.wants.decisions.kept) is (mode is not ScalingMode.OFF)


def test_an_answer_may_end_at_a_replica_that_load_needs_no_more() -> None:
    subject, first = busy(ScalingMode.ON, GPUS)
    assert [order for second in range(8, 15) for order in starts(subject, float(second))]
    second = another(subject, first)
    subject.replica_event("w", 2, ready(second, "127.0.0.1:1001"), 15.0)
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000", "127.0.0.1:1001"}), 15.0)
    told(subject, first.replica_id, 1, 17.0)
    told(subject, second.replica_id, 1, 17.0)
    drains: list[DrainReplica] = []
    for now in range(18, 60):
        subject.worker_seen("w", now)
        todo = subject.tick(float(now))
        sent = [action.command.order for action in todo if isinstance(action, Send)]
        drains += [order for order in sent if isinstance(order, DrainReplica)]
    (drain,) = drains
    # Nobody needs its room: no answer is cut off for it after seconds.
    assert drain.timeout_seconds == LoadPolicy().drain_seconds == 3600
    # An operator who takes the worker out does, after the time that all replicas have.
    orders = [action.command.order for action in subject.drain_worker("w", 60.0) if isinstance(action, Send)]
    assert DrainReplica(drain.replica_id, subject.lifecycle.policy.drain_seconds) in orders
    again = [action.command.order for action in subject.drain_worker("w", 61.0) if isinstance(action, Send)]
    assert not [order for order in again if isinstance(order, DrainReplica)]


def another(subject: Core, first: Replica) -> Replica:
    """The one replica that is there beside the first."""
    (found,) = (each for each in subject.fleet.replicas() if each.replica_id != first.replica_id)
    return found


def until_ordered(subject: Core, now: float) -> tuple[StartReplica, float]:
    """The first start that is ordered from now on, and when."""
    for second in range(700):
        orders = starts(subject, now + second)
        if orders:
            return orders[0], now + second
    raise AssertionError("nothing is started")


def test_a_proxy_that_restarts_keeps_what_load_had_started() -> None:
    here = tuple(replace(ready(replica(f"r{n}"), f"127.0.0.1:100{n}"), worker_id="w") for n in range(4))
    subject = core(known_workers=["w", "v"])
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(hello("w", replicas=here), 1.0)
    starts(subject, 2.0)
    subject.worker_hello(hello("v"), 3.0)
    for now in range(3, 200):
        starts(subject, float(now))
    assert not any(subject.traffic.is_draining(each) for each in subject.fleet.replicas())
    for now in range(200, 400):
        starts(subject, float(now))
    assert sum(not subject.traffic.is_draining(each) for each in subject.fleet.replicas()) == 1, "nobody uses them"


def test_a_start_for_load_that_fails_is_tried_again_after_pauses_that_double() -> None:
    subject, first = busy(ScalingMode.ON, GPUS)
    _, now = until_ordered(subject, 8.0)
    pauses = []
    for sequence in range(2, 5):
        failed = replace(another(subject, first), state=ReplicaState.FAILED, failure_reason="OUT_OF_MEMORY")
        subject.replica_event("w", sequence, failed, now)
        _, again = until_ordered(subject, now)
        pauses.append(again - now)
        now = again
    assert pauses == [10.0, 20.0, 40.0]


def test_a_start_for_load_that_fails_fails_no_request() -> None:
    subject, first = busy(ScalingMode.ON, GPUS)
    _, now = until_ordered(subject, 8.0)
    model = subject.catalogue.get("m")
    assert model is not None
    hold, _ = subject.hold(model, "q", size_bytes=1, deadline=now + 100, now=now)
    failed = replace(another(subject, first), state=ReplicaState.FAILED, failure_reason="OUT_OF_MEMORY")
    told_of = subject.replica_event("w", 2, failed, now)
    assert [action.reason for action in told_of if isinstance(action, ActivationFailed)] == ["OUT_OF_MEMORY"]
    assert not [action for action in told_of if isinstance(action, Fail) and action.hold is hold]


def test_load_wakes_a_sleeper_before_it_starts_another() -> None:
    subject, first = busy(ScalingMode.ON, GPUS)
    asleep = replace(
        replica("asleep"), state=ReplicaState.ASLEEP, worker_id="w", device_ids=("cuda:1",), can_sleep=True
    )
    subject.replica_event("w", 2, asleep, 8.0)
    sent: list[object] = []
    for now in range(8, 15):
        subject.worker_seen("w", float(now))
        sent += [action.command.order for action in subject.tick(float(now)) if isinstance(action, Send)]
    assert sent == [WakeReplica("asleep")]
    assert not subject.traffic.is_draining(first)


def test_a_model_that_no_worker_can_run_holds_up_nobody() -> None:
    subject, _ = busy(ScalingMode.ON, GPUS)
    subject.model_upserted(entry("x", min_replicas=1, engine_settings='{"engine": "sglang"}'), 7.5)
    until_ordered(subject, 8.0)
    assert subject.lifecycle.activation("x").state is ActivationState.WAITING


def test_a_load_that_is_over_starts_nothing_more() -> None:
    subject, first = busy(ScalingMode.ON, (*GPUS, Device("cuda:2", DeviceKind.CUDA, 2 * GIB, 0)))
    until_ordered(subject, 8.0)
    for now in range(10, 15):
        starts(subject, float(now))
    assert subject.lifecycle.loads.count("m", (), 15.0) == 3
    told(subject, first.replica_id, 0, 15.0)
    for now in range(15, 22):
        starts(subject, float(now))
    assert subject.lifecycle.loads.count("m", (), 22.0) == 3, "as many may stay"
    one, other = (each for each in subject.fleet.replicas() if each.replica_id != first.replica_id)
    subject.replica_event("w", 2, ready(one, "127.0.0.1:1001"), 22.0)
    subject.replica_event("w", 3, replace(other, state=ReplicaState.FAILED, failure_reason="OUT_OF_MEMORY"), 22.0)
    subject.endpoints_acknowledged(frozenset({"127.0.0.1:1000", "127.0.0.1:1001"}), 22.0)
    assert not [order for now in range(22, 60) for order in starts(subject, float(now))]


def test_a_revision_that_is_promoted_under_load_gets_its_replicas_at_once() -> None:
    gpus = tuple(Device(f"cuda:{n}", DeviceKind.CUDA, 2 * GIB, 0) for n in range(8))
    subject, _ = busy(ScalingMode.ON, gpus)
    for now in range(8, 15):
        starts(subject, float(now))
    for number, each in enumerate(list(subject.fleet.replicas())):
        subject.replica_event("w", 10 + number, ready(each, f"127.0.0.1:{2000 + number}"), 15.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 15.0)
    old = [each.replica_id for each in subject.fleet.replicas()]
    assert len(old) == 3
    for replica_id in old:
        told(subject, replica_id, 40, 15.0)
    subject.model_upserted(entry(min_replicas=1, revision="sha256:2"), 16.0)
    first = next(each for each in subject.fleet.replicas() if each.revision == "sha256:2")
    subject.replica_event("w", 20, ready(first, "127.0.0.1:3000"), 17.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 17.0)
    told(subject, first.replica_id, 120, 17.0)
    assert [order.revision for order in starts(subject, 18.0)] == ["sha256:2"] * 2


def test_a_start_for_load_that_found_no_room_looks_again_when_some_comes() -> None:
    subject, first = busy(ScalingMode.ON, GPUS[:1])
    assert not [order for now in range(8, 12) for order in starts(subject, float(now))]
    subject.worker_hello(WorkerHello("v", "1", "other", GPUS[1:], ("vllm",), 8, ()), 12.0)
    ordered = [action.command for action in subject.tick(12.5) if isinstance(action, Send)]
    assert [command.worker_id for command in ordered] == ["v"]
    assert first.worker_id == "w"


def test_full_caches_batches_and_devices_ask_for_replicas_where_they_have_targets() -> None:
    targets = replace(POLICY, kv_target_ratio=0.5, batch_target_ratio=0.5, device_target_ratio=0.5)
    scaler = LoadScaler(targets)
    for now in range(60):
        scaler.observe(sample(1, 2, kv_usage_ratio=0.8), now)
    assert (scaler.decision.asked, scaler.decision.reason) == (
        4,
        "KV caches would fill 1.6 replicas, each is to be 50% full",
    )
    scaler = LoadScaler(targets)
    for now in range(60):
        scaler.observe(sample(1, 2, running_count=22), now)
    assert (scaler.decision.asked, "batches" in scaler.decision.reason) == (3, True)
    scaler = LoadScaler(targets)
    for now in range(60):
        scaler.observe(sample(1, 1, device_busy_ratio=0.9), now)
    assert (scaler.decision.asked, "devices" in scaler.decision.reason) == (2, True)
    assert observe(LoadScaler(replace(POLICY, kv_target_ratio=0.0)), 1, 0, 60).asked == 1


def test_caches_that_are_full_ask_for_no_more_once_there_are_as_many_replicas_as_they_fill() -> None:
    scaler = LoadScaler(replace(POLICY, kv_target_ratio=0.8, stable_seconds=10))
    for now in range(60):
        # What filled one fills half of two.
        count = 1 if now < 10 else 2
        scaler.observe(sample(1, count, kv_usage_ratio=0.95 / count), now)
    assert scaler.decision.count == 2


@given(st.lists(st.integers(0, 500), min_size=1, max_size=300), st.integers(1, 60))
def test_the_mean_that_is_kept_up_is_the_mean(counts: list[int], seconds: int) -> None:
    scaler = LoadScaler(LoadPolicy(target_ratio=1.0, stable_seconds=seconds, panic_seconds=1, keep_seconds=0))
    for now, count in enumerate(counts):
        decision = scaler.observe(LoadSample(count, 0, 0.0, 1_000_000, 1), now)
        window = counts[max(0, now - seconds + 1) : now + 1]
        assert decision.asked == max(1, -(-sum(window) // len(window)))


def test_a_round_is_made_in_slices_and_each_model_is_looked_at_once() -> None:
    whole, sliced = (core(policy(idle_seconds=10.0)) for _ in range(2))
    for subject in (whole, sliced):
        subject.models_replaced([entry(f"m{n}", min_replicas=1) for n in range(20)], 0.0, is_synced=True)
        subject.worker_hello(replace(hello("w", memory_bytes=64 * GIB), slot_count=64), 0.0)
    at_once = [action for action in whole.tick(1.0) if isinstance(action, Send)]
    todo = sliced.begin_tick(1.0)
    is_left, count = True, 0
    while is_left:
        more, is_left = sliced.go_on(1.0, 3)
        todo += more
        count += 1
    assert count == 7
    assert [action.command.order for action in todo if isinstance(action, Send)] == [
        action.command.order for action in at_once
    ]
    assert sliced.go_on(1.0, 3) == ([], False)
