"""Carries out what the core decides: answers holds, sends commands, publishes endpoints, keeps time.

One event loop owns the core, so nothing here needs a lock. Every event goes through `apply(core.something(...))`.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final, Protocol
from uuid import uuid4

import structlog
from opentelemetry import propagate, trace

from helios.mesh.errors import Draining, HeliosError, Unavailable
from helios.mesh.tasks import keep_running
from helios.mesh.xds.state import Endpoint, ExpressRoute
from helios.proxy import actions, metrics
from helios.proxy.admission.keyring import ANYBODY, Caller
from helios.proxy.catalogue import ModelEntry
from helios.proxy.chronicle import Chronicle, ChronicleKeeper, save_changes
from helios.proxy.core import Core
from helios.proxy.events.log import EventLog
from helios.proxy.events.record import event_of
from helios.proxy.explain.journal import Journal, JournalLimits
from helios.proxy.explain.record import Finished
from helios.proxy.fleet.commands import Command
from helios.proxy.fleet.cordons import CordonMemory, Cordons
from helios.proxy.fleet.state import ReplicaState
from helios.proxy.holds import Hold
from helios.proxy.routing.pick import Pick
from helios.proxy.swap import SwapFailures
from helios.proxy.usage.meter import Meter

log = structlog.get_logger()
tracer = trace.get_tracer("helios.proxy")

# Holds end within this of their deadline; an idle look costs a microsecond.
_HOLD_TICK_SECONDS: Final = 0.1
# Liveness, back-offs and idle times are counted in seconds.
_TICK_SECONDS: Final = 1.0
# All models are looked at once in a tick: in slices of so long, which a pick may meet, and so many models between two
# looks at the clock.
_SLICE_SECONDS: Final = 0.001
_SLICE_MODELS: Final = 8
# Between two slices; 10,000 models that take 20 µs each are through in less than a second.
_PAUSE_SECONDS: Final = 0.003
# An Envoy that takes longer is cut off or broken; the wait begins anew, so this only paces the log.
_ACK_SECONDS: Final = 30.0
# Commands that a worker has not taken from its stream; more means that its stream is stuck.
_OUTBOX_COUNT: Final = 1024


class EndpointPublisher(Protocol):
    """Tells every Envoy which endpoints there are. `helios.mesh.xds.server.XdsServer` is one.

    Promises: versions grow; publishing the same endpoints again is the same version; nothing goes out before `open`.
    """

    def publish(self, endpoints: Iterable[str]) -> int:
        """Sets all endpoints; returns their version."""
        ...

    def open(self) -> None:
        """Lets versions out. Idempotent."""
        ...

    async def wait_acked(self, version: int, deadline: float) -> None:
        """Returns when every Envoy routes by the version. Cancel-safe. Raises Unavailable at the deadline."""
        ...

    def publish_express(self, routes: Iterable[ExpressRoute]) -> int:
        """Sets what takes the express lane; as `publish`."""
        ...

    async def wait_express_acked(self, version: int, deadline: float) -> None:
        """As `wait_acked`, of what `publish_express` returned."""
        ...


class Memory(CordonMemory, ChronicleKeeper, Protocol):
    """Remembers, over restarts of this process, which workers there are, and what could not be compiled."""

    async def save(self, worker_ids: frozenset[str]) -> None:
        """Replaces what is remembered of workers."""
        ...

    async def save_swap_failures(self, failures: Sequence[SwapFailures]) -> None:
        """Replaces what is remembered of failed swaps."""
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it came in.

    Attributes:
        request_id: its `x-request-id`.
        name: the model's name or alias that it asks for.
        at: when it came here, in monotonic seconds.
        began: when Envoy began with it, as Envoy wrote it; empty: it did not say.
        began_wall: the same, in seconds since the epoch.
        traceparent: W3C trace context of the client, or Envoy's; empty: none.
        caller: whose request it is.
        is_continued: its answer has begun at another replica.
    """

    request_id: str
    name: str
    at: float
    began: str = ""
    began_wall: float = 0.0
    traceparent: str = ""
    caller: Caller = ANYBODY
    is_continued: bool = False


class Peers(Protocol):
    """The sessions with other proxies, where there are any."""

    def look(self) -> None:
        """Something happened that others may have to be told. Never blocks."""
        ...

    async def wait_told(self, deadline: float) -> bool:
        """Waits until the leader has said something; False at the deadline (monotonic seconds). Cancel-safe."""
        ...


