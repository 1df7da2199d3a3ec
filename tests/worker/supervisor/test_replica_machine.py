"""The life of a replica: every order of events, and the cases that matter by name."""

from dataclasses import replace
from datetime import UTC, datetime

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.mesh.transfer.progress import TransferProgress
from helios.worker.replica.settings import Compilation, EngineSettings
from helios.worker.supervisor import life_actions as act
from helios.worker.supervisor import life_events as on
from helios.worker.supervisor.life_stages import Limits, Stage
from helios.worker.supervisor.records import (
    Failure,
    Order,
    PhaseTiming,
    ProcessIdentity,
    ReplicaState,
    ReplicaView,
)
from helios.worker.supervisor.replica_machine import ReplicaMachine

LIMITS = Limits(fetch_seconds=60, start_seconds=30, drain_seconds=20, drain_grace_seconds=2)
ORDER = Order(
    replica_id="r1",
    model="m",
    revision="sha256:" + "0" * 64,
    engine="vllm",
    memory_bytes=1 << 30,
    kv_cache_bytes=1 << 20,
    max_context_tokens=0,
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
)
PROCESS = ProcessIdentity(4242, 99)
BOOM = Failure("BOOM", "it broke")


def drive(machine: ReplicaMachine, *events: on.Event, now: float = 0.0) -> list[act.Action]:
    """Handles events at one moment and returns the actions of the last one."""
    actions: list[act.Action] = []
    for event in events:
        actions = machine.handle(event, now)
    return actions


def ready_machine() -> ReplicaMachine:
    machine = ReplicaMachine(ORDER, LIMITS)
    drive(
        machine,
        on.Begin(),
        on.WeightsReady("/weights", "lease"),
        on.Forked(PROCESS),
        on.BecameReady("127.0.0.1:1", 512),
    )
    return machine


def test_a_start_goes_through_all_states_and_keeps_its_phases() -> None:
    machine = ReplicaMachine(ORDER, LIMITS)
    assert machine.handle(on.Begin(), 10.0) == [act.Fetch(), act.Publish()]
    assert machine.handle(on.WeightsReady("/w", "lease"), 12.5) == [act.Fork("/w", "lease", 42.5, 12.5), act.Publish()]
    assert machine.handle(on.Forked(PROCESS), 13.0) == [act.Watch(PROCESS), act.Publish()]
    machine.handle(on.Attached(PROCESS, ReplicaState.LOADING, phases=(PhaseTiming("fork", 0.5),)), 13.1)
    machine.handle(on.Progressed(ReplicaState.WARMING, PhaseTiming("load", 1.0)), 14.0)
    assert machine.view.state is ReplicaState.WARMING
    machine.handle(on.BecameReady("127.0.0.1:9", 512), 15.0)
    assert (machine.view.state, machine.view.address) == (ReplicaState.READY, "127.0.0.1:9")
    assert [(phase.phase, phase.seconds) for phase in machine.view.phases] == [
        ("fetch", 2.5),
        ("fork", 0.5),
        ("load", 1.0),
        ("report", 1.0),
    ]
    assert machine.deadline is None


def early_machine() -> ReplicaMachine:
    machine = ReplicaMachine(ORDER, LIMITS)
    machine.handle(on.Begin(), 10.0)
    actions = machine.handle(on.WeightsEnough("/growing"), 12.0)
    assert actions == [act.Fork("/growing", "", 42.0, 12.0, is_early=True), act.Publish()]
    drive(machine, on.Forked(PROCESS), now=12.5)
    return machine


