"""How warm models are kept: cooldowns of each rung, what is expected of them, and times with other bounds."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.api.admin.v1 import admin_service_pb2 as pb
from helios.mesh.windows import Window
from helios.proxy.admin.servicer import AdminServicer
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
)
from helios.proxy.fleet.state import Device, DeviceKind, Replica, ReplicaState, Worker, WorkerHello
from helios.proxy.runtime import Runtime
from helios.proxy.scaling.decisions import Cause
from helios.proxy.scaling.forecast import Expected, Forecasts, WarmPoolMode
from helios.proxy.scaling.ladder import Cooldowns, Rung, rung_after
from helios.proxy.scaling.policy import Scaling
from helios.proxy.store import Store, load_decisions, load_models
from helios.proxy.warmth import WarmthPolicy
from tests.proxy.support import GIB, core, entry, policy, ready, replica
from tests.proxy.test_runtime import NoEnvoys, SlowDisk
from tests.proxy.test_warmth import orders

COOLDOWNS = Cooldowns(idle_seconds=50.0, asleep_seconds=100.0, staged_seconds=200.0)
MODEL = replace(entry(), weights_bytes=GIB)
GPUS = tuple(Device(f"cuda:{n}", DeviceKind.CUDA, 2 * GIB, 0) for n in range(4))


# The ladder.
@pytest.mark.parametrize(
    ("unused", "rung"),
    [(0, Rung.READY), (49, Rung.READY), (50, Rung.ASLEEP), (149, Rung.ASLEEP), (150, Rung.STAGED), (350, Rung.DISK)],
)
def test_each_rung_has_its_own_time(unused: float, rung: Rung) -> None:
    assert rung_after(unused, COOLDOWNS) is rung
    assert rung_after(unused, COOLDOWNS, Rung.STAGED) is max(rung, Rung.STAGED)


SECONDS = st.floats(0, 1e6)


@given(SECONDS, SECONDS, st.builds(Cooldowns, SECONDS, SECONDS, SECONDS), st.sampled_from(Rung))
def test_a_model_only_goes_down_and_never_below_what_is_expected(
    one: float, more: float, cooldowns: Cooldowns, floor: Rung
) -> None:
    before, after = rung_after(one, cooldowns, floor), rung_after(one + more, cooldowns, floor)
    assert before >= after >= floor


def test_no_time_is_for_ever() -> None:
    assert rung_after(1e12, Cooldowns(0, 1, 1)) is Rung.READY
    assert rung_after(1e12, Cooldowns(1, 0, 1)) is Rung.ASLEEP
    assert rung_after(1e12, Cooldowns(1, 1, 0)) is Rung.STAGED


def world(*held: Replica, model: ModelEntry = MODEL, warm_pool: WarmPoolMode = WarmPoolMode.ON) -> Core:
    """A worker with GPUs and host memory, whose models cool down in the times above."""
    settings = policy(idle_seconds=COOLDOWNS.idle_seconds)
    warmth = WarmthPolicy(asleep_seconds=COOLDOWNS.asleep_seconds, staged_seconds=COOLDOWNS.staged_seconds)
    subject = core(replace(settings, lifecycle=replace(settings.lifecycle, warmth=warmth, warm_pool=warm_pool)))
    subject.models_replaced([model], 0.0, is_synced=True)
    hello = WorkerHello("w", "1", "node", GPUS, ("vllm",), 8, held, host_memory_bytes=8 * GIB)
    subject.worker_hello(hello, 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def pass_time(subject: Core, seconds: int, start: int = 0) -> list[tuple[int, Order]]:
    """Each second's orders; the worker does at once what it is told."""
    found: list[tuple[int, Order]] = []
    for now in range(start + 1, start + seconds + 1):
        subject.worker_seen("w", now)
        for order in orders(subject.tick(float(now))):
            found.append((now, order))
            if isinstance(order, StopReplica | DrainReplica):
                gone = subject.fleet.replica(order.replica_id)
                assert gone is not None
                subject.replica_event("w", now, replace(gone, state=ReplicaState.STOPPED), float(now))
    return found


