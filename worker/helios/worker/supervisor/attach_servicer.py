"""SupervisorService: where replicas report to this supervisor, over a unix socket.

The hello is believed only as far as /proc agrees: the pid must be a live process with that start time, and the leader
of its own session, because the supervisor later kills by exactly these facts.
"""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, Protocol

import grpc.aio
import structlog

from helios.api.worker.v1 import supervisor_service_pb2 as pb
from helios.api.worker.v1.supervisor_service_pb2_grpc import SupervisorServiceServicer
from helios.mesh.durations import seconds_to_proto
from helios.mesh.errors import HeliosError, InvalidRequest, PermissionDenied
from helios.worker.replica.adapter_state import AdapterFiles, AdapterStatus
from helios.worker.replica.adapter_wire import files_to_proto, status_from_proto
from helios.worker.supervisor import life_events
from helios.worker.supervisor.process_tree import read_process
from helios.worker.supervisor.records import LoadDelta, ProcessIdentity, ReplicaView
from helios.worker.supervisor.replica_runner import Link
from helios.worker.supervisor.wire import (
    delta_from_proto,
    failure_from_proto,
    phase_from_proto,
    replica_from_proto,
    state_from_proto,
)

log = structlog.get_logger()

# Welcome, drains and a stop: a replica that leaves this many unread is hung, and the kill at its deadline settles it.
_LINK_CAPACITY: Final = 16
# Weights are dropped, not copied: they lie in the node's shared blobs anyway, and host memory holds other models.
SLEEP_LEVEL: Final = 2


class Attachments(Protocol):
    """What a replica's words lead to; the supervisor. No method blocks."""

    def attach(self, said: ReplicaView, link: Link) -> bool:
        """Takes a hello whose process was checked; False: the replica was told to stop."""
        ...

    def report(self, replica_id: str, link: Link, event: life_events.Event) -> None:
        """Takes an event of a replica's life."""
        ...

    def take_load(self, replica_id: str, link: Link, delta: LoadDelta) -> None:
        """Takes a load."""
        ...

    def take_adapters(self, replica_id: str, link: Link, statuses: Sequence[AdapterStatus]) -> None:
        """Takes what a replica says of its adapters, all of them."""
        ...

    def detach(self, replica_id: str, link: Link) -> None:
        """Notes that the stream ended. Called once for each ``attach`` that returned True."""
        ...