def test_an_early_start_shows_its_fetch_and_gets_its_time_when_all_is_lent() -> None:
    machine = early_machine()
    assert machine.deadline == 70.0, "the fetch's"
    machine.handle(on.Progressed(ReplicaState.WARMING, PhaseTiming("load", 30.0)), 44.0)
    machine.handle(on.WeightsCome(TransferProgress(1, 2)), 45.0)
    assert (machine.view.state, machine.view.fetch) == (ReplicaState.WARMING, TransferProgress(1, 2))
    assert machine.handle(on.WeightsReady("/w", "lease"), 50.0) == [act.Publish()]
    assert (machine.view.fetch, machine.view.lease_id, machine.deadline) == (None, "lease", 80.0)
    machine.handle(on.BecameReady("127.0.0.1:9", 512), 51.0)
    assert machine.view.state is ReplicaState.READY
    phases = {phase.phase: phase.seconds for phase in machine.view.phases}
    assert phases == {"fetch": 2.0, "load": 30.0, "report": 9.0}, "from the order to ready, and nothing twice"


def test_a_fetch_that_fails_ends_an_early_start_with_its_reason() -> None:
    machine = early_machine()
    assert drive(machine, on.WeightsFailed(BOOM), now=20.0) == [act.KillTree(PROCESS), act.Publish()]
    drive(machine, on.TreeGone(), now=20.1)
    assert (machine.view.state, machine.view.failure) == (ReplicaState.FAILED, BOOM)


@pytest.mark.parametrize(
    "event",
    [on.BecameReady("127.0.0.1:9", 512), on.Attached(PROCESS, ReplicaState.READY, "127.0.0.1:9", 512)],
    ids=["ready", "hello"],
)
def test_a_replica_that_says_it_is_ready_before_its_weights_are_lent_is_killed(event: on.Event) -> None:
    machine = early_machine()
    assert drive(machine, event, now=20.0)[-2:] == [act.KillTree(PROCESS), act.Publish()]
    assert machine.view.failure is not None
    assert machine.view.failure.reason == "READY_UNLENT"


def test_a_hung_start_is_killed_at_its_deadline_and_says_so() -> None:
    machine = ReplicaMachine(ORDER, LIMITS)
    drive(machine, on.Begin(), on.WeightsReady("/w", "l"), on.Forked(PROCESS))
    assert machine.handle(on.Tick(), 29.9) == []
    assert machine.handle(on.Tick(), 30.0) == [act.KillTree(PROCESS), act.Publish()]
    assert machine.view.state is ReplicaState.DRAINING
    assert machine.handle(on.TreeGone(), 31.0) == [act.ReleaseWeights(), act.Free(), act.Publish()]
    assert machine.view.state is ReplicaState.FAILED
    assert machine.view.failure is not None
    assert machine.view.failure.reason == "START_TIMEOUT"


@pytest.mark.parametrize(
    "order",
    [replace(ORDER, is_background=True), replace(ORDER, settings=EngineSettings(compilation=Compilation.COMPILED))],
    ids=["background", "compiled"],
)
def test_a_long_start_has_more_time_also_under_another_supervisor(order: Order) -> None:
    limits = replace(LIMITS, background_start_seconds=300)
    machine = ReplicaMachine(order, limits)
    drive(machine, on.Begin(), on.WeightsReady("/w", "l"), on.Forked(PROCESS))
    assert machine.deadline == 300
    taken_over = ReplicaMachine.returning(replace(machine.view), limits, return_by=15.0)
    drive(taken_over, on.Attached(PROCESS, ReplicaState.WARMING), now=100.0)
    assert taken_over.deadline == 400


def test_a_large_model_has_more_time_to_start_and_to_wake_than_a_small_one() -> None:
    limits = replace(LIMITS, wake_seconds=10, least_bytes_per_second=64 << 20)
    machine = ReplicaMachine(replace(ORDER, memory_bytes=80 << 30), limits)
    drive(machine, on.Begin(), on.WeightsReady("/w", "l"), on.Forked(PROCESS))
    assert machine.deadline == 30 + 1280
    assert machine.handle(on.Tick(), 1300.0) == [], "killed at a fixed time, it would never come up"
    drive(machine, on.BecameReady("127.0.0.1:1", 512, can_sleep=True), now=1301.0)
    drive(machine, on.SleepRequested(0), on.FellAsleep(0), on.WakeRequested(), now=1400.0)
    assert machine.deadline == 1400 + 10 + 1280


