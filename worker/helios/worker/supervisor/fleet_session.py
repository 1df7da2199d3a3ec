"""The session with one proxy: a complete hello, then everything that changes, and the proxy's commands.

One session a proxy, all fed from one state. A session that breaks, or whose proxy does not read, is given up and
begun anew with a complete hello: a resynchronisation needs no history, and no proxy can hold up the worker or another
proxy.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import grpc.aio
import structlog

from helios.api.fleet.v1 import fleet_service_pb2 as pb
from helios.api.fleet.v1.fleet_service_pb2_grpc import FleetServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.durations import seconds_from_proto
from helios.mesh.errors import HeliosError, Overloaded, Unavailable
from helios.mesh.identity import IdentityFiles
from helios.mesh.tasks import keep_running
from helios.worker.supervisor import metrics
from helios.worker.supervisor.commands import Ack, Command
from helios.worker.supervisor.fence import STALE_LEADER, Fence
from helios.worker.supervisor.outbox import Outbox
from helios.worker.supervisor.records import WorkerView
from helios.worker.supervisor.session_requests import SessionRequests
from helios.worker.supervisor.wire import command_from_proto

log = structlog.get_logger()

Stream = grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]

# A proxy answers a hello from memory.
_WELCOME_SECONDS: Final = 10.0
# Whatever a proxy asks for: more than 100 reports a second help nobody, and a rest above 10 s looks like death.
_SHORTEST_INTERVAL_SECONDS: Final = 0.01
_LONGEST_INTERVAL_SECONDS: Final = 10.0


class Feed(Protocol):
    """Where a session's snapshot and changes come from."""

    def subscribe(self, wake: Callable[[Outbox], None]) -> AbstractContextManager[tuple[WorkerView, Outbox]]:
        """Lends an outbox with everything that changes after the snapshot; ``wake`` is called at each change."""
        ...


class Executor(Protocol):
    """What carries commands out."""

    def execute(self, command_id: str, command: Command) -> Ack:
        """Accepts or refuses at once; a repeated id is answered and not carried out again."""
        ...


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How a session is held, in seconds.

    Attributes:
        silence_seconds: A proxy that sends nothing for this long, and for five of its own intervals, is given up:
            proxies send heartbeats.
        retry_cap_seconds: Longest wait between two attempts.
    """

    silence_seconds: float = 15.0
    retry_cap_seconds: float = 2.0


class FleetSession:
    """Keeps a session with one proxy until cancelled."""

    def __init__(
        self,
        address: str,
        *,
        identity: IdentityFiles | None,
        feed: Feed,
        executor: Executor,
        fence: Fence | None = None,
        options: SessionOptions | None = None,
    ) -> None:
        """``fence`` is all sessions' of this worker."""
        self.is_open = False
        self._address = address
        self._fence = fence or Fence()
        self._identity = identity
        self._feed = feed
        self._executor = executor
        self._options = options or SessionOptions()

    async def run(self) -> None:
        """Dials again and again. Only cancelling ends it."""
        async with Dialer(self._address, identity=self._identity, peer="proxy") as dialer:
            await keep_running(
                f"fleet session with {self._address}",
                lambda: self._converse(dialer),
                cap_seconds=self._options.retry_cap_seconds,
            )

    async def _converse(self, dialer: Dialer) -> None:
        requests = SessionRequests()
        stream: Stream = dialer.stub(FleetServiceStub).Session(requests)

        def wake(outbox: Outbox) -> None:
            requests.wake()
            if outbox.is_overflowed:
                # Ends the read below: a write to a proxy that does not read never ends by itself.
                stream.cancel()

        try:
            with self._feed.subscribe(wake) as (worker, outbox):
                requests.open(worker, outbox, self._fence.epoch)
                await self._exchange(stream, requests, outbox)
        finally:
            self.is_open = False
            self._fence.left(self._address)
            requests.close()
            stream.cancel()

    async def _exchange(self, stream: Stream, requests: SessionRequests, outbox: Outbox) -> None:
        try:
            welcome = await self._welcome(stream)
            interval = seconds_from_proto(welcome.report_interval) or 1.0
            interval = min(max(interval, _SHORTEST_INTERVAL_SECONDS), _LONGEST_INTERVAL_SECONDS)
            log.info("fleet session open", proxy=self._address, proxy_id=welcome.proxy_id, interval_seconds=interval)
            self.is_open = True
            self._fence.hear(self._address, welcome.epoch)
            requests.begin(interval)
            with metrics.FLEET_SESSIONS.track_inprogress():
                await self._take_commands(stream, outbox, interval)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if not outbox.is_overflowed or task is None or task.cancelling():
                raise
            # It was the stream that was cancelled, not this task.
            metrics.OUTBOX_OVERFLOWS.inc()
            raise Overloaded("the proxy does not read what it is told", reason="OUTBOX_FULL") from None

    async def _welcome(self, stream: Stream) -> pb.Welcome:
        async with asyncio.timeout(_WELCOME_SECONDS):
            response = await _read(stream)
        if response.WhichOneof("message") != "welcome":
            raise Unavailable("the proxy did not answer the hello with a welcome", reason="WELCOME_EXPECTED")
        return response.welcome

    async def _take_commands(self, stream: Stream, outbox: Outbox, interval: float) -> None:
        silence_seconds = max(self._options.silence_seconds, 5 * interval)
        while True:
            try:
                async with asyncio.timeout(silence_seconds):
                    response = await _read(stream)
            except TimeoutError as error:
                raise Unavailable(f"the proxy was silent for {silence_seconds:g} s", reason="PROXY_SILENT") from error
            match response.WhichOneof("message"):
                case "command":
                    outbox.put_ack(self._execute(response.command))
                case "heartbeat":
                    self._fence.hear(self._address, response.heartbeat.epoch)
                case _:
                    pass

    def _execute(self, message: pb.Command) -> Ack:
        try:
            # Before the answers to earlier commands are looked at: the same command may come again, from a leader.
            self._fence.check(self._address, message.epoch)
            if message.WhichOneof("command") == "fence":
                # Events of what was accepted before are in the outbox already, and leave in order.
                return Ack(message.command_id)
            command = command_from_proto(message)
        except HeliosError as error:
            if error.reason == STALE_LEADER:
                metrics.COMMANDS.labels("any", STALE_LEADER).inc()
                log.warning("command of another time refused", proxy=self._address, epoch=message.epoch)
                return Ack(message.command_id, error.reason, error.message, self._fence.epoch)
            return Ack(message.command_id, error.reason, error.message)
        return self._executor.execute(message.command_id, command)


async def _read(stream: Stream) -> pb.SessionResponse:
    response = await stream.read()
    if not isinstance(response, pb.SessionResponse):
        raise Unavailable("the proxy closed the session", reason="SESSION_CLOSED")
    return response
