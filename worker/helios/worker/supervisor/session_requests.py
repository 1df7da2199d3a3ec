"""What a worker says in one fleet session, in the order of the contract: hello, then whatever its outbox holds.

grpcio pulls the next message when it has written the last one, so a proxy that does not read leaves the rest in the
outbox, whose bound then ends the session. An iterator rather than ``write`` calls: with client interceptors, grpcio
keeps a task for good for every stream that the server ended while nothing was being written.
"""

import asyncio
from collections import deque
from typing import Self

from helios.api.fleet.v1 import fleet_service_pb2 as pb
from helios.worker.supervisor.commands import Ack
from helios.worker.supervisor.device_wire import measure_to_proto, staged_to_proto
from helios.worker.supervisor.outbox import LoadReport, Outbox, Outgoing, ReplicaEvent, StagedEvent
from helios.worker.supervisor.records import WorkerView
from helios.worker.supervisor.wire import ack_to_proto, delta_to_proto, hello_to_proto, replica_to_proto


class SessionRequests:
    """The requests of one session, for grpcio to iterate over.

    ``open`` makes the hello available, ``begin`` (the welcome came) everything else; ``close`` ends the iteration,
    also while it waits, and must be called. Something is said at least once an interval: a heartbeat, where there is
    nothing else.
    """

    def __init__(self) -> None:
        self._ready: deque[pb.SessionRequest] = deque()
        self._outbox: Outbox | None = None
        self._changed = asyncio.Event()
        self._interval: float | None = None
        self._is_closed = False
        self._load_at = self._sent_at = asyncio.get_running_loop().time()

    def open(self, worker: WorkerView, outbox: Outbox, epoch: int) -> None:
        """Says hello, with the highest epoch that a proxy has said."""
        self._ready.append(pb.SessionRequest(hello=hello_to_proto(worker, epoch)))
        self._outbox = outbox

    def begin(self, interval_seconds: float) -> None:
        """Says what changed since, at the pace that the proxy asked for."""
        self._interval = interval_seconds
        self._changed.set()

    def wake(self) -> None:
        """Notes that the outbox changed."""
        self._changed.set()

    def close(self) -> None:
        """Ends the iteration. Idempotent."""
        self._is_closed = True
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pb.SessionRequest:
        """Waits for the next message. Cancel-safe: what was not returned is returned next time."""
        while True:
            if self._is_closed:
                raise StopAsyncIteration
            if not self._ready:
                self._fill()
            if self._ready:
                self._sent_at = _now()
                return self._ready.popleft()
            await self._wait()

    def _fill(self) -> None:
        if self._outbox is None or self._interval is None:
            return
        now = _now()
        messages = self._outbox.take(is_load_due=now >= self._load_at + self._interval)
        if any(isinstance(message, LoadReport) for message in messages):
            self._load_at = now
        self._ready.extend(map(_to_proto, messages))
        if not messages and now >= self._sent_at + self._interval:
            self._ready.append(pb.SessionRequest(heartbeat=pb.Heartbeat()))

    async def _wait(self) -> None:
        due = None
        if self._outbox is not None and self._interval is not None:
            since = min(self._sent_at, self._load_at) if self._outbox.has_load else self._sent_at
            due = since + self._interval
        try:
            async with asyncio.timeout_at(due):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _to_proto(message: Outgoing) -> pb.SessionRequest:
    match message:
        case ReplicaEvent(sequence, view):
            return pb.SessionRequest(replica_event=pb.ReplicaEvent(sequence=sequence, replica=replica_to_proto(view)))
        case StagedEvent(sequence, staged):
            return pb.SessionRequest(staged_event=pb.StagedEvent(sequence=sequence, staged=staged_to_proto(staged)))
        case LoadReport(deltas, devices):
            report = pb.LoadReport(
                deltas=[delta_to_proto(delta) for delta in deltas],
                devices=[measure_to_proto(measure, booked_bytes) for measure, booked_bytes in devices],
            )
            return pb.SessionRequest(load=report)
        case Ack():
            return pb.SessionRequest(command_ack=ack_to_proto(message))