def test_weights_may_take_as_long_as_they_like_while_they_come() -> None:
    machine = ReplicaMachine(ORDER, LIMITS)
    drive(machine, on.Begin())
    for minute in range(60):
        drive(machine, on.WeightsCome(TransferProgress(minute, 1000)), on.Tick(), now=minute * 59.0)
    assert machine.stage is Stage.FETCHING
    drive(machine, on.WeightsCome(TransferProgress(59, 1000)), now=3500.0)
    assert machine.deadline == 59 * 59.0 + 60, "nothing came"
    drive(machine, on.Tick(), now=3541.0)
    assert machine.view.failure == Failure("FETCH_TIMEOUT", "no byte of the weights came for 60 s")


def test_bytes_that_go_and_come_again_are_no_progress() -> None:
    machine = ReplicaMachine(ORDER, LIMITS)
    drive(machine, on.Begin())
    for minute in range(10):
        drive(machine, on.WeightsCome(TransferProgress(minute % 2, 1000)), on.Tick(), now=minute * 59.0)
    assert machine.view.failure == Failure("FETCH_TIMEOUT", "no byte of the weights came for 60 s")


def test_a_stop_during_the_fork_waits_for_the_process_and_kills_it() -> None:
    machine = ReplicaMachine(ORDER, LIMITS)
    drive(machine, on.Begin(), on.WeightsReady("/w", "l"))
    assert act.Free() not in machine.handle(on.StopRequested(), 1.0)
    assert machine.handle(on.Forked(PROCESS), 2.0) == [act.KillTree(PROCESS), act.Publish()]
    assert act.Free() in machine.handle(on.TreeGone(), 3.0)
    assert machine.view.state is ReplicaState.STOPPED


def test_a_death_while_draining_is_a_stop_and_a_death_while_ready_a_failure() -> None:
    draining = ready_machine()
    drive(draining, on.DrainRequested(5), on.ProcessExited(1), on.TreeGone())
    assert draining.view.state is ReplicaState.STOPPED
    ready = ready_machine()
    drive(ready, on.ProcessExited(), on.ProcessExited(-9), on.TreeGone())
    assert ready.view.state is ReplicaState.FAILED
    assert ready.view.failure is not None
    assert "SIGKILL" in ready.view.failure.message


def test_a_drain_that_takes_too_long_ends_in_a_kill() -> None:
    machine = ready_machine()
    assert drive(machine, on.DrainRequested(5), now=100.0) == [act.SendDrain(5), act.Publish()]
    assert machine.deadline == 107.0
    assert machine.handle(on.Tick(), 107.0) == [act.KillTree(PROCESS), act.Publish()]


def test_a_replica_that_comes_back_while_draining_is_told_again_with_what_is_left() -> None:
    machine = ready_machine()
    drive(machine, on.DrainRequested(5), now=100.0)
    actions = drive(machine, on.Attached(PROCESS, ReplicaState.READY, "127.0.0.1:1", 512), now=103.0)
    assert act.SendDrain(2.0) in actions
    assert machine.stage is Stage.DRAINING


def test_a_replica_that_drains_on_its_own_account_is_shown_as_draining() -> None:
    machine = ready_machine()
    drive(machine, on.Progressed(ReplicaState.DRAINING, None), now=50.0)
    assert machine.view.state is ReplicaState.DRAINING
    assert machine.deadline == 72.0


