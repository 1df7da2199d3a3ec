"""The supervisor: commands in, replicas started and ended, every change told to whoever listens.

It owns the ledger, the log of commands and the runners; all of them live in one event loop and change only between
awaits, so there are no locks. It knows neither gRPC nor an engine.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Protocol

import structlog

from helios.mesh.errors import AlreadyExists, Draining, HeliosError, NotFound, PreconditionFailed
from helios.worker.early.loads import EarlyLoads
from helios.worker.replica.adapter_state import AdapterStatus
from helios.worker.replica.spec import ReplicaSpec
from helios.worker.supervisor import commands, life_events, metrics
from helios.worker.supervisor.commands import Ack, Command, CommandLog
from helios.worker.supervisor.fleet import FleetFeed
from helios.worker.supervisor.host_ledger import HostLedger
from helios.worker.supervisor.ledger import Booking, Ledger
from helios.worker.supervisor.orders import Rules, check_sleep, order_of
from helios.worker.supervisor.process_tree import kill_tree, reap
from helios.worker.supervisor.records import (
    DeviceMeasure,
    Failure,
    LoadDelta,
    ProcessIdentity,
    ReplicaState,
    ReplicaView,
    WorkerView,
)
from helios.worker.supervisor.replica_list import ListedReplica, ReplicaList
from helios.worker.supervisor.replica_machine import ReplicaMachine
from helios.worker.supervisor.replica_runner import Launcher, Link, ReplicaRunner, Surroundings, Weights
from helios.worker.supervisor.staging import Staging

log = structlog.get_logger()

_REAP_SECONDS: Final = 2.0
# Replicas that ended: a hello of one, or a repeated start, must not bring it back, and its orphans are still waited
# for.
_REMEMBERED_ENDS: Final = 1024


class SpecMaker(Protocol):
    """Makes the launcher's order of a replica."""

    def __call__(self, view: ReplicaView, booking: Booking, *, model_path: str, traceparent: str) -> ReplicaSpec: ...