def sleeper() -> Replica:
    return replace(replica(), can_sleep=True, device_ids=("cuda:0",))


def test_a_model_goes_to_sleep_then_to_memory_then_to_disk_and_each_step_is_told() -> None:
    subject = world(sleeper())
    steps = pass_time(subject, 400)
    assert [type(order) for _, order in steps] == [StageRevision, SleepReplica, StopReplica, UnstageRevision]
    assert [now for now, _ in steps] == pytest.approx([50, 50, 151, 351], abs=1)
    told = [(each.cause, each.reason) for each in subject.lifecycle.wants.decisions.kept]
    assert [cause for cause, _ in told] == [Cause.COOLDOWN] * 3
    assert "nobody used it" in told[0][1]
    assert "slept" in told[1][1]
    assert "in memory" in told[2][1]


def test_a_request_begins_the_times_anew() -> None:
    subject = world(sleeper())
    pass_time(subject, 40)
    assert subject.pick(MODEL, "q", 40.0) is not None
    subject.traffic.ledger.forget_replica("r")
    assert [now for now, _ in pass_time(subject, 250, 40)] == pytest.approx([90, 90, 191], abs=1)


def test_a_model_s_own_times_go_before_those_of_all() -> None:
    own = replace(MODEL, scaling=Scaling(idle_seconds=10.0, asleep_seconds=0.0))
    steps = pass_time(world(sleeper(), model=own), 400)
    assert [(now, type(order)) for now, order in steps] == [(10, StageRevision), (10, SleepReplica)]