def test_a_replica_taken_over_that_says_nothing_is_lost_and_killed() -> None:
    view = ReplicaView(ORDER, ReplicaState.READY, "127.0.0.1:1", PROCESS, lease_id="old")
    machine = ReplicaMachine.returning(view, LIMITS, return_by=15.0)
    assert machine.resume() == [act.Watch(PROCESS), act.Fetch("old")]
    assert machine.is_awaited
    assert machine.handle(on.Tick(), 15.0) == [act.KillTree(PROCESS), act.Publish()]
    drive(machine, on.TreeGone())
    assert machine.view.failure is not None
    assert machine.view.failure.reason == "REPLICA_LOST"


@pytest.mark.parametrize("state", [ReplicaState.LOADING, ReplicaState.WARMING, ReplicaState.READY])
def test_a_replica_taken_over_goes_on_in_the_state_that_it_says(state: ReplicaState) -> None:
    view = ReplicaView(ORDER, ReplicaState.LOADING, process=PROCESS)
    machine = ReplicaMachine.returning(view, LIMITS, return_by=15.0)
    drive(machine, on.Attached(PROCESS, state, "127.0.0.1:1", 512), now=1.0)
    assert machine.view.state is state
    assert not machine.is_awaited
    assert machine.deadline == (None if state is ReplicaState.READY else 31.0)


def asleep_machine(left_bytes: int = 5) -> ReplicaMachine:
    machine = ready_machine()
    drive(machine, on.SleepRequested(100), on.FellAsleep(left_bytes))
    return machine


def test_a_replica_sleeps_gives_memory_back_wakes_and_counts_it() -> None:
    machine = ready_machine()
    assert drive(machine, on.SleepRequested(100), now=10.0) == [act.SendSleep(), act.Publish()]
    assert (machine.view.state, machine.view.memory_bytes) == (ReplicaState.ASLEEP, 1 << 30)
    assert machine.handle(on.FellAsleep(0), 11.0) == [act.Shrink(100), act.Publish()]
    assert machine.view.memory_bytes == 100
    assert machine.deadline is None
    assert machine.handle(on.WakeRequested(), 20.0) == [act.SendWake(), act.Publish()]
    assert (machine.view.state, machine.view.memory_bytes) == (ReplicaState.WAKING, 1 << 30)
    assert machine.handle(on.BecameReady("127.0.0.1:1", 512, True), 21.0) == [act.Publish()]
    assert (machine.view.state, machine.view.wake_count) == (ReplicaState.READY, 1)
    assert machine.deadline is None


def test_a_wake_that_overtakes_the_sleep_follows_it_and_gives_no_memory_back() -> None:
    machine = ready_machine()
    drive(machine, on.SleepRequested(100), on.WakeRequested())
    assert machine.handle(on.FellAsleep(5), 1.0) == [act.SendWake(), act.Publish()]
    assert machine.view.state is ReplicaState.WAKING


def test_a_replica_that_has_requests_after_all_stays_awake() -> None:
    machine = ready_machine()
    drive(machine, on.SleepRequested(100), on.BecameReady("127.0.0.1:1", 512, True))
    assert (machine.view.state, machine.view.wake_count) == (ReplicaState.READY, 0)


def test_a_second_order_that_is_carried_out_after_all_counts() -> None:
    machine = ready_machine()
    drive(machine, on.SleepRequested(100), on.BecameReady("127.0.0.1:1", 512, True))
    assert machine.handle(on.FellAsleep(5), 1.0) == [act.Shrink(5), act.Publish()]
    assert machine.view.state is ReplicaState.ASLEEP


@pytest.mark.parametrize(
    ("events", "reason"), [([], "SLEEP_TIMEOUT"), ([on.FellAsleep(1), on.WakeRequested()], "WAKE_TIMEOUT")]
)
def test_who_does_not_fall_asleep_or_wake_in_time_is_killed(events: list[on.Event], reason: str) -> None:
    machine = ready_machine()
    drive(machine, on.SleepRequested(100), *events)
    assert machine.handle(on.Tick(), 60.0) == [act.KillTree(PROCESS), act.Publish()]
    drive(machine, on.TreeGone())
    assert machine.view.failure is not None
    assert machine.view.failure.reason == reason