class Supervisor:
    """All replicas of a node.

    ``group`` runs its tasks and belongs to the caller: cancelling it leaves replicas and leases to a successor, which
    is why ``end_all`` comes first where replicas are to end. Call ``recover`` once before anything else.

    ``on_ended`` is called with the view of each replica that ended, once. With ``early`` set, replicas may be forked
    before all of their weights is here.

    Invariants: a replica in ``view`` is booked in the ledger and the other way round; an id that ended never comes
    back.
    """

    def __init__(
        self,
        rules: Rules,
        *,
        group: asyncio.TaskGroup,
        ledger: Ledger,
        launcher: Launcher,
        weights: Weights,
        replica_list: ReplicaList,
        make_spec: SpecMaker,
        host_memory_bytes: int = 0,
    ) -> None:
        self._rules = rules
        self.early: EarlyLoads | None = None
        self.on_ended: Callable[[ReplicaView], None] = lambda _: None
        self.on_changed: Callable[[], None] = lambda: None
        self._group = group
        self._ledger = ledger
        self._launcher = launcher
        self._weights = weights
        self._list = replica_list
        self._make_spec = make_spec
        self._log = CommandLog()
        self._runners: dict[str, ReplicaRunner] = {}
        self._states: dict[str, ReplicaState] = {}
        self._ended: OrderedDict[str, ProcessIdentity | None] = OrderedDict()
        self._list_changed = asyncio.Event()
        self._all_returned = asyncio.Event()
        self._is_cordoned = False
        self.feed = FleetFeed(self.view)
        self._host = HostLedger(host_memory_bytes)
        self._staging = Staging(
            group=group,
            weights=weights,
            ledger=self._host,
            holder=rules.worker_id,
            lease_ttl_seconds=rules.lease_ttl_seconds,
            publish=self.feed.publish_staged,
            packed_weights_directory=Path(packed) if (packed := rules.packed_weights_directory) else None,
        )

    def recover(self) -> int:
        """Takes over what a predecessor left, starts the housekeeping; returns how many replicas are awaited."""
        listed = self._list.read()
        for replica in listed:
            self._expect(replica)
        self._note_returned()
        self._group.create_task(self._keep_list(), name="keep list of replicas")
        self._group.create_task(self._reap_orphans(), name="reap orphans")
        self._measure_ledger()
        return len(self._runners)

    async def wait_returned(self, timeout_seconds: float) -> bool:
        """Waits until every replica that was taken over said hello or is gone; False where that took too long."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._all_returned.wait()
        except TimeoutError:
            return False
        return True

    def replica_ids(self) -> frozenset[str]:
        """Returns the replicas that are not at their end."""
        return frozenset(self._runners)

    def view(self) -> WorkerView:
        """Returns the worker as it stands, for a hello."""
        return WorkerView(
            worker_id=self._rules.worker_id,
            incarnation=self._rules.incarnation,
            node=self._rules.node,
            zone=self._rules.zone,
            version=self._rules.version,
            devices=self._ledger.use(),
            engines=self._rules.engines,
            slot_count=self._ledger.slot_count,
            replicas=tuple(runner.view for runner in self._runners.values()),
            host=self._staging.use(),
            staged=tuple(self._staging.views.values()),
        )

    # Commands.

    def execute(self, command_id: str, command: Command) -> Ack:
        """Accepts or refuses a command at once; what it leads to is published.

        A repeated id is answered from memory.
        """
        is_new = command_id not in self._log
        ack = self._log.run(command_id, lambda: self._carry_out(command))
        if is_new:
            kind = type(command).__name__.lower()
            metrics.COMMANDS.labels(kind, ack.refused_reason or "accepted").inc()
            report = log.info if ack.is_accepted else log.warning
            report(
                "command taken" if ack.is_accepted else "command refused", command=command, reason=ack.refused_reason
            )
        return ack

    def _carry_out(self, command: Command) -> None:
        match command:
            case commands.Start():
                self._start(command)
            case commands.Drain(replica_id, timeout_seconds):
                seconds = self._rules.drain_seconds if timeout_seconds is None else timeout_seconds
                self._runner(replica_id).post(life_events.DrainRequested(seconds))
            case commands.Stop(replica_id):
                self._runner(replica_id).post(life_events.StopRequested())
            case commands.Evict(revision):
                self._evict(revision)
            case commands.Sleep(replica_id):
                self._sleep(self._runner(replica_id))
            case commands.Wake(replica_id):
                self._wake(self._runner(replica_id))
            case commands.SetAdapters(replica_id, adapters):
                self._runner(replica_id).set_adapters(adapters)
            case commands.Stage():
                self._check_open()
                self._staging.stage(command)
            case commands.Unstage(revision):
                self._staging.unstage(revision)

    def _sleep(self, runner: ReplicaRunner) -> None:
        view = runner.view
        if view.state is ReplicaState.ASLEEP:
            runner.post(life_events.SleepRequested(0))
            return
        check_sleep(view, [self._ledger.device(name) for name in view.device_ids], self._rules)
        left_bytes = self._rules.sleep_left_bytes * len(view.device_ids)
        runner.post(life_events.SleepRequested(left_bytes))

    def _wake(self, runner: ReplicaRunner) -> None:
        view = runner.view
        if view.state in (ReplicaState.READY, ReplicaState.WAKING):
            return
        if view.state is not ReplicaState.ASLEEP:
            message = f"replica {view.replica_id} is {view.state.value.lower()}, not asleep"
            raise PreconditionFailed(message, reason="REPLICA_NOT_ASLEEP")
        # While it still falls asleep it holds everything, and this books nothing.
        self._ledger.wake(view.replica_id)
        self._measure_ledger()
        runner.post(life_events.WakeRequested())

    def _check_open(self) -> None:
        if self._is_cordoned:
            raise Draining("the worker is stopping", reason="WORKER_DRAINING")

    def _start(self, start: commands.Start) -> None:
        self._check_open()
        order = order_of(start, self._rules, datetime.now(UTC))
        existing = self._runners.get(order.replica_id)
        if existing is not None:
            if (existing.view.order.model, existing.view.order.revision) == (order.model, order.revision):
                # Another proxy repeats it under an id of its own, after a fail-over.
                return
            raise AlreadyExists(f"replica {order.replica_id} serves another revision")
        if order.replica_id in self._ended:
            raise PreconditionFailed(f"replica {order.replica_id} has ended; use a new id", reason="REPLICA_ENDED")
        booking = self._ledger.book(
            order.replica_id,
            order.memory_bytes,
            items=order.memory_items,
            device_ids=order.device_ids,
            device_count=order.device_count,
        )
        try:
            yielding_bytes = self._staging.yielding_bytes
            self._host.book_replica(order.replica_id, order.host_memory_bytes, yielding_bytes=yielding_bytes)
        except HeliosError:
            self._ledger.release(order.replica_id)
            raise
        self._add(ReplicaMachine(order, self._rules.limits), booking).begin()

    def _evict(self, revision: str) -> None:
        users = [name for name, runner in self._runners.items() if revision in runner.revisions]
        if users:
            raise PreconditionFailed(f"replica {users[0]} uses revision {revision}", reason="REVISION_LEASED")
        self._staging.unstage(revision)
        self._group.create_task(self._evict_bytes(revision), name="evict revision")

    async def _evict_bytes(self, revision: str) -> None:
        # Staged weights are leased, like a replica's.
        await self._staging.wait_unstaged(revision)
        try:
            freed_bytes = await self._weights.evict(revision)
        except HeliosError as error:
            log.warning("revision not evicted", revision=revision, reason=error.reason, error=error.message)
        else:
            log.info("revision evicted", revision=revision, freed_bytes=freed_bytes)

    def _runner(self, replica_id: str) -> ReplicaRunner:
        runner = self._runners.get(replica_id)
        if runner is None:
            raise NotFound(f"there is no replica {replica_id!r} on this worker", reason="REPLICA_NOT_FOUND")
        return runner

    # Replicas that attach.

    def attach(self, said: ReplicaView, link: Link) -> bool:
        """Takes the hello of a replica whose process was checked; False where it was told to stop.

        A replica that is not known is adopted: its supervisor's list was lost. One that ended, that is not what it
        says, or that has no room here is killed with its tree, since nobody accounts for its memory.
        """
        assert said.process is not None
        runner = self._runners.get(said.replica_id)
        if runner is None and not self._is_refused(said):
            runner = self._adopt(said)
        if runner is None or runner.view.process not in (None, said.process) or said.state.is_ended:
            log.warning("replica refused", replica=said.replica_id, pid=said.process.pid, state=said.state.value)
            self._group.create_task(kill_tree(said.process), name=f"kill refused {said.replica_id}")
            return False
        attached = life_events.Attached(
            process=said.process,
            state=said.state,
            address=said.address,
            max_context_tokens=said.max_context_tokens,
            phases=said.phases,
            can_sleep=said.can_sleep,
            left_bytes=said.sleeping_bytes or 0,
        )
        runner.attach(link, attached, said.load, said.adapters)
        log.info("replica attached", replica=said.replica_id, state=said.state.value, pid=said.process.pid)
        self._note_returned()
        return True

    def report(self, replica_id: str, link: Link, event: life_events.Event) -> None:
        """Takes what an attached replica says of its start; what an older stream says is late and ignored."""
        runner = self._runners.get(replica_id)
        if runner is not None and runner.is_link(link):
            runner.post(event)

    def take_load(self, replica_id: str, link: Link, delta: LoadDelta) -> None:
        """Takes a replica's load and hands it on."""
        runner = self._runners.get(replica_id)
        if runner is not None and runner.is_link(link) and delta.replica_id == replica_id:
            is_news = delta.load != runner.view.load or delta.started or delta.finished or delta.losses
            runner.take_load(delta.load)
            # A replica that has nothing to say says so, for this supervisor alone: it is alive.
            if is_news:
                self.feed.report(delta)

    def take_adapters(self, replica_id: str, link: Link, statuses: Sequence[AdapterStatus]) -> None:
        """Takes what a replica says of its adapters."""
        runner = self._runners.get(replica_id)
        if runner is not None and runner.is_link(link):
            runner.take_adapters(statuses)

    def detach(self, replica_id: str, link: Link) -> None:
        """Notes that a stream ended, which by itself changes nothing."""
        runner = self._runners.get(replica_id)
        if runner is not None:
            runner.detach(link)

    def note_exit(self, pid: int, start_ticks: int, status: int) -> None:
        """Takes what the launcher says of a front process that ended."""
        for runner in self._runners.values():
            if runner.view.process == ProcessIdentity(pid, start_ticks):
                runner.post(life_events.ProcessExited(status))
                return

    # What is measured.

    def note_measure(self, measure: DeviceMeasure) -> None:
        """Takes what was measured of a device; replicas on one that is lost fail, since they can only hang."""
        for replica_id in self._ledger.note(measure):
            failure = Failure("DEVICE_LOST", f"its device {measure.device_id} is lost: {measure.health_message}")
            self._runners[replica_id].post(life_events.ReportedFailure(failure))
        for use in self._ledger.use():
            if use.device.device_id == measure.device_id:
                self.feed.report_device(measure, use.booked_bytes)

    def note_memory(self, replica_id: str, measured_bytes: int) -> None:
        """Takes what a replica's processes were measured to hold; nothing of one that just falls asleep or wakes."""
        runner = self._runners.get(replica_id)
        if runner is None:
            return
        view = runner.view
        if view.sleeping_bytes is not None:
            runner.post(life_events.FellAsleep(measured_bytes))
        elif view.state is ReplicaState.READY:
            runner.take_measure(measured_bytes)

    # The end.

    def cordon(self) -> None:
        """Refuses every start from now on."""
        self._is_cordoned = True

    async def end_all(self, timeout_seconds: float) -> None:
        """Drains every replica and returns when all trees are gone; what still runs after the timeout is killed."""
        runners = tuple(self._runners.values())
        for runner in runners:
            runner.post(life_events.DrainRequested(timeout_seconds))
        for runner in runners:
            await runner.wait_ended()
        await self._staging.close()

    async def end_unlent(self) -> None:
        """Ends replicas that have no process yet, which no successor could find, or none that it could go on with."""
        runners = tuple(
            runner for runner in self._runners.values() if runner.view.process is None or not runner.is_lent
        )
        for runner in runners:
            runner.post(life_events.StopRequested())
        for runner in runners:
            await runner.wait_ended()

    def write_list(self) -> None:
        """Writes the list of running replicas now."""
        listed = []
        for booking in self._ledger.bookings:
            runner = self._runners[booking.replica_id]
            view = runner.view
            if view.process is not None and runner.is_lent:
                listed.append(ListedReplica(view, booking.port))
        try:
            self._list.write(listed)
        except OSError as error:
            log.warning("list of replicas can't be written", error=str(error))

    # Inside.

    def _is_refused(self, said: ReplicaView) -> bool:
        has_port = said.address.rpartition(":")[2].isdecimal()
        return self._is_cordoned or said.replica_id in self._ended or said.state.is_ended or not has_port

    def _adopt(self, said: ReplicaView) -> ReplicaRunner | None:
        port = int(said.address.rpartition(":")[2])
        return self._take_over(ListedReplica(said, port))

    def _expect(self, listed: ListedReplica) -> None:
        if self._take_over(listed) is None and listed.view.process is not None:
            self._group.create_task(kill_tree(listed.view.process), name=f"kill {listed.view.replica_id}")

    def _take_over(self, listed: ListedReplica) -> ReplicaRunner | None:
        view = listed.view
        return_by = asyncio.get_running_loop().time() + self._rules.return_seconds
        try:
            life = ReplicaMachine.returning(view, self._rules.limits, return_by=return_by)
            booking = self._ledger.adopt(
                view.replica_id,
                view.order.memory_bytes,
                listed.port,
                items=view.order.memory_items,
                device_ids=view.device_ids,
                sleeping_bytes=view.sleeping_bytes,
            )
        except (HeliosError, ValueError) as error:
            log.warning("replica can't be taken over", replica=view.replica_id, error=str(error))
            return None
        self._host.adopt_replica(view.replica_id, view.order.host_memory_bytes)
        runner = self._add(life, booking)
        self._states[view.replica_id] = view.state
        self._measure_replicas()
        runner.resume()
        return runner

    def _add(self, life: ReplicaMachine, booking: Booking) -> ReplicaRunner:
        def spec(view: ReplicaView, model_path: str, traceparent: str) -> ReplicaSpec:
            return self._make_spec(view, booking, model_path=model_path, traceparent=traceparent)

        surroundings = Surroundings(
            group=self._group,
            launcher=self._launcher,
            weights=self._weights,
            lease_ttl_seconds=self._rules.lease_ttl_seconds,
            holder=self._rules.worker_id,
            spec=spec,
            on_change=self._on_change,
            on_freed=self._on_freed,
            on_asleep=self._on_asleep,
            on_regrown=self._ledger.regrow,
            device_ids=booking.device_ids,
            early=self.early,
        )
        runner = ReplicaRunner(life, surroundings)
        self._runners[booking.replica_id] = runner
        self._measure_ledger()
        return runner

    def _on_freed(self, view: ReplicaView) -> None:
        self._ledger.release(view.replica_id)
        self._host.release_replica(view.replica_id)
        del self._runners[view.replica_id]
        self._ended[view.replica_id] = view.process
        while len(self._ended) > _REMEMBERED_ENDS:
            self._ended.popitem(last=False)
        self._measure_ledger()

    def _on_asleep(self, replica_id: str, left_bytes: int) -> None:
        self._ledger.sleep(replica_id, left_bytes)
        self._measure_ledger()

    def _on_change(self, view: ReplicaView) -> None:
        previous = self._states.get(view.replica_id)
        if previous is not view.state:
            self._states[view.replica_id] = view.state
            self._report_state(view, previous)
        if view.state.is_ended:
            self._states.pop(view.replica_id, None)
            self.on_ended(view)
        self._measure_replicas()
        self.on_changed()
        self._list_changed.set()
        self._note_returned()
        self.feed.publish(view)

    def _report_state(self, view: ReplicaView, previous: ReplicaState | None) -> None:
        facts = {"replica": view.replica_id, "model": view.order.model, "state": view.state.value}
        if previous is not None:
            facts["previous"] = previous.value
        if view.failure is not None:
            log.warning("replica changed", **facts, reason=view.failure.reason, error=view.failure.message)
        else:
            log.info("replica changed", **facts)
        if view.state is ReplicaState.READY:
            for phase in view.phases:
                metrics.COLD_START_PHASE.labels(phase.phase).observe(phase.seconds)
        if view.state.is_ended:
            metrics.REPLICA_EXITS.labels(view.failure.reason if view.failure else "STOPPED").inc()

    def _note_returned(self) -> None:
        if not any(runner.is_awaited for runner in self._runners.values()):
            self._all_returned.set()

    def _measure_replicas(self) -> None:
        states = list(self._states.values())
        for state in ReplicaState:
            if not state.is_ended:
                metrics.REPLICAS.labels(state.value).set(states.count(state))

    def _measure_ledger(self) -> None:
        for use in self._ledger.use():
            metrics.DEVICE_MEMORY.labels(use.device.device_id).set(use.device.memory_bytes)
            metrics.DEVICE_BOOKED.labels(use.device.device_id).set(use.booked_bytes)

    async def _keep_list(self) -> None:
        while True:
            await self._list_changed.wait()
            self._list_changed.clear()
            self.write_list()

    async def _reap_orphans(self) -> None:
        while True:
            await asyncio.sleep(_REAP_SECONDS)
            running = [runner.view.process for runner in self._runners.values()]
            fronts = frozenset(process.pid for process in (*running, *self._ended.values()) if process is not None)
            if fronts:
                await asyncio.to_thread(reap, fronts)