def test_sleepers_leave_a_quarter_of_a_worker_s_slots_free_and_the_one_used_longest_ago_goes_first() -> None:
    models = [replace(MODEL, name=f"m{n}", revision=f"sha256:{n}", weights_bytes=GIB // 4) for n in range(8)]
    held = [
        replace(
            replica(), replica_id=f"r{n}", model=one.name, revision=one.revision, state=ReplicaState.ASLEEP,
            address=f"10.0.0.1:{n + 1}", can_sleep=True, memory_bytes=GIB // 8, device_ids=("cuda:0",),
        )
        for n, one in enumerate(models)
    ]  # fmt: skip
    subject = world(model=models[0])
    subject.models_replaced(models, 0.0, is_synced=True)
    for n, one in enumerate(models):
        subject.traffic.used(one.name, -60.0 - n)
    subject.worker_hello(WorkerHello("w", "2", "node", GPUS, ("vllm",), 8, tuple(held), host_memory_bytes=8 * GIB), 1.0)
    steps = pass_time(subject, 20, 1)
    assert [(now, order.replica_id) for now, order in steps if isinstance(order, StopReplica)] == [(2, "r7"), (3, "r6")]
    assert {order.model for _, order in steps if isinstance(order, StageRevision)} == {"m7", "m6"}
    told = [each.reason for each in subject.lifecycle.wants.decisions.kept]
    assert len(told) == 2
    assert all("too few free slots" in reason for reason in told)


def test_a_worker_with_few_slots_keeps_its_sleeper() -> None:
    subject = world()
    asleep = replace(sleeper(), state=ReplicaState.ASLEEP)
    subject.worker_hello(WorkerHello("w", "2", "node", GPUS, ("vllm",), 1, (asleep,), host_memory_bytes=GIB), 1.0)
    assert pass_time(subject, 90, 1) == []


# What is expected.
def expected(rung: Rung, count: int = 0, *, until: float = 1e9, idle_seconds: float = 0.0) -> dict[str, Expected]:
    return {"m": Expected(rung, count, "because", until, idle_seconds)}


def test_what_has_expired_is_not_given_and_only_what_is_followed_is() -> None:
    for mode, seen, followed in (
        (WarmPoolMode.OFF, False, False),
        (WarmPoolMode.ADVISE, True, False),
        (WarmPoolMode.ON, True, True),
    ):
        forecasts = Forecasts(mode)
        assert bool(forecasts.replace(expected(Rung.READY, 1, until=10.0))) is seen
        assert (forecasts.of("m", 9.0) is not None) is seen
        assert (forecasts.followed("m", 9.0) is not None) is followed
        assert forecasts.of("m", 10.0) is None


def test_replicas_that_are_expected_are_started_and_do_not_go_for_idleness() -> None:
    for mode, count in ((WarmPoolMode.ADVISE, 0), (WarmPoolMode.ON, 3)):
        subject, started = world(warm_pool=mode), 0
        subject.expect(expected(Rung.READY, 3), 0.0)
        for now in range(1, 200):
            subject.worker_seen("w", now)
            for order in orders(subject.tick(float(now))):
                assert isinstance(order, StartReplica)
                started += 1
                asked = subject.fleet.replica(order.replica_id)
                assert asked is not None
                subject.replica_event("w", started, ready(asked, f"127.0.0.1:{2000 + started}"), float(now))
                subject.endpoints_acknowledged(subject.fleet.endpoints(), float(now))
        assert started == count
        (decision,) = subject.lifecycle.wants.decisions.kept
        assert (decision.cause, decision.to_count, decision.is_advice) == (Cause.FORECAST, 3, count == 0)


def test_what_is_expected_takes_nothing_from_anybody_and_ends_with_its_time() -> None:
    for gone_at, is_started in ((10, True), (30, False)):
        subject = full_of_others()
        subject.expect(expected(Rung.READY, 1, until=20.0), 0.0)
        assert pass_time(subject, gone_at) == []
        # Its model goes to zero, and its room is free.
        (first,) = subject.fleet.replicas_of("r0")
        subject.drain_model(entry("r0"), gone_at)
        todo = subject.replica_event("w", 1000, replace(first, state=ReplicaState.STOPPED), gone_at)
        found = [order for order in orders(todo + subject.tick(gone_at + 1.0)) if isinstance(order, StartReplica)]
        assert [order.model for order in found] == (["m"] if is_started else [])
    # Somebody who waits would have it at once: all but what is expected may take the room of idle replicas.
    subject = full_of_others()
    _, todo = subject.hold(MODEL, "q", size_bytes=1, deadline=90.0, now=1.0)
    assert [type(order) for order in orders(todo)] == [DrainReplica]


def full_of_others() -> Core:
    """A worker each of whose GPUs has an idle replica of another model of its own."""
    names = [f"r{n}" for n in range(len(GPUS))]
    held = tuple(
        replace(
            replica(name, model=name, revision=f"sha256:{name}", address=f"127.0.0.1:{2000 + n}"),
            device_ids=(GPUS[n].device_id,),
            memory_bytes=2 * GIB,
        )
        for n, name in enumerate(names)
    )
    subject = world()
    models = [MODEL, *(replace(entry(name), revision=f"sha256:{name}") for name in names)]
    subject.models_replaced(models, 0.0, is_synced=True)
    # Before it knew their models, it would have drained them.
    subject.worker_hello(WorkerHello("w", "2", "node", GPUS, ("vllm",), 8, held, host_memory_bytes=8 * GIB), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def test_weights_that_are_expected_are_staged_where_memory_is_free_and_stay() -> None:
    subject = world()
    subject.expect(expected(Rung.STAGED), 0.0)
    assert [type(order) for _, order in pass_time(subject, 400)] == [StageRevision]
    subject.expect({}, 400.0)
    assert [type(order) for _, order in pass_time(subject, 20, 400)] == [UnstageRevision]
    advised = world(warm_pool=WarmPoolMode.ADVISE)
    advised.expect(expected(Rung.STAGED), 0.0)
    assert pass_time(advised, 20) == []


def test_what_an_operator_says_holds_until_there_are_new_targets() -> None:
    subject = world()
    subject.expect(expected(Rung.STAGED), 0.0)
    assert [type(order) for _, order in pass_time(subject, 3)] == [StageRevision]
    assert subject.unstage(MODEL, 3.0)[0] == 1
    assert pass_time(subject, 3, start=3) == []
    subject.expect(expected(Rung.STAGED), 6.0)
    assert [type(order) for _, order in pass_time(subject, 3, start=6)] == [StageRevision]
    assert [type(order) for order in orders(subject.evict(MODEL, 9.0)[1])] == [UnstageRevision, EvictRevision]
    assert pass_time(subject, 3, start=9) == []
    subject = world(sleeper())
    subject.expect(expected(Rung.READY, 1), 0.0)
    assert pass_time(subject, 3) == []
    (awake,) = subject.fleet.replicas()
    subject.sleep(awake, 3.0)
    assert pass_time(subject, 3, start=3) == [], "nobody wakes it"


def test_spare_memory_is_looked_for_once_a_round_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = world()
    models = [replace(MODEL, name=f"m{number}", revision=f"sha256:{number}") for number in range(50)]
    subject.models_replaced(models, 0.0, is_synced=True)
    subject.expect({model.name: expected(Rung.STAGED)["m"] for model in models}, 0.0)
    pass_time(subject, 3)
    (worker,) = subject.fleet.workers()
    staged_count = len(worker.staged)
    assert 0 < staged_count < 50
    look_count, look = 0, subject.fleet.open_workers

    def counted() -> list[Worker]:
        nonlocal look_count
        look_count += 1
        return look()

    monkeypatch.setattr(subject.fleet, "open_workers", counted)
    pass_time(subject, 1, start=3)
    assert look_count < 20, "those that are staged, and one that finds none"
    # What comes free is given to somebody in the next round.
    subject.lifecycle.warmth.unstage(next(iter(worker.staged)))
    pass_time(subject, 1, start=4)
    assert len(worker.staged) == staged_count


def test_a_replica_that_is_to_sleep_goes_on_sleeping_and_without_one_weights_are_staged() -> None:
    subject = world(sleeper())
    subject.expect(expected(Rung.ASLEEP), 0.0)
    assert [type(order) for _, order in pass_time(subject, 400)] == [StageRevision, SleepReplica]
    empty = world()
    empty.expect(expected(Rung.ASLEEP), 0.0)
    assert [type(order) for _, order in pass_time(empty, 20)] == [StageRevision]


def test_a_replica_that_is_not_worth_waiting_for_goes_sooner_and_never_later() -> None:
    for seconds, at in ((20.0, 20), (80.0, 50), (0.0, 50)):
        subject = world(sleeper())
        subject.expect(expected(Rung.DISK, idle_seconds=seconds), 0.0)
        assert [now for now, order in pass_time(subject, 60) if isinstance(order, SleepReplica)] == [at]


# Times with other bounds.
OFFICE = Window("0 8 * * *", 10 * 3600.0, min_replicas=2)
WINDOWED = replace(MODEL, scaling=Scaling(windows=(OFFICE,)))


def test_a_window_promises_replicas_while_it_is_open() -> None:
    subject = world(model=WINDOWED)
    at_seven = 7 * 3600
    subject.lifecycle.wants.set_clock(0.0, at_seven)
    subject.worker_seen("w", at_seven)
    assert orders(subject.tick(float(at_seven + 3590))) == []
    subject.worker_seen("w", at_seven + 3600)
    asked = [order for order in orders(subject.tick(float(at_seven + 3600))) if isinstance(order, StartReplica)]
    held = subject.catalogue.get("m")
    assert held is not None
    assert (held.min_replicas, len(asked)) == (2, 1)
    assert "m" in subject.catalogue.pinned()
    for number, order in enumerate(asked):
        starting = subject.fleet.replica(order.replica_id)
        assert starting is not None
        subject.replica_event("w", number + 1, ready(starting), at_seven + 3601.0)
    for now in (18 * 3600 - 1, 18 * 3600):
        subject.worker_seen("w", now)
        subject.tick(float(now))
    after = subject.catalogue.get("m")
    assert after == WINDOWED
    assert not subject.catalogue.pinned()
    assert [(each.from_count, each.to_count) for each in subject.lifecycle.wants.decisions.kept] == [(0, 2), (2, 0)]
    assert "0 8 * * * UTC is open" in subject.lifecycle.wants.decisions.kept[0].reason


def test_what_the_registry_says_anew_has_the_bounds_of_its_open_window_at_once() -> None:
    subject = world(model=WINDOWED)
    subject.lifecycle.wants.set_clock(9 * 3600.0, 0.0)
    assert subject.catalogue.pinned() == {"m"}
    subject.model_upserted(replace(WINDOWED, revision="sha256:2"), 1.0)
    held = subject.catalogue.get("m")
    assert held is not None
    assert (held.min_replicas, held.revision) == (2, "sha256:2")
    subject.models_replaced([WINDOWED], 2.0, is_synced=True)
    assert subject.catalogue.pinned() == {"m"}


@dataclass
class Policies:
    """A ModelSource that has one model."""

    model: ModelEntry

    async def find(self, name: str) -> ModelEntry:
        return self.model

    async def set_count(self, name: str, count: int) -> ModelEntry:
        assert self.model.scaling is not None
        return replace(self.model, min_replicas=count, scaling=replace(self.model.scaling, min_replicas=count))


@pytest.mark.parametrize("window_count", [0, 1])
async def test_scaling_to_zero_leaves_what_an_open_window_promises(window_count: int) -> None:
    windows = (Window("* * * * *", 3600.0, min_replicas=1),) * window_count
    model = replace(MODEL, min_replicas=1, scaling=Scaling(min_replicas=1, windows=windows))
    subject = world(replica(), model=model)
    runtime = Runtime(subject, publisher=NoEnvoys(), memory=SlowDisk())
    request = pb.ScaleModelRequest(model="m", replica_count=0)
    response = await AdminServicer(runtime, Policies(model)).ScaleModel(request, None)
    assert response.desired_count == 0
    assert len(subject.traffic.staying("m")) == response.ready_count == window_count


async def test_what_was_decided_is_known_to_the_next_run(tmp_path: Path) -> None:
    subject = world(sleeper())
    pass_time(subject, 400)
    decisions = subject.lifecycle.wants.decisions
    await Store(tmp_path, subject.catalogue).save_decisions(decisions.documents(1_000_000.0))
    again = world(replica())
    # The next run's clock began an hour later.
    again.lifecycle.wants.decisions.restore(load_decisions(tmp_path, 1_003_600.0))
    kept = list(again.lifecycle.wants.decisions.kept)
    assert [replace(each, at=each.at + 3600.0) for each in kept] == list(decisions.kept)
    pass_time(again, 60)
    assert len(kept) < len(again.lifecycle.wants.decisions.kept)
    assert list(again.lifecycle.wants.decisions.kept)[: len(kept)] == kept


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'[{"at": 1}]', b'[{"at": "x"}]'])
def test_a_damaged_file_of_decisions_counts_as_absent(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "decisions.json").write_bytes(content)
    assert load_decisions(tmp_path, 0.0) == []


async def test_what_a_policy_says_is_kept_on_disk(tmp_path: Path) -> None:
    scaling = Scaling(0, 3, (OFFICE, Window("0 0 * * SUN", 60.0, "Europe/Berlin", max_replicas=1)), 5.0, None, 0.0)
    subject = world(model=replace(MODEL, scaling=scaling))
    store = Store(tmp_path, subject.catalogue)
    await store.write_models()
    assert load_models(tmp_path) == subject.catalogue.models()