def test_a_failed_canary_ends_the_replica_with_its_reason() -> None:
    machine = asleep_machine()
    drive(machine, on.WakeRequested())
    assert act.KillTree(PROCESS) in drive(machine, on.ReportedFailure(Failure("CANARY_FAILED", "wrong weights")))
    drive(machine, on.TreeGone())
    assert machine.view.failure == Failure("CANARY_FAILED", "wrong weights")


def test_a_sleeping_replica_that_is_drained_is_killed_at_once() -> None:
    assert drive(asleep_machine(), on.DrainRequested(5)) == [act.KillTree(PROCESS), act.Publish()]


def test_orders_that_a_replica_missed_are_repeated_when_it_comes_back() -> None:
    machine = ready_machine()
    drive(machine, on.SleepRequested(100))
    assert act.SendSleep() in drive(machine, on.Attached(PROCESS, ReplicaState.READY, "127.0.0.1:1", 512))
    drive(machine, on.FellAsleep(5), on.WakeRequested())
    assert act.SendWake() in drive(machine, on.Attached(PROCESS, ReplicaState.ASLEEP, "127.0.0.1:1", 512))


@pytest.mark.parametrize("state", [ReplicaState.READY, ReplicaState.WAKING, ReplicaState.DRAINING])
def test_a_replica_that_is_awake_against_all_belief_books_its_memory_again(state: ReplicaState) -> None:
    machine = asleep_machine()
    assert act.Regrow() in drive(machine, on.Attached(PROCESS, state, "127.0.0.1:1", 512))
    assert machine.view.state is state
    assert machine.view.sleeping_bytes is None


def test_a_replica_taken_over_that_sleeps_unknown_to_the_list_is_shrunk() -> None:
    view = ReplicaView(ORDER, ReplicaState.READY, "127.0.0.1:1", PROCESS, lease_id="old")
    machine = ReplicaMachine.returning(view, LIMITS, return_by=15.0)
    hello = on.Attached(PROCESS, ReplicaState.ASLEEP, "127.0.0.1:1", 512, can_sleep=True, left_bytes=7)
    assert drive(machine, hello, now=1.0) == [act.Shrink(7), act.Publish()]
    assert machine.view.state is ReplicaState.ASLEEP
    assert machine.deadline is None


@pytest.mark.parametrize("state", [ReplicaState.PENDING, ReplicaState.STOPPED, ReplicaState.FAILED])
def test_only_a_running_replica_can_be_taken_over(state: ReplicaState) -> None:
    with pytest.raises(ValueError, match="taken over"):
        ReplicaMachine.returning(ReplicaView(ORDER, state, process=PROCESS), LIMITS, return_by=1.0)


