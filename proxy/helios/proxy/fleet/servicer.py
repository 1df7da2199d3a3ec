"""FleetService: one session a worker.

The session reads and writes at the same time, so it has two tasks; whichever ends first ends the session. Nothing is
lost with a stream: the worker's next hello is complete, and commands that were not acknowledged are sent again after
it.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import structlog

from helios.api.fleet.v1 import fleet_service_pb2 as pb
from helios.api.fleet.v1.fleet_service_pb2_grpc import FleetServiceServicer
from helios.mesh.durations import seconds_to_proto
from helios.mesh.errors import InvalidRequest
from helios.proxy import metrics
from helios.proxy.explain.record import Finished
from helios.proxy.fleet import wire
from helios.proxy.fleet.feed import Feed
from helios.proxy.runtime import Outbox, Runtime
from helios.proxy.usage.meter import Tally

log = structlog.get_logger()

Ends = list[list[tuple[str, Finished]]]
"""The requests that ended, by their ids, of each delta of a report."""

FLEET_SERVICE: Final = "helios.api.fleet.v1.FleetService"
# A worker that dials and says nothing is not a worker.
_HELLO_SECONDS: Final = 10.0


class _SessionEnd(Exception):
    """One half of a session has ended."""


class FleetServicer(FleetServiceServicer):
    """Takes workers in."""

    def __init__(
        self, runtime: Runtime, *, proxy_id: str, report_interval_seconds: float, feed: Feed | None = None
    ) -> None:
        """``feed`` tells other processes again what workers say; None: there are none."""
        self._runtime = runtime
        self._feed = feed
        self._proxy_id = proxy_id
        self._interval_seconds = report_interval_seconds

    # A coroutine that writes to the context, and not an async generator as the generated type has it: a generator that
    # is dropped half-way is closed by the garbage collector, in whatever task that happens to run.
    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Any
    ) -> None:
        """Serves one worker until its stream ends or a newer stream of the same worker takes over."""
        first = await self._hello(request_iterator)
        hello = wire.hello_from_proto(first.hello)
        now = time.monotonic()
        outbox = self._runtime.connect_worker(hello.worker_id)
        try:
            epoch = self._runtime.core.leadership.epoch
            welcome = pb.Welcome(
                report_interval=seconds_to_proto(self._interval_seconds), proxy_id=self._proxy_id, epoch=epoch
            )
            await context.write(pb.SessionResponse(welcome=welcome))
            log.info("worker connected", worker=hello.worker_id, node=hello.node, replicas=len(hello.replicas))
            self._runtime.core.leadership.claimed(hello.worker_id, first.hello.epoch, now)
            self._runtime.apply(self._runtime.core.worker_hello(hello, now))
            if self._feed is not None:
                self._feed.said(hello.worker_id, first)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(request_iterator, hello.worker_id, outbox), name=f"read {hello.worker_id}")
                group.create_task(self._write(outbox, context), name=f"write {hello.worker_id}")
        except BaseExceptionGroup as group:
            _, others = group.split(_SessionEnd)
            if others is not None:
                raise others.exceptions[0] from None
        finally:
            is_last = self._runtime.disconnect_worker(hello.worker_id, outbox)
            if self._feed is not None and is_last:
                self._feed.lost(hello.worker_id)

    async def _hello(self, requests: AsyncIterator[pb.SessionRequest]) -> pb.SessionRequest:
        async with asyncio.timeout(_HELLO_SECONDS):
            first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "hello" or not first.hello.worker_id:
            raise InvalidRequest("the first message of a session must be a hello", reason="HELLO_EXPECTED")
        return first

    async def _read(self, requests: AsyncIterator[pb.SessionRequest], worker_id: str, outbox: Outbox) -> None:
        async for message in requests:
            if outbox.is_closed:
                break
            self.take(message, worker_id, time.monotonic())
            if self._feed is not None:
                self._feed.said(worker_id, message)
        raise _SessionEnd

    def take(self, message: pb.SessionRequest, worker_id: str, now: float) -> None:
        """Takes in what a worker says that has said hello."""
        core = self._runtime.core
        self._runtime.apply(core.worker_seen(worker_id, now))
        if self._is_of_another(message, worker_id):
            log.warning("a worker speaks of another one's replica: not believed", worker=worker_id)
            return
        match message.WhichOneof("message"):
            case "load":
                ends = [wire.ends_from_proto(delta, now) for delta in message.load.deltas]
                # Before the ledger settles what this proxy knows of these requests.
                self._count(message.load, ends, now)
                deltas = [wire.delta_from_proto(delta) for delta in message.load.deltas]
                self._runtime.apply(core.load_report(deltas, now))
                self._note(message.load, ends, now)
                if message.load.devices:
                    devices = [wire.measure_from_proto(device) for device in message.load.devices]
                    self._runtime.apply(core.devices_measured(worker_id, devices, now))
            case "staged_event":
                staged = wire.staged_from_proto(message.staged_event.staged, worker_id)
                log.info("staged revision changed", revision=staged.revision, state=staged.state.name, worker=worker_id)
                self._runtime.apply(core.staged_event(worker_id, message.staged_event.sequence, staged, now))
            case "replica_event":
                event = message.replica_event
                replica = wire.replica_from_proto(event.replica, worker_id)
                held = core.fleet.replica(replica.replica_id)
                if held is None or held.state is not replica.state:
                    log.info(
                        "replica changed", replica=replica.replica_id, model=replica.model, state=replica.state.name
                    )
                self._runtime.journal.replica_changed(replica, now)
                self._runtime.apply(core.replica_event(worker_id, event.sequence, replica, now))
            case "command_ack":
                ack = message.command_ack
                core.leadership.claims.note(worker_id, ack.epoch)
                if ack.refused_reason:
                    log.warning("command refused", worker=worker_id, reason=ack.refused_reason, error=ack.message)
                todo = core.command_acknowledged(
                    worker_id, ack.command_id, refused_reason=ack.refused_reason, message=ack.message, now=now
                )
                self._runtime.apply(todo)
            case "hello":
                raise InvalidRequest("a session has one hello", reason="HELLO_EXPECTED")
            case _:
                pass

    def _is_of_another(self, message: pb.SessionRequest, worker_id: str) -> bool:
        """Whether a worker speaks of a replica that is known as another worker's."""
        named = [delta.replica_id for delta in message.load.deltas]
        if message.HasField("replica_event"):
            named.append(message.replica_event.replica.replica_id)
        held = (self._runtime.core.fleet.replica(replica_id) for replica_id in named)
        return any(replica is not None and replica.worker_id != worker_id for replica in held)

    def _count(self, report: pb.LoadReport, ends: Ends, now: float) -> None:
        meter, core, hour = self._runtime.meter, self._runtime.core, self._runtime.hour(now)
        knows = core.traffic.ledger.is_ours
        for delta, ended in zip(report.deltas, ends, strict=True):
            replica = core.fleet.replica(delta.replica_id)
            if replica is None:
                continue
            # What came by the express lane was picked by nobody, and there is no other proxy then.
            is_express = core.express.lane.has_carried(delta.replica_id)
            for started in delta.started:
                is_ours = is_express or knows(started.request_id)
                meter.started(started.request_id, replica.model, hour, is_ours=is_ours)
            for request_id, finished in ended:
                taken = Tally(
                    prompt_tokens=finished.prompt_tokens,
                    completion_tokens=finished.completion_tokens,
                    busy_ms=round(1000 * finished.duration_seconds),
                )
                meter.finished(
                    request_id,
                    replica.model,
                    hour,
                    taken=taken,
                    status_code=finished.status_code,
                    is_ours=is_express or knows(request_id),
                )

    def _note(self, report: pb.LoadReport, ends: Ends, now: float) -> None:
        journal, express_count = self._runtime.journal, 0
        for delta, ended in zip(report.deltas, ends, strict=True):
            pick = self._runtime.core.express.pick_of(delta.replica_id)
            for request_id, at in wire.arrivals_from_proto(delta):
                if pick is not None and not journal.knows(request_id):
                    express_count += 1
                    arrived_at = now if at is None else min(now, at - journal.wall_offset)
                    journal.picked(request_id, (pick.model, pick, (), "", arrived_at, arrived_at))
                journal.arrived(request_id, delta.replica_id, at, now)
            for request_id, finished in ended:
                journal.finished(request_id, finished)
        metrics.EXPRESS.inc(express_count)

    async def _write(self, outbox: Outbox, context: Any) -> None:
        leadership = self._runtime.core.leadership
        while True:
            try:
                async with asyncio.timeout(self._interval_seconds):
                    command = await outbox.queue.get()
            except TimeoutError:
                await context.write(pb.SessionResponse(heartbeat=pb.Heartbeat(epoch=leadership.epoch)))
                continue
            if command is None:
                raise _SessionEnd
            await context.write(wire.command_to_proto(command))
            log.info("command sent", worker=command.worker_id, order=type(command.order).__name__)
