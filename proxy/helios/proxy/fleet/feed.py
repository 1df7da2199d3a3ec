"""What workers say, told again to further picker processes: the server's side and theirs.

A picker process is a proxy that follows, except that no worker dials it. So each worker has one session on a host
however many processes pick there. Nothing is kept that a hello does not say: a watcher that begins, or was too slow,
gets a hello of each worker as it is by now.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Final

from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.api.proxy.v1 import feed_service_pb2 as pb
from helios.api.proxy.v1.feed_service_pb2_grpc import FeedServiceServicer, FeedServiceStub
from helios.mesh.calls import messages_of
from helios.mesh.channel import Dialer
from helios.mesh.errors import Unavailable
from helios.proxy.fleet import wire
from helios.proxy.runtime import Outbox, Runtime

FEED_SERVICE: Final = "helios.api.proxy.v1.FeedService"
# Messages that a watcher has not taken: some seconds of a hundred workers.
_MOST_MESSAGES: Final = 1024
_GONE: Final = frozenset({types_pb2.ReplicaState.REPLICA_STATE_STOPPED, types_pb2.ReplicaState.REPLICA_STATE_FAILED})


class _Worker:
    """A worker as it was last told of."""

    def __init__(self, hello: fleet_pb.Hello) -> None:
        self.hello = fleet_pb.Hello()
        self.hello.CopyFrom(hello)
        self.replicas = {replica.replica_id: replica for replica in hello.replicas}
        self.staged = {staged.revision: staged for staged in hello.staged}

    def take(self, message: fleet_pb.SessionRequest) -> None:
        """Takes in what it says."""
        match message.WhichOneof("message"):
            case "replica_event":
                replica = message.replica_event.replica
                if replica.state in _GONE:
                    self.replicas.pop(replica.replica_id, None)
                else:
                    self.replicas[replica.replica_id] = replica
            case "staged_event":
                staged = message.staged_event.staged
                if staged.state == fleet_pb.StagedState.STAGED_STATE_GONE:
                    self.staged.pop(staged.revision, None)
                else:
                    self.staged[staged.revision] = staged
            case _:
                pass

    def whole(self) -> fleet_pb.SessionRequest:
        """A hello that says all of it."""
        hello = fleet_pb.Hello()
        hello.CopyFrom(self.hello)
        del hello.replicas[:], hello.staged[:]
        hello.replicas.extend(self.replicas.values())
        hello.staged.extend(self.staged.values())
        return fleet_pb.SessionRequest(hello=hello)


class Feed:
    """What is told again, and to whom. Used on one event loop; never blocks."""

    def __init__(self) -> None:
        self._workers: dict[str, _Worker] = {}
        self._watchers: set[asyncio.Queue[pb.WatchWorkersResponse | None]] = set()

    def said(self, worker_id: str, message: fleet_pb.SessionRequest) -> None:
        """A worker said something; its session begins with a hello."""
        if message.WhichOneof("message") == "hello":
            self._workers[worker_id] = _Worker(message.hello)
        elif (worker := self._workers.get(worker_id)) is not None:
            worker.take(message)
        if self._watchers:
            self._tell(pb.WatchWorkersResponse(worker_id=worker_id, message=message))

    def lost(self, worker_id: str) -> None:
        """A worker's session ended, and no other one has taken over."""
        if self._workers.pop(worker_id, None) is not None:
            self._tell(pb.WatchWorkersResponse(worker_id=worker_id))

    async def watch(self) -> AsyncIterator[pb.WatchWorkersResponse]:
        """All that is said, from a hello of each worker on; ends where it is not taken in time."""
        queue: asyncio.Queue[pb.WatchWorkersResponse | None] = asyncio.Queue(_MOST_MESSAGES)
        known = [(worker_id, worker.whole()) for worker_id, worker in self._workers.items()]
        self._watchers.add(queue)
        try:
            for worker_id, hello in known:
                yield pb.WatchWorkersResponse(worker_id=worker_id, message=hello)
            while (item := await queue.get()) is not None:
                yield item
        finally:
            self._watchers.discard(queue)

    def _tell(self, item: pb.WatchWorkersResponse) -> None:
        for queue in list(self._watchers):
            try:
                queue.put_nowait(item)
            except asyncio.QueueFull:
                self._watchers.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)


class FeedServicer(FeedServiceServicer):
    """Tells it to the picker processes of this proxy."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed

    async def WatchWorkers(  # type: ignore[override]
        self, request: pb.WatchWorkersRequest, context: Any
    ) -> None:
        """Serves one watcher; a coroutine that writes to the context: see FleetServicer."""
        watching = self._feed.watch()
        try:
            async for item in watching:
                await context.write(item)
        finally:
            await watching.aclose()  # type: ignore[attr-defined]


Take = Callable[[fleet_pb.SessionRequest, str, float], None]


class FeedSession:
    """A picker process's end: what workers say to its proxy is taken in as if they had said it here."""

    def __init__(self, runtime: Runtime, dialer: Dialer, take: Take) -> None:
        """``take`` takes in what a worker says that has said hello."""
        self._runtime = runtime
        self._dialer = dialer
        self._take = take
        self._outboxes: dict[str, Outbox] = {}

    async def run(self) -> None:
        """Watches until the stream ends; call it again. Raises HeliosError.

        What is believed meanwhile is believed for as long as workers may be silent.
        """
        call = self._dialer.stub(FeedServiceStub).WatchWorkers(pb.WatchWorkersRequest())
        async with aclosing(messages_of(call)) as items:
            async for item in items:
                self._hear(item, time.monotonic())
        raise Unavailable("the proxy's feed ended", reason="FEED_ENDED")

    def _hear(self, item: pb.WatchWorkersResponse, now: float) -> None:
        worker_id, outbox = item.worker_id, self._outboxes.get(item.worker_id)
        if not item.HasField("message"):
            if outbox is not None:
                del self._outboxes[worker_id]
                self._runtime.disconnect_worker(worker_id, outbox)
        elif item.message.WhichOneof("message") == "hello":
            self._outboxes[worker_id] = self._runtime.connect_worker(worker_id)
            self._runtime.apply(self._runtime.core.worker_hello(wire.hello_from_proto(item.message.hello), now))
        elif outbox is not None:
            self._take(item.message, worker_id, now)