class Lives(RuleBasedStateMachine):
    """Plays launcher, storage agent, kernel and proxy in any order that the world allows."""

    def __init__(self) -> None:
        super().__init__()
        self.machine = ReplicaMachine(ORDER, LIMITS)
        self.now = 0.0
        self.is_fetching = self.is_forking = self.is_killing = False
        self.has_processes = False
        self.kill_count = self.free_count = 0
        self.booked_bytes = ORDER.memory_bytes
        self.history: list[ReplicaState] = []
        self.play(on.Begin())

    def play(self, event: on.Event) -> None:
        for action in self.machine.handle(event, self.now):
            assert self.free_count == 0 or isinstance(action, act.Publish), "nothing follows the end"
            match action:
                case act.Fetch():
                    self.is_fetching = True
                case act.Fork():
                    self.is_forking = True
                case act.KillTree(process):
                    assert process == PROCESS
                    self.is_killing = True
                    self.kill_count += 1
                case act.Shrink(left_bytes):
                    self.booked_bytes = left_bytes
                case act.Regrow():
                    self.booked_bytes = ORDER.memory_bytes
                case act.Free():
                    assert not self.has_processes, "freed while a process lives"
                    assert not self.is_forking, "freed while a fork may still succeed"
                    self.free_count += 1
        self.history.append(self.machine.view.state)

    @rule(seconds=st.floats(0.1, 40))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.play(on.Tick())

    @rule()
    def weights_are_on_their_way(self) -> None:
        self.play(on.WeightsCome(TransferProgress(1, 2)))

    @precondition(lambda self: self.is_fetching)
    @rule()
    def enough_is_here(self) -> None:
        self.play(on.WeightsEnough("/growing"))

    @invariant()
    def only_a_replica_that_fetches_shows_a_fetch(self) -> None:
        fetches = (ReplicaState.FETCHING, ReplicaState.LOADING, ReplicaState.WARMING)
        assert self.machine.view.fetch is None or (self.machine.view.state in fetches and not self.machine.is_lent)

    @invariant()
    def nothing_is_ready_before_it_is_lent(self) -> None:
        if self.machine.view.state in (ReplicaState.READY, ReplicaState.ASLEEP, ReplicaState.WAKING):
            assert self.machine.is_lent

    @precondition(lambda self: self.is_fetching)
    @rule(is_ok=st.booleans())
    def weights_come(self, is_ok: bool) -> None:
        self.is_fetching = False
        self.play(on.WeightsReady("/w", "lease") if is_ok else on.WeightsFailed(BOOM))

    @precondition(lambda self: self.is_forking)
    @rule(is_ok=st.booleans())
    def fork_ends(self, is_ok: bool) -> None:
        self.is_forking, self.has_processes = False, is_ok
        self.play(on.Forked(PROCESS) if is_ok else on.ForkFailed(BOOM))

    @rule(is_wake=st.booleans())
    def somebody_orders(self, is_wake: bool) -> None:
        if not is_wake:
            self.play(on.SleepRequested(100))
        elif self.machine.view.state is ReplicaState.ASLEEP:
            # The supervisor books before it orders.
            self.booked_bytes = ORDER.memory_bytes
            self.play(on.WakeRequested())

    @precondition(lambda self: self.has_processes)
    @rule(
        event=st.sampled_from(
            [
                "hello",
                "warming",
                "ready",
                "asleep",
                "hello asleep",
                "hello ready",
                "drains",
                "failed",
                "died",
                "died again",
            ]
        )
    )
    def replica_does(self, event: str) -> None:
        events: dict[str, on.Event] = {
            "asleep": on.FellAsleep(7),
            "hello asleep": on.Attached(PROCESS, ReplicaState.ASLEEP, "127.0.0.1:1", 512, left_bytes=7),
            "hello ready": on.Attached(PROCESS, ReplicaState.READY, "127.0.0.1:1", 512),
            "hello": on.Attached(PROCESS, ReplicaState.WARMING),
            "warming": on.Progressed(ReplicaState.WARMING, PhaseTiming("load", 1.0)),
            "ready": on.BecameReady("127.0.0.1:1", 512),
            "drains": on.Progressed(ReplicaState.DRAINING, None),
            "failed": on.ReportedFailure(BOOM),
            "died": on.ProcessExited(),
            "died again": on.ProcessExited(-9),
        }
        self.play(events[event])

    @rule(event=st.sampled_from([on.DrainRequested(5.0), on.StopRequested(), on.Begin()]))
    def somebody_asks(self, event: on.Event) -> None:
        self.play(event)

    @precondition(lambda self: self.is_killing)
    @rule()
    def tree_goes(self) -> None:
        self.is_killing = self.has_processes = False
        self.play(on.TreeGone())

    @precondition(lambda self: not self.is_killing)
    @rule()
    def stray_tree_gone(self) -> None:
        self.play(on.TreeGone())

    @invariant()
    def kills_and_frees_at_most_once(self) -> None:
        assert self.kill_count <= 1
        assert self.free_count <= 1

    @invariant()
    def ended_means_freed_and_freed_means_ended(self) -> None:
        assert self.machine.view.state.is_ended == (self.free_count == 1)

    @invariant()
    def ended_is_for_good(self) -> None:
        ends = [state for state in self.history if state.is_ended]
        assert len(set(ends)) <= 1
        assert not ends or self.history[-1] is ends[0]

    @invariant()
    def failed_has_a_reason_and_stopped_has_none(self) -> None:
        view = self.machine.view
        if view.state.is_ended:
            assert (view.failure is not None) == (view.state is ReplicaState.FAILED)

    @invariant()
    def ready_has_an_address_and_a_process(self) -> None:
        if self.machine.view.state is ReplicaState.READY:
            assert self.machine.view.address
            assert self.machine.view.process == PROCESS

    @invariant()
    def only_a_sleeping_replica_books_less_than_was_ordered(self) -> None:
        view = self.machine.view
        if self.machine.stage is not Stage.ENDING and not view.state.is_ended:
            assert self.booked_bytes == view.memory_bytes
            assert (view.sleeping_bytes is None) == (self.machine.stage is not Stage.ASLEEP)

    @invariant()
    def no_state_before_ready_and_no_drain_lasts_for_ever(self) -> None:
        waits_for_somebody = (
            *(Stage.FETCHING, Stage.LOADING, Stage.WARMING, Stage.DRAINING),
            *(Stage.FALLING_ASLEEP, Stage.WAKING),
        )
        if self.machine.stage in waits_for_somebody:
            assert self.machine.deadline is not None


