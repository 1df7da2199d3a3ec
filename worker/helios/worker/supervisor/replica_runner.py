"""Carries out what a replica's state machine decides: weights, fork, watch, drain, kill.

The machine is told of everything that happens through ``post``, which is synchronous, so that events are handled one
after the other in the order in which they came. Each action that takes time is a task of the supervisor's group and
ends in another ``post``.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

import structlog
from opentelemetry import propagate, trace

from helios.mesh.errors import HeliosError
from helios.mesh.transfer.progress import TransferProgress
from helios.worker.early.asking import BytesLost
from helios.worker.early.growth import suits
from helios.worker.early.loads import EarlyLoads
from helios.worker.replica.adapter_state import AdapterFiles, AdapterStatus
from helios.worker.replica.settings import LoraAdapter, LoraSettings
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.supervisor import life_actions, life_events
from helios.worker.supervisor.adapter_book import AdapterBook
from helios.worker.supervisor.adapter_leases import AdapterLeases
from helios.worker.supervisor.last_words import last_lines
from helios.worker.supervisor.process_tree import kill_tree, watch_exit
from helios.worker.supervisor.read_ahead import read_ahead
from helios.worker.supervisor.records import (
    Failure,
    Load,
    Order,
    ProcessIdentity,
    ReplicaState,
    ReplicaView,
)
from helios.worker.supervisor.replica_machine import ReplicaMachine

log = structlog.get_logger()
tracer = trace.get_tracer("helios.worker")

_LEASE_RETRY_SECONDS: Final = 2.0
# How often a fetch is told of: smooth for people, little for a fleet that starts.
_FETCH_TOLD_SECONDS: Final = 1.0
# Above what the storage client itself gives a release; the lease of an agent that is away ends by itself.
_RELEASE_SECONDS: Final = 6.0


class Lent(Protocol):
    """A revision that is lent. ``keep`` True: leaving the block does not end the lease."""

    path: str
    lease_id: str
    keep: bool

    async def wait_lost(self) -> None:
        """Waits until the lease is lost and raises a HeliosError then."""


class Weights(Protocol):
    """Where weights come from: the storage agent's client."""

    def materialize(
        self,
        revision: str,
        *,
        holder: str,
        ttl_seconds: float,
        lease_id: str | None,
        keep: bool,
        on_progress: Callable[[TransferProgress], None] | None = None,
    ) -> AbstractAsyncContextManager[Lent]:
        """Lends a revision for the block, renewing in the background; raises HeliosError where that can't be.

        ``on_progress`` is called on the event loop, some times a second while bytes have to come.
        """
        ...

    async def evict(self, revision: str) -> int:
        """Drops a revision from the node and returns the bytes freed. Idempotent."""
        ...


class Forked(Protocol):
    """A front process that was forked."""

    @property
    def pid(self) -> int: ...
    @property
    def start_ticks(self) -> int: ...


class Launcher(Protocol):
    """What forks replicas."""

    async def fork(self, spec: ReplicaSpec, deadline: float) -> Forked:
        """Forks; ``deadline`` is monotonic. Raises HeliosError where there is no process, or none in time."""
        ...