class Outbox:
    """What a worker's session still has to send; closed where a newer session took the worker over."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Command | None] = asyncio.Queue(_OUTBOX_COUNT)
        self.is_closed = False

    def put(self, command: Command) -> None:
        """Adds a command. One that does not fit comes with the worker's next hello."""
        try:
            self.queue.put_nowait(command)
        except asyncio.QueueFull:
            log.warning("worker takes no commands", worker=command.worker_id)

    def close(self) -> None:
        """Ends the session that sends from here."""
        self.is_closed = True
        while not self.queue.empty():
            self.queue.get_nowait()
        self.queue.put_nowait(None)


class Runtime:
    """The core and its outside. `run` must be running for anything to move with time."""

    def __init__(
        self,
        core: Core,
        *,
        publisher: EndpointPublisher,
        memory: Memory,
        journal_limits: JournalLimits | None = None,
    ) -> None:
        self.core = core
        self.journal = Journal(journal_limits or JournalLimits(), wall_offset=_wall_offset())
        self.journal.on_phase = _measure_phase
        self.meter = Meter()
        self.events = EventLog(uuid4().hex[:8])
        # Set, and replaced by another one, when an event was added.
        self.events_changed = asyncio.Event()
        self.journal.on_split = _measure_split
        self.cordons = Cordons(core, self.apply, memory)
        self._publisher = publisher
        self._memory = memory
        self._chronicle = Chronicle(
            core.lifecycle.promises.estimates,
            core.lifecycle.wants.decisions,
            memory,
            wall_offset=lambda: self.journal.wall_offset,
        )
        self._waiting: dict[int, asyncio.Future[Pick]] = {}
        self._outboxes: dict[str, Outbox] = {}
        self._spans: dict[str, trace.Span] = {}
        self._published_version = (-1, -1)
        # Versions of the lane, as the publisher counts them and as the core does.
        self._express = (0, -1)
        self._express_changed = asyncio.Event()
        self._published: tuple[int, frozenset[str]] | None = None
        self._endpoints_changed = asyncio.Event()
        self._workers_changed = asyncio.Event()
        self._swap_failures_changed = asyncio.Event()
        self._is_stopping = False
        self.peers: Peers | None = None
        """None: this proxy is alone."""

    async def run(self) -> None:
        """Runs until cancelled."""
        if self.core.is_resynchronised:
            self._publisher.open()
        self.apply([])
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tick(), name="tick")
            group.create_task(self._wait_acks(), name="wait for acks")
            group.create_task(self._wait_express_acks(), name="wait for acks of the express lane")
            # A disk that is full costs what is remembered, not the proxy.
            workers = partial(save_changes, self._workers_changed, self._save_workers)
            group.create_task(keep_running("remember workers", workers), name="remember workers")
            swaps = partial(save_changes, self._swap_failures_changed, self._save_swap_failures)
            group.create_task(keep_running("remember failed swaps", swaps), name="remember failed swaps")
            chronicle = keep_running("remember starts and decisions", self._chronicle.run)
            group.create_task(chronicle, name="remember starts and decisions")

    def stop(self) -> None:
        """Ends every session, and every wait with Draining: another proxy, or this one restarted, goes on with it."""
        self._is_stopping = True
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(_stopping())
        for outbox in self._outboxes.values():
            outbox.close()
        self.events_changed.set()

    @property
    def is_stopping(self) -> bool:
        """Whether this process ends."""
        return self._is_stopping

    # Requests.
    async def wait_pick(self, entry: ModelEntry, arrival: Arrival, *, size_bytes: int, deadline: float) -> Pick:
        """Holds a request until a replica can take it.

        Cancelling ends the hold. Raises Draining where this process stops, another HeliosError where the request is
        not to be served.
        """
        if self._is_stopping:
            raise _stopping()
        parent = propagate.extract({"traceparent": arrival.traceparent})
        attributes = {"gen_ai.request.model": entry.name, "helios.request.id": arrival.request_id}
        with tracer.start_as_current_span("hold", context=parent, attributes=attributes) as span:
            return await self._wait_pick(entry, arrival, span, size_bytes=size_bytes, deadline=deadline)

    async def _wait_pick(
        self, entry: ModelEntry, arrival: Arrival, span: trace.Span, *, size_bytes: int, deadline: float
    ) -> Pick:
        since = time.monotonic()
        adapter = arrival.name if arrival.name in entry.adapters else ""
        request_id, why = arrival.request_id, self._why_held(entry.name, adapter, arrival.caller.priority)
        hold, todo = self.core.hold(
            entry,
            request_id,
            size_bytes=size_bytes,
            deadline=deadline,
            now=since,
            name=arrival.name,
            requested_at=arrival.began_wall,
            traceparent=_traceparent(span),
            adapter=adapter,
            caller=arrival.caller,
        )
        self.journal.held(
            request_id,
            name=arrival.name,
            began=arrival.began,
            model=entry.name,
            revision=entry.revision,
            why=why,
            arrived_at=arrival.at,
            now=since,
            is_continued=arrival.is_continued,
        )
        future: asyncio.Future[Pick] = asyncio.get_running_loop().create_future()
        self._waiting[hold.hold_id] = future
        self.apply(todo)
        outcome = "left"
        try:
            chosen = await future
            outcome = "released"
            return chosen
        except HeliosError as error:
            outcome = error.reason.lower()
            raise
        finally:
            del self._waiting[hold.hold_id]
            self.core.cancel_hold(hold)
            if outcome in ("left", "draining"):
                self.journal.left(entry.name, request_id, time.monotonic())
            span.set_attribute("helios.hold.outcome", outcome)
            metrics.HOLD_SECONDS.labels(outcome).observe(time.monotonic() - since)
            self._measure_holds()

    def hour(self, now: float) -> int:
        """Returns which hour since 1970 it is, UTC."""
        return int((now + self.journal.wall_offset) // 3600)

    # Workers.
    def connect_worker(self, worker_id: str) -> Outbox:
        """Begins a worker's session; an older session of the same worker ends."""
        older = self._outboxes.get(worker_id)
        if older is not None:
            older.close()
        outbox = self._outboxes[worker_id] = Outbox()
        return outbox

    def disconnect_worker(self, worker_id: str, outbox: Outbox) -> bool:
        """Ends a worker's session; nothing happens, and False is returned, where a newer one took over."""
        if self._outboxes.get(worker_id) is not outbox:
            return False
        del self._outboxes[worker_id]
        self.apply(self.core.worker_lost(worker_id, time.monotonic()))
        log.warning("worker disconnected", worker=worker_id)
        return True

    # Actions.
    def apply(self, todo: Iterable[actions.Action]) -> None:
        """Carries out actions, in order. Never blocks."""
        for action in todo:
            match action:
                case actions.Release(hold, pick):
                    self._answer(hold, pick)
                case actions.Fail(hold, error):
                    self._answer(hold, error)
                case actions.HoldMoved(hold, left, revision):
                    self.journal.moved(hold.request_id, left, hold.model, revision)
                case actions.Send(command):
                    outbox = self._outboxes.get(command.worker_id)
                    if outbox is not None:
                        outbox.put(command)
                case actions.WorkersChanged():
                    self._workers_changed.set()
                case actions.SwapFailuresChanged():
                    self._swap_failures_changed.set()
                case actions.Disconnect(worker_id):
                    outbox = self._outboxes.get(worker_id)
                    if outbox is not None:
                        outbox.close()
                case actions.FleetResynchronised(is_complete):
                    log.info(
                        "fleet resynchronised", is_complete=is_complete, workers=len(list(self.core.fleet.workers()))
                    )
                    self._publisher.open()
                case _:
                    self._note_event(action)
                    self._report(action)
        self._tell_outside()

    def _note_event(self, action: actions.Action) -> None:
        event = event_of(action)
        if event is not None and self.events.add(event, time.monotonic()):
            changed, self.events_changed = self.events_changed, asyncio.Event()
            changed.set()

    def _why_held(self, model: str, adapter: str, band: int) -> str:
        """Says, for people, why no replica of a model takes a request now."""
        ahead_count = self.core.holds.count(model)
        excluded = self.core.traffic.exclusions(model, band)
        if not self.core.is_resynchronised:
            why = "this proxy has just started and waits for its workers"
        elif excluded:
            why = "no replica can be picked: " + ", ".join(f"{key} is {reason}" for key, reason in excluded[:4])
        elif adapter and self.core.traffic.has_candidates(model):
            why = f"no replica has the adapter {adapter!r} yet"
        elif self.core.traffic.has_candidates(model):
            why = "in every replica as many requests wait as may"
        else:
            why = "there is no replica"
        return f"{why}; {ahead_count} request(s) waited already" if ahead_count else why

    def _answer(self, hold: Hold, result: Pick | HeliosError) -> None:
        future = self._waiting.get(hold.hold_id)
        if future is None or future.done():
            return
        if isinstance(result, HeliosError):
            future.set_exception(result)
        else:
            excluded = self.core.traffic.exclusions(hold.model, hold.caller.priority)
            self.journal.released(hold.request_id, result, excluded, time.monotonic())
            future.set_result(result)

    def _report(self, action: actions.Action) -> None:
        match action:
            case actions.ActivationDelayed(model, _, message):
                self.journal.start_delayed(model, message, time.monotonic())
            case actions.ActivationBegun(model, replica_id, worker_id, held_count, placed, traceparent):
                self.journal.start_begun(model, replica_id, worker_id, placed, time.monotonic())
                log.info("activation begun", model=model, replica=replica_id, worker=worker_id, held=held_count)
                attributes = {"helios.model": model, "helios.replica": replica_id, "helios.worker": worker_id}
                parent = propagate.extract({"traceparent": traceparent})
                self._spans[model] = tracer.start_span("activate", context=parent, attributes=attributes)
            case actions.ActivationDone(model, replica_id, seconds, phases):
                log.info("activation done", model=model, replica=replica_id, seconds=round(seconds, 3), **dict(phases))
                self.meter.cold_start(model, self.hour(time.monotonic()))
                metrics.ACTIVATIONS.labels("ready").inc()
                metrics.ACTIVATION_SECONDS.observe(seconds)
                self._end_span(model, dict(phases))
            case actions.ActivationFailed(model, reason, message, held_count):
                self.core.leadership.followers.failed(action)
                self.journal.start_failed(model, f"{reason}: {message}", time.monotonic())
                log.warning("activation failed", model=model, reason=reason, error=message, held=held_count)
                metrics.ACTIVATIONS.labels(reason.lower()).inc()
                self._end_span(model, {}, error=f"{reason}: {message}")
            case actions.ModelScaled(decision):
                self._chronicle.decided(decision)
            case actions.StartScored():
                self._chronicle.scored(action)
            case _:
                _report_swap(action)

    def _end_span(self, model: str, phases: dict[str, float], *, error: str = "") -> None:
        span = self._spans.pop(model, None)
        if span is None:
            return
        span.set_attributes({f"helios.phase.{phase}_seconds": seconds for phase, seconds in phases.items()})
        if error:
            span.set_status(trace.StatusCode.ERROR, error)
        span.end()

    def _tell_outside(self) -> None:
        self._publish()
        if self.peers is not None:
            self.peers.look()

    # Endpoints.
    def _publish(self) -> None:
        fleet, lane = self.core.fleet, self.core.express.lane
        if not self.core.is_resynchronised:
            return
        if lane.version != self._express[1]:
            routes = [
                ExpressRoute(
                    name, None if place.is_shared else Endpoint.parse(place.address), place.revision, place.model
                )
                for place in lane.places
                for name in place.names
            ]
            # Even where none was wanted yet: Envoys may have one of a run that nobody remembers.
            self._express = (self._publisher.publish_express(routes), lane.version)
            if lane.version:
                self._express_changed.set()
        if (fleet.endpoints_version, lane.changes) == self._published_version:
            return
        self._published_version = (fleet.endpoints_version, lane.changes)
        # An Envoy that has not left the lane yet still sends there.
        endpoints = fleet.endpoints() | lane.addresses()
        self._published = (self._publisher.publish(endpoints), endpoints)
        metrics.ENDPOINTS.set(len(endpoints))
        self._endpoints_changed.set()

    async def _wait_acks(self) -> None:
        while True:
            await self._endpoints_changed.wait()
            self._endpoints_changed.clear()
            assert self._published is not None
            version, endpoints = self._published
            try:
                await self._publisher.wait_acked(version, time.monotonic() + _ACK_SECONDS)
            except Unavailable as error:
                log.warning("endpoints not acknowledged", error=error.message, metadata=error.metadata)
                self._endpoints_changed.set()
                continue
            now = time.monotonic()
            todo = self.core.endpoints_acknowledged(endpoints, now)
            self.journal.published(endpoints, now)
            self.apply(todo)

    async def _wait_express_acks(self) -> None:
        while True:
            await self._express_changed.wait()
            self._express_changed.clear()
            version, lane_version = self._express
            try:
                await self._publisher.wait_express_acked(version, time.monotonic() + _ACK_SECONDS)
            except Unavailable as error:
                log.warning("express lane not acknowledged", error=error.message, metadata=error.metadata)
                self._express_changed.set()
                continue
            self.apply(self.core.express_acknowledged(lane_version, time.monotonic()))

    # Time.
    async def _tick(self) -> None:
        next_tick = 0.0
        while True:
            now = time.monotonic()
            self.apply(self.core.expire_holds(now))
            if now >= next_tick:
                next_tick = now + _TICK_SECONDS
                self.journal.wall_offset = _wall_offset()
                self.core.lifecycle.wants.set_clock(self.journal.wall_offset, now)
                self.apply(self.core.begin_tick(now))
                await self._round()
                self._measure()
            # A hold that comes meanwhile has a deadline beyond the next tick.
            has_holds = self.core.holds.statistics().count > 0
            await asyncio.sleep(_HOLD_TICK_SECONDS if has_holds else max(0.0, next_tick - time.monotonic()))

    async def _round(self) -> None:
        """Looks at every model, in slices between which requests are picked replicas."""
        is_left = True
        while is_left:
            began = now = time.monotonic()
            while is_left and now - began < _SLICE_SECONDS:
                todo, is_left = self.core.go_on(now, _SLICE_MODELS)
                self.apply(todo)
                now = time.monotonic()
            await asyncio.sleep(_PAUSE_SECONDS if is_left else 0)

    async def _save_workers(self) -> None:
        await self._memory.save(frozenset(worker.hello.worker_id for worker in self.core.fleet.workers()))

    async def _save_swap_failures(self) -> None:
        await self._memory.save_swap_failures(self.core.lifecycle.swaps.failures)

    def _measure_holds(self) -> None:
        statistics = self.core.holds.statistics()
        metrics.HOLDS.set(statistics.count)
        metrics.HOLD_BYTES.set(statistics.size_bytes)

    def _measure(self) -> None:
        self._measure_holds()
        fleet = self.core.fleet
        metrics.WORKERS.set(sum(1 for worker in fleet.workers() if worker.is_reachable))
        metrics.RESERVATIONS.set(self.core.traffic.ledger.statistics().reserved_count)
        corrected = self.core.traffic.corrections.take_tally()
        metrics.PREFIX_LOSSES.inc(corrected.losses)
        metrics.PREFIX_LOST_BLOCKS.inc(corrected.blocks)
        metrics.PREFIX_EMPTIED.inc(corrected.emptied)
        states = (state.name.lower() for state in ReplicaState if not state.is_gone)
        counts: dict[str, int] = dict.fromkeys(states, 0)
        for replica in fleet.replicas():
            counts[replica.state.name.lower()] += 1
        for state, count in counts.items():
            metrics.REPLICAS.labels(state).set(count)


def _wall_offset() -> float:
    """Wall clock less monotonic clock."""
    return datetime.now(UTC).timestamp() - time.monotonic()


def _traceparent(span: trace.Span) -> str:
    carrier: dict[str, str] = {}
    propagate.inject(carrier, context=trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def _measure_phase(model: str, phase: str, seconds: float) -> None:
    metrics.COLD_START_PHASE.labels(model, phase).observe(seconds)


def _measure_split(pick: Pick, finished: Finished) -> None:
    # A revision is a label only while it is rolled out or served beside one: few, and people name them so.
    labels = (pick.model.partition("@")[0], pick.revision.removeprefix("sha256:")[:12])
    metrics.ROLLOUT_FINISHED.labels(*labels, str(finished.status_code)).inc()
    if finished.time_to_first_token_seconds is not None:
        metrics.ROLLOUT_FIRST_TOKEN.labels(*labels).observe(finished.time_to_first_token_seconds)


def _report_swap(action: actions.Action) -> None:
    match action:
        case actions.SwapBegun(model, replica_id, worker_id, placed):
            log.info("swap begun", model=model, replica=replica_id, worker=worker_id, placement=placed)
        case actions.SwapReady(model, replica_id, seconds, phases):
            log.info(
                "compiled replica ready", model=model, replica=replica_id, seconds=round(seconds, 3), **dict(phases)
            )
        case actions.SwapDone(model, replica_id):
            log.info("swap done", model=model, replaced=replica_id)
            metrics.SWAPS.labels("done").inc()
        case actions.SwapStopped(model, replica_id, why):
            log.info("swap stopped", model=model, replica=replica_id, why=why)
            metrics.SWAPS.labels("stopped").inc()
        case actions.SwapFailed(model, reason, message, pause_seconds):
            goes_on = (
                f"tries again in {pause_seconds:.0f} s" if pause_seconds else "stays eager until the model changes"
            )
            log.warning("swap failed", model=model, reason=reason, error=message, then=goes_on)
            metrics.SWAPS.labels(reason.lower()).inc()
        case _:
            pass


def _stopping() -> Draining:
    return Draining("the gateway's control process restarts; try again", retry_after_seconds=1)