TestEveryOrderOfEvents = Lives.TestCase


WATCHFUL = replace(LIMITS, silence_seconds=5.0)


def watched_machine(now: float = 0.0) -> ReplicaMachine:
    machine = ReplicaMachine(ORDER, WATCHFUL)
    ready = on.BecameReady("127.0.0.1:1", 512)
    drive(machine, on.Begin(), on.WeightsReady("/weights", "lease"), on.Forked(PROCESS), ready, now=now)
    return machine


def test_a_ready_replica_that_falls_silent_is_killed_and_says_so() -> None:
    machine = watched_machine()
    assert machine.deadline == 5.0
    assert machine.handle(on.Heard(), 3.0) == []
    assert machine.deadline == 8.0
    assert machine.handle(on.Tick(), 7.9) == []
    assert machine.handle(on.Tick(), 8.0) == [act.KillTree(PROCESS), act.Publish()]
    assert machine.view.failure == Failure("REPLICA_HUNG", "the replica said nothing for 5 s")
    machine.handle(on.TreeGone(("INFO: last", "Killed")), 8.1)
    failure = machine.view.failure
    assert failure is not None
    assert failure.message.splitlines()[1:] == ["the last lines of its log:", "INFO: last", "Killed"]


def test_a_supervisor_that_stood_still_blames_no_replica() -> None:
    machine = watched_machine()
    assert machine.handle(on.Tick(), 60.0) == []
    assert machine.deadline == 65.0
    assert machine.handle(on.Heard(), 60.1) == []
    assert machine.view.state is ReplicaState.READY


@pytest.mark.parametrize("event", [on.DrainRequested(9.0), on.SleepRequested(0)])
def test_silence_is_borne_by_what_has_a_deadline_of_its_own(event: on.Event) -> None:
    machine = watched_machine()
    machine.handle(event, 1.0)
    assert machine.deadline is not None
    assert machine.deadline > 6.0


def test_the_time_since_the_request_is_a_phase_where_the_clocks_agree() -> None:
    for ahead, seconds in ((2.5, 2.5), (-2.5, 0.0)):
        order = replace(ORDER, requested_at=ORDER.created_at.timestamp() - ahead)
        machine = ReplicaMachine(order, LIMITS)
        machine.handle(on.Begin(), 0.0)
        assert [(phase.phase, phase.seconds) for phase in machine.view.phases] == [("schedule", seconds)]