class ReplicaLink:
    """What is to be said to one replica, in order; closing it ends the stream."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[pb.AttachResponse | None] = asyncio.Queue(_LINK_CAPACITY + 1)
        self.error: HeliosError | None = None

    def welcome(self, report_interval_seconds: float, orphan_seconds: float) -> None:
        """Tells that the hello was taken."""
        welcome = pb.ReplicaWelcome(
            report_interval=seconds_to_proto(report_interval_seconds), orphan_timeout=seconds_to_proto(orphan_seconds)
        )
        self._put(pb.AttachResponse(welcome=welcome))

    def drain(self, timeout_seconds: float) -> None:
        """Asks the replica to finish and exit."""
        self._put(pb.AttachResponse(drain=pb.ReplicaDrain(timeout=seconds_to_proto(timeout_seconds))))

    def sleep(self) -> None:
        """Asks the replica to take weights and KV cache off its device."""
        self._put(pb.AttachResponse(sleep=pb.ReplicaSleep(level=SLEEP_LEVEL)))

    def wake(self) -> None:
        """Asks the replica to come back."""
        self._put(pb.AttachResponse(wake=pb.ReplicaWake()))

    def adapters(self, files: Sequence[AdapterFiles]) -> None:
        """Says which adapters the replica is to have."""
        self._put(pb.AttachResponse(adapters=pb.ReplicaAdapterSet(adapters=map(files_to_proto, files))))

    def close(self, error: HeliosError | None = None) -> None:
        """Ends the stream after what was said before, with ``error`` where there is one. Idempotent."""
        self.error = self.error or error
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(None)

    async def messages(self) -> AsyncIterator[pb.AttachResponse]:
        """Yields what is said until the link is closed."""
        while (message := await self._queue.get()) is not None:
            yield message

    def _put(self, message: pb.AttachResponse) -> None:
        if self._queue.qsize() >= _LINK_CAPACITY:
            log.warning("replica does not read", waiting_count=self._queue.qsize())
            return
        self._queue.put_nowait(message)


class AttachServicer(SupervisorServiceServicer):
    """Serves Attach. ``group`` runs one reader for each stream and belongs to the caller."""

    def __init__(
        self,
        replicas: Attachments,
        *,
        group: asyncio.TaskGroup,
        report_interval_seconds: float,
        orphan_seconds: float,
    ) -> None:
        self._replicas = replicas
        self._group = group
        self._report_interval_seconds = report_interval_seconds
        self._orphan_seconds = orphan_seconds

    async def Attach(
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: Any
    ) -> AsyncIterator[pb.AttachResponse]:
        """Holds the conversation of the contract."""
        said = _hello(await anext(aiter(request_iterator), None))
        link = ReplicaLink()
        # The welcome is first in the queue whatever attaching leads to.
        link.welcome(self._report_interval_seconds, self._orphan_seconds)
        if not self._replicas.attach(said, link):
            yield pb.AttachResponse(stop=pb.ReplicaStop())
            return
        reader = self._group.create_task(
            self._read(said.replica_id, link, request_iterator), name=f"read {said.replica_id}"
        )
        try:
            async for message in link.messages():
                yield message
            if link.error is not None:
                raise link.error
        finally:
            self._replicas.detach(said.replica_id, link)
            reader.cancel()

    async def _read(self, replica_id: str, link: ReplicaLink, requests: AsyncIterator[pb.AttachRequest]) -> None:
        error: HeliosError | None = None
        try:
            async for request in requests:
                self._take(replica_id, link, request)
        except HeliosError as wrong:
            error = wrong
        except grpc.aio.BaseError as ended:
            # The server stops, or the call was torn down while it was read: the stream is over either way.
            log.debug("stream of a replica ended", replica=replica_id, error=str(ended))
        finally:
            link.close(error)

    def _take(self, replica_id: str, link: ReplicaLink, request: pb.AttachRequest) -> None:
        match request.WhichOneof("message"):
            case "load":
                self._replicas.take_load(replica_id, link, delta_from_proto(request.load))
            case "progress":
                progress = request.progress
                phase = phase_from_proto(progress.phase) if progress.HasField("phase") else None
                event = life_events.Progressed(state_from_proto(progress.state), phase)
                self._replicas.report(replica_id, link, event)
            case "ready":
                said = request.ready
                ready = life_events.BecameReady(said.address, said.max_context_tokens, said.can_sleep)
                self._replicas.report(replica_id, link, ready)
            case "adapters":
                statuses = [status_from_proto(adapter) for adapter in request.adapters.adapters]
                self._replicas.take_adapters(replica_id, link, statuses)
            case "asleep":
                self._replicas.report(replica_id, link, life_events.FellAsleep(request.asleep.left_bytes))
            case "failed":
                failed = life_events.ReportedFailure(failure_from_proto(request.failed))
                self._replicas.report(replica_id, link, failed)
            case _:
                raise InvalidRequest("a replica says hello once, then progress, ready, failed or load")


def _hello(request: pb.AttachRequest | None) -> ReplicaView:
    if request is None or request.WhichOneof("message") != "hello":
        raise InvalidRequest("the first message of a replica is its hello", reason="HELLO_EXPECTED")
    hello = request.hello
    said = replica_from_proto(hello.replica, start_ticks=hello.start_ticks, lease_id=hello.lease_id)
    assert said.process is not None
    _check(said.process)
    return said


def _check(process: ProcessIdentity) -> None:
    entry = read_process(process.pid)
    if entry is None or entry.identity != process or entry.is_zombie:
        raise PermissionDenied("the hello names a process that is not there", metadata={"pid": str(process.pid)})
    if process.pid == os.getpid() or entry.session_id != process.pid:
        raise PermissionDenied(
            "a replica's front process leads a session of its own", metadata={"pid": str(process.pid)}
        )
