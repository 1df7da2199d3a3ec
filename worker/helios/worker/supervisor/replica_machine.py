"""The life of one replica as a pure state machine: no clock, no process, no socket; the caller executes the actions.

Starting, dying and being killed overlap in every order: a stop while the fork is in flight, a death while draining, a
failure report just before the exit. Here each combination has one answer. The stage ENDING is shown to others as
DRAINING: the contract calls a replica stopped or failed only when its whole process tree is gone, because only then
is its memory free.
"""

import signal
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from helios.worker.replica.settings import Compilation
from helios.worker.supervisor.life_actions import (
    Action,
    Fetch,
    Fork,
    Free,
    KillTree,
    Publish,
    Regrow,
    ReleaseWeights,
    SendDrain,
    SendSleep,
    SendWake,
    Shrink,
    Watch,
)
from helios.worker.supervisor.life_events import (
    Attached,
    BecameReady,
    Begin,
    DrainRequested,
    Event,
    FellAsleep,
    Forked,
    ForkFailed,
    Heard,
    ProcessExited,
    Progressed,
    ReportedFailure,
    SleepRequested,
    StopRequested,
    Tick,
    TreeGone,
    WakeRequested,
    WeightsCome,
    WeightsEnough,
    WeightsFailed,
    WeightsReady,
)
from helios.worker.supervisor.life_stages import (
    FETCH_TIMEOUT,
    READY_UNLENT,
    REPLICA_DIED,
    REPLICA_HUNG,
    REPLICA_LOST,
    SLEEP_TIMEOUT,
    START_TIMEOUT,
    WAKE_TIMEOUT,
    Limits,
    Stage,
)
from helios.worker.supervisor.records import (
    Failure,
    Order,
    PhaseTiming,
    ReplicaState,
    ReplicaView,
)

# A deadline that is seen this late says that the supervisor itself stood still, and what the replica said meanwhile has
# yet to be read.
_LATE_SECONDS: Final = 1.0
# Shorter gaps are what reading a clock twice costs.
_GAP_SECONDS: Final = 0.0005
# Phases that begin before the fork was asked for.
_BEFORE_FORK: Final = frozenset({"schedule", "fetch"})
_STARTING: Final = (Stage.LOADING, Stage.WARMING)
_IN_BED: Final = (Stage.FALLING_ASLEEP, Stage.ASLEEP, Stage.WAKING)
_RUNNING: Final = (Stage.LOADING, Stage.WARMING, Stage.READY, Stage.DRAINING, *_IN_BED)
_REPORTABLE: Final = {
    ReplicaState.LOADING: Stage.LOADING,
    ReplicaState.WARMING: Stage.WARMING,
    ReplicaState.READY: Stage.READY,
    ReplicaState.DRAINING: Stage.DRAINING,
    ReplicaState.ASLEEP: Stage.ASLEEP,
    ReplicaState.WAKING: Stage.WAKING,
}