class Link(Protocol):
    """The stream to an attached replica; never blocks, and does nothing once the stream ended."""

    def drain(self, timeout_seconds: float) -> None: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...
    def adapters(self, files: Sequence[AdapterFiles]) -> None: ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a runner acts on.

    ``spec`` makes the launcher's order from a view, the weights' path and the trace context. ``on_asleep`` takes what a
    replica that sleeps left behind, ``on_regrown`` one that is awake against all belief. Without ``early``, replicas
    are forked when all of their weights is here.
    """

    group: asyncio.TaskGroup
    launcher: Launcher
    weights: Weights
    lease_ttl_seconds: float
    holder: str
    device_ids: tuple[str, ...]
    spec: Callable[[ReplicaView, str, str], ReplicaSpec]
    on_change: Callable[[ReplicaView], None]
    on_freed: Callable[[ReplicaView], None]
    on_asleep: Callable[[str, int], None]
    on_regrown: Callable[[str], None]
    early: EarlyLoads | None = None


class ReplicaRunner:
    """One replica that is carried out.

    Invariants: events are handled in the order of ``post``, also those posted by an action; ``on_freed`` is called
    once, just before the ``on_change`` that shows the end; a lease that is not released by the machine outlives this
    process.
    """

    def __init__(self, life: ReplicaMachine, surroundings: Surroundings) -> None:
        self._life = life
        self._around = surroundings
        self._events: deque[life_events.Event] = deque()
        self._is_handling = False
        self._timer: asyncio.TimerHandle | None = None
        self._holding: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._following: asyncio.Task[None] | None = None
        self._is_released = False
        self._fetch_told_at = -_FETCH_TOLD_SECONDS
        self._revision_paths: dict[str, str] = {}
        lora = life.view.order.settings.lora
        self._adapters = AdapterBook(lora.adapters if lora is not None else (), life.view.adapters)
        self._shown_adapters = self._adapters.statuses
        self._adapter_leases = AdapterLeases(
            surroundings.group,
            self._borrow,
            on_lent=self._adapter_lent,
            on_refused=self._adapter_refused,
            on_returned=self._adapters.returned,
        )
        self._link: Link | None = None
        self._load = Load()
        self._measured_bytes = 0
        self._span: trace.Span | None = None
        self._ended = asyncio.Event()

    @property
    def view(self) -> ReplicaView:
        """The replica as others see it, with its load, its devices, its adapters and what was measured of it."""
        return replace(
            self._life.view,
            order=_with_adapters(self._life.view.order, self._adapters.wanted),
            load=self._load,
            device_ids=self._around.device_ids,
            measured_bytes=self._measured_bytes,
            adapters=self._adapters.statuses,
        )

    @property
    def revisions(self) -> frozenset[str]:
        """All that it needs on the node, what its engine still has of adapters that are unloaded included."""
        return self._adapters.revisions.union(self._life.view.order.revisions)

    @property
    def is_lent(self) -> bool:
        """Whether its weights were lent; before that a successor can't carry on with it."""
        return self._life.is_lent

    @property
    def is_awaited(self) -> bool:
        """Whether it was taken over, runs, and has not said hello yet."""
        return self._life.is_awaited

    async def wait_ended(self) -> None:
        """Returns when nothing of the replica is left, and its lease was given back or given up."""
        await self._ended.wait()
        if self._holding is not None:
            await asyncio.wait((self._holding,), timeout=_RELEASE_SECONDS)
        await self._adapter_leases.wait_returned(_RELEASE_SECONDS)

    def begin(self) -> None:
        """Starts the replica that was ordered."""
        order = self._life.view.order
        self._span = tracer.start_span(
            "start replica",
            context=propagate.extract({"traceparent": order.traceparent}),
            attributes={"helios.replica": order.replica_id, "helios.model": order.model, "helios.engine": order.engine},
        )
        self.post(life_events.Begin())

    def resume(self) -> None:
        """Takes over a replica of an earlier supervisor."""
        self._set_timer()
        for action in self._life.resume():
            self._execute(action)

    def attach(
        self, link: Link, event: life_events.Attached, load: Load, adapters: Sequence[AdapterStatus] = ()
    ) -> None:
        """Takes the replica's stream; an older one is not used any more."""
        self._link = link
        self._load = load
        self._adapters.tell(adapters)
        self.post(event)
        # The orders of an earlier stream may be lost.
        self._follow_adapters(is_told=bool(adapters or self._adapters.wanted))

    def detach(self, link: Link) -> None:
        """Forgets a stream that ended, unless a newer one took its place. The replica's state does not change."""
        if self._link is link:
            self._link = None

    def is_link(self, link: Link) -> bool:
        """Whether this stream is the replica's current one."""
        return self._link is link

    def take_load(self, load: Load) -> None:
        """Notes the load that the replica reported last; reporting it shows that the replica is alive."""
        self._load = load
        self.post(life_events.Heard())

    def set_adapters(self, adapters: Sequence[LoraAdapter]) -> None:
        """Takes which adapters the replica is to have."""
        if self._adapters.want(adapters):
            self._follow_adapters(is_told=True)

    def take_adapters(self, statuses: Sequence[AdapterStatus]) -> None:
        """Takes what the replica says of its adapters; revisions that it does not name any more are given back."""
        if self._adapters.tell(statuses):
            self._follow_adapters(is_told=False)
        self.post(life_events.Heard())

    def take_measure(self, measured_bytes: int) -> None:
        """Notes what memory of its own the replica was measured to have, and shows it where it changed."""
        if measured_bytes != self._measured_bytes:
            self._measured_bytes = measured_bytes
            self._around.on_change(self.view)

    def post(self, event: life_events.Event) -> None:
        """Gives an event to the machine and carries out what it decides."""
        self._events.append(event)
        if self._is_handling:
            return
        self._is_handling = True
        try:
            while self._events:
                # Not the loop's own time, which stands still while an event is handled and is a millisecond coarse:
                # phases are measured with it. Both are CLOCK_MONOTONIC.
                now = time.monotonic()
                for action in self._life.handle(self._events.popleft(), now):
                    self._execute(action)
                self._set_timer()
        finally:
            self._is_handling = False

    def _execute(self, action: life_actions.Action) -> None:
        match action:
            case life_actions.Fetch(lease_id):
                self._holding = self._spawn("weights", self._hold_weights(lease_id))
                self._follow_fetch()
                self._adapter_leases.follow(self._adapters.revisions)
            case life_actions.Fork():
                self._spawn("fork", self._fork(action))
            case life_actions.Watch(process):
                self._spawn("watch", self._watch(process))
            case life_actions.SendDrain() | life_actions.SendSleep() | life_actions.SendWake():
                if self._link is not None:
                    _say(self._link, action)
            case life_actions.Shrink() | life_actions.Regrow():
                self._book(action)
            case life_actions.KillTree(process):
                self._stop_reading()
                self._spawn("kill", self._kill(process))
            case life_actions.ReleaseWeights():
                self._is_released = True
                self._stop_reading()
                if self._holding is not None:
                    self._holding.cancel()
                self._end_early_load()
                self._adapter_leases.follow(frozenset())
            case life_actions.Free():
                self._around.on_freed(self.view)
                self._ended.set()
            case life_actions.Publish():
                self._trace()
                self._around.on_change(self.view)

    def _follow_adapters(self, *, is_told: bool) -> None:
        """Follows a change of what is wanted, there, or had of adapters; ``is_told``: the replica is to hear of it."""
        if self._is_released:
            return
        self._adapter_leases.follow(self._adapters.revisions)
        if self._link is not None and is_told:
            self._link.adapters(self._adapters.files)
        if self._adapters.statuses != self._shown_adapters:
            self._shown_adapters = self._adapters.statuses
            self._around.on_change(self.view)

    def _adapter_lent(self, revision: str, path: str) -> None:
        self._adapters.lent(revision, path)
        self._follow_adapters(is_told=True)

    def _adapter_refused(self, revision: str, failure: Failure) -> None:
        self._adapters.refused(revision, failure)
        self._follow_adapters(is_told=False)

    def _book(self, action: life_actions.Shrink | life_actions.Regrow) -> None:
        replica_id = self._life.view.replica_id
        if isinstance(action, life_actions.Shrink):
            self._around.on_asleep(replica_id, action.left_bytes)
        else:
            self._around.on_regrown(replica_id)

    def _spawn(self, what: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._around.group.create_task(work, name=f"{what} {self._life.view.replica_id}")

    async def _hold_weights(self, lease_id: str) -> None:
        """Borrows the weights for as long as the replica lives; ends by being cancelled.

        The lease is kept by default: when this process ends without having seen the replica's end, its successor
        resumes it.
        """
        order = self._life.view.order
        while True:
            try:
                async with contextlib.AsyncExitStack() as stack:
                    borrowing = self._borrow(order.revision, lease_id, on_progress=self._weights_come)
                    lent = await stack.enter_async_context(borrowing)
                    all_lent = [lent]
                    try:
                        if draft := order.settings.draft_revision:
                            other = await stack.enter_async_context(self._borrow(draft))
                            all_lent.append(other)
                            self._revision_paths[draft] = other.path
                        self._weights_lent(lent)
                        await lent.wait_lost()
                    finally:
                        for one in all_lent:
                            one.keep = not self._is_released
            except HeliosError as error:
                if not self._life.is_lent:
                    self.post(life_events.WeightsFailed(Failure(error.reason, error.message)))
                    return
                log.warning("lease of a running replica lost", replica=order.replica_id, reason=error.reason)
            # What is mapped stays readable; a new lease keeps the agent from giving the room away, so it is asked for
            # at once where an old one could not be resumed.
            if not lease_id:
                await asyncio.sleep(_LEASE_RETRY_SECONDS)
            lease_id = ""

    def _follow_fetch(self) -> None:
        """Has the replica be forked as soon as its start has something to do, where that can be before all is here."""
        early, order = self._around.early, self._life.view.order
        if early is not None and not self._life.is_lent and suits(order.engine, order.settings):
            following = early.follow(
                order.replica_id,
                order.revision,
                on_enough=lambda path: self.post(life_events.WeightsEnough(path)),
            )
            self._following = self._spawn("follow fetch", following)

    def _weights_lent(self, lent: Lent) -> None:
        early = self._around.early
        counts = early is None or self._following is None or early.lend(self._life.view.replica_id, lent.path)
        if self._following is not None:
            self._following.cancel()
            self._following = None
        if not counts:
            message = "the fetch of the weights began anew just after they were loaded; what is lent was not read"
            self.post(life_events.ReportedFailure(Failure(BytesLost.default_reason, message)))
        self.post(life_events.WeightsReady(lent.path, lent.lease_id))

    def _end_early_load(self) -> None:
        if self._following is not None:
            self._following.cancel()
        if self._around.early is not None:
            self._around.early.drop(self._life.view.replica_id)

    def _weights_come(self, coming: TransferProgress) -> None:
        """Tells of a fetch; not of each message of it, for everybody who watches replicas hears of it."""
        now = asyncio.get_running_loop().time()
        if now - self._fetch_told_at >= _FETCH_TOLD_SECONDS:
            self._fetch_told_at = now
            self.post(life_events.WeightsCome(coming))

    def _borrow(
        self, revision: str, lease_id: str = "", on_progress: Callable[[TransferProgress], None] | None = None
    ) -> AbstractAsyncContextManager[Lent]:
        """Borrows the model, by its lease where there is one, or what the replica has beside it: adapters, a draft
        model. Those a successor borrows anew, before the lease that this process leaves them ends.
        """
        return self._around.weights.materialize(
            revision,
            holder=f"{self._around.holder}/{self._life.view.replica_id}",
            ttl_seconds=self._around.lease_ttl_seconds,
            lease_id=lease_id or None,
            keep=True,
            on_progress=on_progress,
        )

    async def _fork(self, action: life_actions.Fork) -> None:
        spec = self._around.spec(self.view, action.path, self._traceparent())
        paths = self._revision_paths | self._adapters.paths
        spec = replace(spec, asked_at=action.asked_at, revision_paths=paths)
        if action.is_early and self._around.early is not None:
            spec = replace(spec, early_door=str(self._around.early.door))
        else:
            reading = read_ahead(spec.engine, spec.model_path, spec.revision, spec.packed_weights_directory)
            self._reading = self._spawn("read ahead", reading)
        try:
            forked = await self._around.launcher.fork(spec, action.deadline)
        except (HeliosError, TimeoutError) as error:
            reason = error.reason if isinstance(error, HeliosError) else "FORK_TIMEOUT"
            self.post(life_events.ForkFailed(Failure(reason, str(error) or "the launcher did not answer in time")))
        else:
            self.post(life_events.Forked(ProcessIdentity(forked.pid, forked.start_ticks)))

    def _stop_reading(self) -> None:
        """Nobody will load what is being read."""
        if self._reading is not None:
            self._reading.cancel()

    async def _watch(self, process: ProcessIdentity) -> None:
        async with watch_exit(process) as gone:
            await gone.wait()
        self.post(life_events.ProcessExited())

    async def _kill(self, process: ProcessIdentity) -> None:
        await kill_tree(process)
        log_path = self._around.spec(self._life.view, "", "").log_path
        lines = await asyncio.to_thread(last_lines, log_path) if self._life.view.failure is not None else ()
        self.post(life_events.TreeGone(lines))

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        deadline = self._life.deadline
        if deadline is not None:
            self._timer = asyncio.get_running_loop().call_at(deadline, self.post, life_events.Tick())

    def _traceparent(self) -> str:
        if self._span is None:
            return ""
        carrier: dict[str, str] = {}
        propagate.inject(carrier, context=trace.set_span_in_context(self._span))
        return carrier.get("traceparent", "")

    def _trace(self) -> None:
        view = self._life.view
        if self._span is None or not (view.state is ReplicaState.READY or view.state.is_ended):
            return
        if view.failure is not None:
            self._span.set_status(trace.StatusCode.ERROR, view.failure.message)
        for phase in view.phases:
            self._span.set_attribute(f"helios.phase.{phase.phase}_seconds", phase.seconds)
        self._span.end()
        self._span = None


def _with_adapters(order: Order, adapters: tuple[LoraAdapter, ...]) -> Order:
    """Returns the order as if it had named these adapters, so that a successor finds what is wanted now."""
    lora = order.settings.lora
    if adapters == (lora.adapters if lora is not None else ()):
        return order
    lora = replace(lora or LoraSettings(), adapters=adapters)
    return replace(order, settings=replace(order.settings, lora=lora))


def _say(link: Link, action: life_actions.SendDrain | life_actions.SendSleep | life_actions.SendWake) -> None:
    match action:
        case life_actions.SendDrain(timeout_seconds):
            link.drain(timeout_seconds)
        case life_actions.SendSleep():
            link.sleep()
        case life_actions.SendWake():
            link.wake()
