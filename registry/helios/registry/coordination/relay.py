"""Sessions and calls that are the coordinator's, passed on to it by the registry that an agent or a person has dialled.

Where that does not work they are served here: this registry then brings together the agents that it has, so that what
is read from the cloud may be read once more for each registry, and nothing else suffers. `standing` says which. A
session that belongs elsewhere is ended; agents come back by themselves within a second.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, TypeVar

import grpc.aio
import structlog

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.api.registry.v1.sync_service_pb2_grpc import SyncServiceStub
from helios.mesh.calls import answer_of
from helios.mesh.channel import Dialer
from helios.mesh.errors import DeadlineExceeded, Draining, HeliosError, Unavailable
from helios.mesh.identity import IdentityFiles
from helios.mesh.requests import StreamRequests
from helios.mesh.tasks import task_scope
from helios.registry.coordination.seats import Seats
from helios.registry.coordination.standing import Standing

log = structlog.get_logger()
S = TypeVar("S")

FORWARDED: Final = "x-helios-forwarded"
"""Metadata of what a registry passes on: two that take each other for the coordinator must not pass it on for ever."""

_WELCOME_SECONDS: Final = 5.0
"""A coordinator that answers later is as good as away; agents that have no session read for themselves after 5 s."""

_CALL_SECONDS: Final = 10.0
_WRITE_SECONDS: Final = 30.0
"""An agent that takes nothing for so long is gone; what is sent to it is a heartbeat every 2 s at least."""

_MAX_MESSAGES: Final = 4_096
"""Of an agent, on their way to the coordinator: as many as the agent itself keeps."""


class Relay:
    """The way to the coordinator. `run` must be running; used on one event loop."""

    def __init__(
        self,
        seats: Seats,
        *,
        identity: IdentityFiles | None,
        look_seconds: float,
        on_moved: Callable[[], None],
    ) -> None:
        """Takes who says which registry is the coordinator, and what ends the sessions that are served here.

        Args:
            seats: The database's word.
            identity: This registry's.
            look_seconds: How often the database is asked.
            on_moved: Ends sessions that are served here, because they belong elsewhere by now.
        """
        self._seats = seats
        self._identity = identity
        self._look_seconds = look_seconds
        self._on_moved = on_moved
        self._standing = Standing()
        self._moved = asyncio.Event()
        self._look_now = asyncio.Event()

    async def run(self) -> None:
        """Keeps looking who is the coordinator, and stands for it, for ever.

        Raises:
            HeliosError: The database does not answer; what was known stays in force, for nobody else can be elected.
        """
        while True:
            await self.look()
            self._look_now.clear()
            try:
                async with asyncio.timeout(self._look_seconds):
                    await self._look_now.wait()
            except TimeoutError:
                pass

    async def look(self) -> None:
        """Looks once."""
        seat = await self._seats.take()
        change = self._standing.saw(seat, time.monotonic())
        if change.has_moved:
            log.info("coordinator of storage agents", is_this=seat.is_mine, address=seat.address, epoch=seat.epoch)
            self._moved.set()
            self._moved = asyncio.Event()
        if change.is_sent_away:
            self._on_moved()

    async def resign(self) -> None:
        """Lets another registry be the coordinator at once."""
        try:
            await self._seats.give_up()
        except HeliosError as error:
            log.warning("the coordinator's seat is not given up", reason=error.reason, error=error.message)

    async def pass_on(self, first: pb.SessionRequest, requests: AsyncIterator[pb.SessionRequest], context: Any) -> bool:
        """Has the coordinator serve an agent's session, to its end; returns False where it is to be served here.

        Args:
            first: What the agent said first.
            requests: What it says further.
            context: Of its call.

        Raises:
            HeliosError: What the coordinator ends the session with.
            Draining: Another registry is the coordinator now.
        """
        target = self._target(context)
        if target is None:
            return False
        async with Dialer(target, identity=self._identity, peer="registry") as dialer:
            outgoing = StreamRequests(first, max_count=_MAX_MESSAGES)
            stream = dialer.stub(SyncServiceStub).Session(outgoing, metadata=((FORWARDED, "1"),))
            try:
                try:
                    async with asyncio.timeout(_WELCOME_SECONDS):
                        welcome = await _read(stream)
                except (TimeoutError, Unavailable) as error:
                    self._unanswered(target, error)
                    return False
                if welcome is not None:
                    await self._carry(welcome, stream, requests, outgoing, context)
                return True
            finally:
                outgoing.close()
                stream.cancel()

    async def ask(
        self, context: Any, stub_class: Callable[[grpc.aio.Channel], S], call: Callable[[S], Any], request: Any
    ) -> Any:
        """Returns the coordinator's answer to a call; None where it is to be answered here.

        Raises:
            HeliosError: What the coordinator refuses it with.
        """
        target = self._target(context)
        if target is None:
            return None
        async with Dialer(target, identity=self._identity, peer="registry") as dialer:
            asked = call(dialer.stub(stub_class))(request, timeout=_CALL_SECONDS, metadata=((FORWARDED, "1"),))
            try:
                return await answer_of(asked)
            except (Unavailable, DeadlineExceeded) as error:
                self._unanswered(target, error)
                return None

    def _target(self, context: Any) -> str | None:
        """Returns the address of the registry that is to serve a call, None: this one."""
        is_forwarded = any(name == FORWARDED for name, _ in context.invocation_metadata() or ())
        return self._standing.target(time.monotonic(), is_forwarded=is_forwarded)

    def _unanswered(self, target: str, error: Exception) -> None:
        log.warning("coordinator of storage agents does not answer", address=target, error=str(error))
        self._standing.unanswered(time.monotonic())
        self._look_now.set()

    async def _carry(
        self,
        welcome: pb.SessionResponse,
        stream: Any,
        requests: AsyncIterator[pb.SessionRequest],
        outgoing: StreamRequests[pb.SessionRequest],
        context: Any,
    ) -> None:
        moved = self._moved
        try:
            async with task_scope() as group:
                group.create_task(_forward(requests, outgoing), name="forward session")
                group.create_task(_end_when(moved), name="watch coordinator")
                response: pb.SessionResponse | None = welcome
                while response is not None:
                    async with asyncio.timeout(_WRITE_SECONDS):
                        await context.write(response)
                    response = await _read(stream)
        except TimeoutError as error:
            raise Unavailable("the agent does not read what it is told", reason="OUTBOX_FULL") from error
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None


async def _forward(requests: AsyncIterator[pb.SessionRequest], outgoing: StreamRequests[pb.SessionRequest]) -> None:
    async for message in requests:
        if not outgoing.put(message):
            raise Unavailable("the coordinator does not read what it is told", reason="OUTBOX_FULL")
    outgoing.finish()


async def _end_when(moved: asyncio.Event) -> None:
    await moved.wait()
    raise Draining("another registry brings the storage agents together now")


async def _read(stream: Any) -> pb.SessionResponse | None:
    """Returns the coordinator's next message, None at the end."""
    response = await answer_of(stream.read())
    return response if isinstance(response, pb.SessionResponse) else None