class ReplicaMachine:
    """One replica, from the order to its last process.

    | stage | event | next | actions beside Publish |
    |---|---|---|---|
    | PENDING | Begin | FETCHING | Fetch |
    | FETCHING | WeightsCome, more than ever | FETCHING, and its time begins anew | |
    | FETCHING | WeightsReady | LOADING | Fork |
    | FETCHING | WeightsEnough | LOADING, not lent | Fork |
    | LOADING, WARMING, not lent | WeightsCome | the same | |
    | LOADING, WARMING, not lent | WeightsReady | the same, lent | |
    | LOADING, WARMING, not lent | WeightsFailed, the fetch's deadline, BecameReady | ENDING | KillTree, if … |
    | FETCHING | WeightsFailed, its deadline | FAILED | ReleaseWeights, Free |
    | PENDING, FETCHING | DrainRequested, StopRequested | STOPPED | ReleaseWeights, Free |
    | LOADING | Forked | LOADING | Watch |
    | LOADING | ForkFailed | FAILED | ReleaseWeights, Free |
    | LOADING, WARMING | Progressed | LOADING, WARMING | |
    | LOADING, WARMING | BecameReady | READY | |
    | LOADING, WARMING, READY | Attached | what the replica says | Watch where the process is news |
    | READY | DrainRequested | DRAINING | SendDrain |
    | READY | Progressed to DRAINING (it was sent a signal, or had no supervisor for too long) | DRAINING | |
    | DRAINING | Attached, DrainRequested | DRAINING | SendDrain |
    | READY | SleepRequested | FALLING_ASLEEP | SendSleep |
    | FALLING_ASLEEP | FellAsleep, Attached asleep | ASLEEP | Shrink |
    | FALLING_ASLEEP | WakeRequested | the same, and WAKING as soon as it sleeps | SendWake then, and no Shrink |
    | FALLING_ASLEEP, WAKING | Attached, having missed its order | the same | SendSleep, SendWake |
    | FALLING_ASLEEP | BecameReady (it has requests after all) | READY | |
    | ASLEEP | WakeRequested | WAKING | SendWake |
    | ASLEEP | Attached awake (the order of a supervisor that died) | WAKING, READY | Regrow |
    | WAKING | BecameReady, Attached ready | READY | |
    | FALLING_ASLEEP, ASLEEP, WAKING | DrainRequested | ENDING | KillTree |
    | LOADING, WARMING | DrainRequested | ENDING | KillTree, if there is a process |
    | READY | FellAsleep (a second order, after it had said that it stays awake) | ASLEEP | Shrink |
    | READY | Heard | the same, and silence counts anew | |
    | READY | Tick, silent for too long | ENDING | KillTree |
    | LOADING … DRAINING | StopRequested, ReportedFailure, ProcessExited, the deadline | ENDING | KillTree, if … |
    | ENDING without a process | Forked | ENDING | KillTree |
    | ENDING without a process | ForkFailed | STOPPED, FAILED | ReleaseWeights, Free |
    | ENDING | TreeGone | STOPPED, FAILED | ReleaseWeights, Free |

    Anything else changes nothing. Invariants: KillTree comes once; Free comes once, as the last thing, and after a
    KillTree only upon TreeGone; the first reason to end is the one that is reported; ended is for good; ready only
    what is lent.
    """

    def __init__(self, order: Order, limits: Limits) -> None:
        self._limits = limits
        self._stage = Stage.PENDING
        self._view = ReplicaView(order, ReplicaState.PENDING)
        self._deadline: float | None = None
        # What it means when the deadline passes; None: it ends as asked (a drain that took too long).
        self._overdue: Failure | None = None
        self._drain_deadline = 0.0
        self._fetching_since = 0.0
        # A chunk that is fetched again and again takes bytes away and brings them back, and gets no further.
        self._most_bytes = -1
        self._fork_asked_at: float | None = None
        self._heard_at: float | None = None
        self._left_bytes = 0
        self._is_wake_wanted = False
        self._is_lent = False

    @classmethod
    def returning(cls, view: ReplicaView, limits: Limits, *, return_by: float) -> "ReplicaMachine":
        """Takes over a replica of an earlier supervisor that runs and has until ``return_by`` to say hello.

        Raises:
            ValueError: The view has no process or is not of a running replica.
        """
        if view.process is None or view.state not in _REPORTABLE:
            raise ValueError(f"replica {view.replica_id} in state {view.state.value} can't be taken over")
        machine = cls(view.order, limits)
        machine._view = view
        machine._stage = _REPORTABLE[view.state]
        machine._deadline = return_by
        machine._is_lent = True
        machine._overdue = Failure(REPLICA_LOST, "the replica did not come back after its supervisor restarted")
        return machine

    @property
    def stage(self) -> Stage:
        """The stage."""
        return self._stage

    @property
    def view(self) -> ReplicaView:
        """The replica as others see it, without its load."""
        return self._view

    @property
    def is_lent(self) -> bool:
        """Whether its weights were lent; a replica that loads early is forked before that."""
        return self._is_lent

    @property
    def deadline(self) -> float | None:
        """When a Tick is due; None: never."""
        due = [at for at in (self._deadline, self._silent_at) if at is not None]
        return min(due, default=None)

    @property
    def is_awaited(self) -> bool:
        """Whether it was taken over and has yet to say hello."""
        return self._overdue is not None and self._overdue.reason == REPLICA_LOST

    def resume(self) -> list[Action]:
        """Returns what must run for a replica that was taken over by ``returning``."""
        assert self._view.process is not None
        return [Watch(self._view.process), Fetch(self._view.lease_id)]

    def handle(self, event: Event, now: float) -> list[Action]:
        """Takes an event at ``now`` (seconds of a monotonic clock) and returns what to do, in order."""
        is_heard = isinstance(event, Attached | Progressed | BecameReady | Heard)
        self._heard_at = now if is_heard else self._heard_at
        match event:
            case Begin():
                return self._begin(now)
            case WeightsCome() | WeightsEnough() | WeightsReady() | WeightsFailed():
                return self._on_weights(event, now)
            case Forked() | ForkFailed():
                return self._on_fork(event)
            case Attached():
                return self._on_attached(event, now)
            case Progressed() | BecameReady():
                return self._on_progress(event, now)
            case SleepRequested() | FellAsleep() | WakeRequested():
                return self._on_sleep(event, now)
            case DrainRequested(timeout_seconds):
                return self._on_drain(timeout_seconds, now)
            case StopRequested() | ReportedFailure():
                return self._on_end(event)
            case ProcessExited(status):
                return self._on_exit(status)
            case TreeGone(last_lines):
                return self._on_tree_gone(last_lines)
            case Tick() | Heard():
                return self._on_tick(now)

    @property
    def _start_seconds(self) -> float:
        limits, order = self._limits, self._view.order
        # Killed in the middle, a compile would begin anew with the next start, and never come to its end.
        is_long = order.is_background or order.settings.compilation is Compilation.COMPILED
        seconds = limits.background_start_seconds if is_long else limits.start_seconds
        return seconds + limits.loading_seconds(order.memory_bytes)

    @property
    def _silent_at(self) -> float | None:
        is_watched = self._stage is Stage.READY and self._limits.silence_seconds > 0 and not self.is_awaited
        return self._heard_at + self._limits.silence_seconds if is_watched and self._heard_at is not None else None

    def _on_tree_gone(self, last_lines: tuple[str, ...]) -> list[Action]:
        # Without a process nothing was killed: the fork is still under way.
        is_killed = self._stage is Stage.ENDING and self._view.process is not None
        return self._finish(last_lines) if is_killed else []

    def _on_tick(self, now: float) -> list[Action]:
        if self._deadline is not None and now >= self._deadline:
            return self._end(self._overdue)
        silent_at = self._silent_at
        if silent_at is None or now < silent_at:
            return []
        if now - silent_at > _LATE_SECONDS:
            self._heard_at = now
            return []
        return self._end(Failure(REPLICA_HUNG, f"the replica said nothing for {self._limits.silence_seconds:g} s"))

    def _begin(self, now: float) -> list[Action]:
        if self._stage is not Stage.PENDING:
            return []
        self._fetching_since = now
        order = self._view.order
        if order.requested_at:
            # Two clocks, the requesting proxy's and this node's: less than nothing says that they differ.
            schedule = max(0.0, order.created_at.timestamp() - order.requested_at)
            self._add_phases([PhaseTiming("schedule", schedule)])
        self._set_fetch_deadline(now)
        return [Fetch(), *self._enter(Stage.FETCHING)]

    def _on_weights(
        self, event: WeightsCome | WeightsEnough | WeightsReady | WeightsFailed, now: float
    ) -> list[Action]:
        match event:
            case WeightsCome(progress) if self._is_fetching:
                if progress.done_bytes > self._most_bytes:
                    self._most_bytes = progress.done_bytes
                    self._set_fetch_deadline(now)
                self._view = replace(self._view, fetch=progress)
                return [Publish()]
            case WeightsFailed(failure) if self._is_fetching:
                return self._end(failure)
            case WeightsEnough(path) if self._stage is Stage.FETCHING:
                return self._fork_on(path, "", now)
            case WeightsReady(path, lease_id) if self._stage is Stage.FETCHING:
                self._take_lease(lease_id, now)
                return self._fork_on(path, lease_id, now)
            case WeightsReady(_, lease_id) if self._is_fetching:
                self._take_lease(lease_id, now)
                return [Publish()]
            case WeightsReady(_, lease_id) if self._stage in _RUNNING:
                # An adopted replica's lease was renewed, perhaps under a new id.
                self._view = replace(self._view, lease_id=lease_id)
                return []
            case _:
                return []

    @property
    def _is_fetching(self) -> bool:
        return self._stage is Stage.FETCHING or (self._stage in _STARTING and not self._is_lent)

    def _take_lease(self, lease_id: str, now: float) -> None:
        self._is_lent = True
        self._view = replace(self._view, lease_id=lease_id, fetch=None)
        # Of an early start too: it has waited for the fetch until now.
        self._set_start_deadline(now)

    def _fork_on(self, path: str, lease_id: str, now: float) -> list[Action]:
        # What is fetched beside the start is the start's to tell, as far as it waits for it.
        self._add_phases([PhaseTiming("fetch", now - self._fetching_since)])
        self._fork_asked_at = now
        fork = Fork(path, lease_id, now + self._start_seconds, now, is_early=not self._is_lent)
        return [fork, *self._enter(Stage.LOADING)]

    def _on_fork(self, event: Forked | ForkFailed) -> list[Action]:
        if self._stage not in (*_STARTING, Stage.ENDING) or self._view.process is not None:
            return []
        if isinstance(event, ForkFailed):
            if self._stage is not Stage.ENDING:
                self._view = replace(self._view, failure=event.failure)
            return self._finish()
        self._view = replace(self._view, process=event.process)
        if self._stage is Stage.ENDING:
            return [KillTree(event.process), Publish()]
        return [Watch(event.process), Publish()]

    def _on_attached(self, event: Attached, now: float) -> list[Action]:
        if self._stage not in _RUNNING:
            return []
        actions: list[Action] = []
        if self._view.process is None:
            # The hello overtook the launcher's answer.
            self._view = replace(self._view, process=event.process)
            actions.append(Watch(event.process))
        self._add_phases(event.phases)
        if event.address:
            self._view = replace(
                self._view,
                address=event.address,
                max_context_tokens=event.max_context_tokens,
                can_sleep=event.can_sleep,
            )
        if self._stage is Stage.DRAINING:
            return [*actions, *self._resend_drain(now)]
        if self._stage in _IN_BED:
            return [*actions, *self._attached_in_bed(event, now)]
        reported = _REPORTABLE.get(event.state, self._stage)
        if self._is_fetching and reported in (Stage.READY, *_IN_BED):
            return [*actions, *self._end_unlent()]
        if reported in _STARTING and (self._stage not in _STARTING or self.is_awaited):
            self._set_start_deadline(now)
        elif reported in (Stage.ASLEEP, Stage.WAKING):
            return [*actions, *self._adopted_in_bed(reported, event.left_bytes, now)]
        elif reported is Stage.READY:
            self._set_deadline(None, None)
        elif reported is Stage.DRAINING:
            return [*actions, *self._drains_by_itself(now)]
        return [*actions, *self._enter(reported)]

    def _on_progress(self, event: Progressed | BecameReady, now: float) -> list[Action]:
        if isinstance(event, Progressed) and event.state is ReplicaState.DRAINING and self._stage is Stage.READY:
            return self._drains_by_itself(now)
        if self._stage not in (*_STARTING, Stage.FALLING_ASLEEP, Stage.WAKING):
            return []
        if isinstance(event, BecameReady):
            if self._is_fetching:
                return self._end_unlent()
            self._view = replace(
                self._view,
                address=event.address,
                max_context_tokens=event.max_context_tokens,
                can_sleep=event.can_sleep,
            )
            if self._stage in _STARTING:
                self._complete_phases(now)
            return self._become_ready()
        if self._stage in _IN_BED:
            return []
        if event.phase is not None:
            self._add_phases([event.phase])
        # READY takes an address: BecameReady alone leads there.
        is_later = event.state is ReplicaState.WARMING
        return self._enter(Stage.WARMING if is_later else self._stage)

    def _on_sleep(self, event: SleepRequested | FellAsleep | WakeRequested, now: float) -> list[Action]:
        match event, self._stage:
            case SleepRequested(left_bytes), Stage.READY:
                self._left_bytes, self._is_wake_wanted = left_bytes, False
                seconds = self._limits.sleep_seconds
                self._set_deadline(now + seconds, Failure(SLEEP_TIMEOUT, f"it did not sleep after {seconds:g} s"))
                return [SendSleep(), *self._enter(Stage.FALLING_ASLEEP)]
            case SleepRequested(), Stage.FALLING_ASLEEP:
                self._is_wake_wanted = False
                return []
            case FellAsleep(left_bytes), Stage.FALLING_ASLEEP | Stage.READY:
                # READY: an order that was repeated over a new stream was carried out after the first one had failed.
                return self._fell_asleep(left_bytes, now)
            case FellAsleep(left_bytes), Stage.ASLEEP if left_bytes:
                # Measured since, and by more than the replica itself can see.
                return self._fell_asleep(left_bytes, now)
            case WakeRequested(), Stage.FALLING_ASLEEP:
                self._is_wake_wanted = True
                return []
            case WakeRequested(), Stage.ASLEEP:
                return self._wake(now)
            case _:
                return []

    def _fell_asleep(self, left_bytes: int, now: float) -> list[Action]:
        if self._is_wake_wanted:
            return self._wake(now)
        self._set_deadline(None, None)
        # Where nothing was measured nor expected, it may have left everything.
        booked_bytes = self._view.order.memory_bytes
        left_bytes = min(left_bytes or self._left_bytes or booked_bytes, booked_bytes)
        self._view = replace(self._view, sleeping_bytes=left_bytes)
        return [Shrink(left_bytes), *self._enter(Stage.ASLEEP)]

    def _wake(self, now: float) -> list[Action]:
        self._is_wake_wanted = False
        self._view = replace(self._view, sleeping_bytes=None)
        self._set_wake_deadline(now)
        return [SendWake(), *self._enter(Stage.WAKING)]

    def _become_ready(self) -> list[Action]:
        woke = 1 if self._stage is Stage.WAKING else 0
        self._view = replace(self._view, wake_count=self._view.wake_count + woke)
        self._set_deadline(None, None)
        return self._enter(Stage.READY)

    def _attached_in_bed(self, event: Attached, now: float) -> list[Action]:
        match event.state, self._stage:
            case ReplicaState.READY, Stage.FALLING_ASLEEP:
                # A taken-over replica is not in this stage, so its order was sent by this supervisor and lost.
                return [SendSleep(), Publish()]
            case ReplicaState.ASLEEP, Stage.FALLING_ASLEEP | Stage.ASLEEP if self._view.sleeping_bytes is None:
                return self._fell_asleep(event.left_bytes, now)
            case ReplicaState.ASLEEP, Stage.WAKING:
                self._set_wake_deadline(now)
                return [SendWake(), Publish()]
            case ReplicaState.ASLEEP, Stage.ASLEEP:
                self._set_deadline(None, None)
                return [Publish()]
            case ReplicaState.READY, _:
                return [*self._regrow(), *self._become_ready()]
            case ReplicaState.DRAINING, _:
                return [*self._regrow(), *self._drains_by_itself(now)]
            case _:
                regrow = self._regrow()
                self._set_wake_deadline(now)
                return [*regrow, *self._enter(Stage.WAKING)]

    def _adopted_in_bed(self, stage: Stage, left_bytes: int, now: float) -> list[Action]:
        # Its supervisor died without having written the order, or what came of it, to its list.
        if stage is Stage.WAKING:
            self._set_wake_deadline(now)
            return self._enter(Stage.WAKING)
        return self._fell_asleep(left_bytes, now)

    def _regrow(self) -> list[Action]:
        if self._view.sleeping_bytes is None:
            return []
        self._view = replace(self._view, sleeping_bytes=None)
        return [Regrow()]

    def _on_drain(self, timeout_seconds: float, now: float) -> list[Action]:
        if self._stage not in (Stage.READY, Stage.DRAINING):
            # Before ready there is no request to finish.
            return self._end(None)
        self._drain_deadline = now + timeout_seconds
        self._set_deadline(self._drain_deadline + self._limits.drain_grace_seconds, None)
        return [SendDrain(timeout_seconds), *self._enter(Stage.DRAINING)]

    def _on_end(self, event: StopRequested | ReportedFailure) -> list[Action]:
        if isinstance(event, StopRequested):
            return self._end(None)
        return self._end(event.failure) if self._stage in _RUNNING else []

    def _drains_by_itself(self, now: float) -> list[Action]:
        self._drain_deadline = now + self._limits.drain_seconds
        self._set_deadline(self._drain_deadline + self._limits.drain_grace_seconds, None)
        return self._enter(Stage.DRAINING)

    def _resend_drain(self, now: float) -> list[Action]:
        if self.is_awaited:
            self._drains_by_itself(now)
        return [SendDrain(max(self._drain_deadline - now, 0.0)), Publish()]

    def _on_exit(self, status: int | None) -> list[Action]:
        if self._stage is Stage.ENDING:
            failure = self._view.failure
            if status is not None and failure is not None and failure.reason == REPLICA_DIED:
                # The pidfd was faster than the launcher, which alone knows the status.
                self._view = replace(self._view, failure=_death(status))
            return []
        if self._stage not in _RUNNING:
            return []
        return self._end(None if self._stage is Stage.DRAINING else _death(status))

    def _end(self, failure: Failure | None) -> list[Action]:
        if self._stage is Stage.ENDING or self._stage.shown.is_ended:
            return []
        self._view = replace(self._view, failure=failure)
        self._set_deadline(None, None)
        if self._stage in (Stage.PENDING, Stage.FETCHING):
            return self._finish()
        kill: list[Action] = [] if self._view.process is None else [KillTree(self._view.process)]
        return [*kill, *self._enter(Stage.ENDING)]

    def _finish(self, last_lines: tuple[str, ...] = ()) -> list[Action]:
        self._set_deadline(None, None)
        failure = self._view.failure
        if failure is not None and last_lines:
            text = "\n".join((failure.message, "the last lines of its log:", *last_lines))
            self._view = replace(self._view, failure=Failure(failure.reason, text))
        ended = Stage.STOPPED if self._view.failure is None else Stage.FAILED
        return [ReleaseWeights(), Free(), *self._enter(ended)]

    def _end_unlent(self) -> list[Action]:
        return self._end(Failure(READY_UNLENT, "the replica would serve weights that are not known to be right"))

    def _enter(self, stage: Stage) -> list[Action]:
        self._stage = stage
        self._view = replace(self._view, state=stage.shown, fetch=self._view.fetch if self._is_fetching else None)
        return [Publish()]

    def _set_deadline(self, deadline: float | None, overdue: Failure | None) -> None:
        self._deadline = deadline
        self._overdue = overdue

    def _set_fetch_deadline(self, now: float) -> None:
        """Weights may take as long as they like while they come."""
        seconds = self._limits.fetch_seconds
        self._set_deadline(now + seconds, Failure(FETCH_TIMEOUT, f"no byte of the weights came for {seconds:g} s"))

    def _set_start_deadline(self, now: float) -> None:
        seconds = self._start_seconds
        self._set_deadline(now + seconds, Failure(START_TIMEOUT, f"the replica was not ready after {seconds:g} s"))

    def _set_wake_deadline(self, now: float) -> None:
        seconds = self._limits.wake_seconds + self._limits.loading_seconds(self._view.order.memory_bytes)
        self._set_deadline(now + seconds, Failure(WAKE_TIMEOUT, f"the replica was not awake after {seconds:g} s"))

    def _complete_phases(self, now: float) -> None:
        """Adds the time from ready at the replica to this event, so that the phases leave nothing out."""
        if self._fork_asked_at is None:
            return
        known = sum(phase.seconds for phase in self._view.phases if phase.phase not in _BEFORE_FORK)
        gap = now - self._fork_asked_at - known
        if gap > _GAP_SECONDS:
            self._add_phases([PhaseTiming("report", gap)])

    def _add_phases(self, phases: Iterable[PhaseTiming]) -> None:
        known = {phase.phase for phase in self._view.phases}
        added = tuple(phase for phase in phases if phase.phase not in known)
        self._view = replace(self._view, phases=(*self._view.phases, *added))


def _death(status: int | None) -> Failure:
    if status is None:
        how = "its front process is gone"
    elif status < 0:
        known = -status in {number.value for number in signal.Signals}
        how = f"its front process was killed by {signal.Signals(-status).name if known else f'signal {-status}'}"
    else:
        how = f"its front process exited with {status}"
    return Failure(REPLICA_DIED, f"the replica died: {how}")
