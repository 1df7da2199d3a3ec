"""SyncService: one session a storage agent.

A session reads and writes at the same time, so it has two tasks. With it ends all that its agent said, and nothing is
lost: the agent's next hello is followed by everything it has.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any, Final, Protocol, TypeVar

import grpc.aio
import structlog

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.api.registry.v1.sync_service_pb2_grpc import SyncServiceServicer, SyncServiceStub
from helios.mesh.errors import Conflict, Draining, HeliosError, InvalidRequest, Unavailable
from helios.mesh.tasks import task_scope
from helios.registry import access
from helios.registry.sync import wire
from helios.registry.sync.cluster import Agent, AgentView, Cluster
from helios.registry.sync.outbox import Outbox
from helios.registry.sync.settings import SyncSettings

log = structlog.get_logger()

_HELLO_SECONDS: Final = 10.0
"""An agent that dials and says nothing is none."""

_SILENT_INTERVALS: Final = 5
"""Heartbeats that may be missing: one is late where a machine is busy, five are a process that was stopped."""

_NODE_EXCLUSIONS: Final = 1_024


S = TypeVar("S")


class Coordinator(Protocol):
    """The way to the one registry of several that brings agents together."""

    async def pass_on(self, first: pb.SessionRequest, requests: AsyncIterator[pb.SessionRequest], context: Any) -> bool:
        """Has it serve a session, to its end; returns False where that is to be served here."""
        ...

    async def ask(
        self, context: Any, stub_class: Callable[[grpc.aio.Channel], S], call: Callable[[S], Any], request: Any
    ) -> Any:
        """Returns its answer to a call, None where that is to be answered here."""
        ...


class SyncServicer(SyncServiceServicer):
    """Takes agents in."""

    def __init__(self, settings: SyncSettings | None = None) -> None:
        self.relay: Coordinator = _NoOther()
        """The way to the registry that brings the agents together, where that is another one."""
        self._settings = settings or SyncSettings()
        self._silence_seconds = _SILENT_INTERVALS * self._settings.heartbeat_seconds
        self._outboxes: dict[str, Outbox] = {}
        self._is_closed = False
        self.cluster = Cluster(claim_seconds=self._settings.claim_seconds)
        self.on_prefetch_report: Callable[[str, pb.PrefetchReport], None] = lambda node, report: None
        """Takes what agents say of prefetches, with the name of their node."""

    async def ListAgents(self, request: pb.ListAgentsRequest, context: Any) -> pb.ListAgentsResponse:
        """Lists the agents that are connected."""
        answer: pb.ListAgentsResponse | None = await self.relay.ask(
            context, SyncServiceStub, lambda stub: stub.ListAgents, request
        )
        return answer or pb.ListAgentsResponse(agents=map(wire.agent_to_proto, self.cluster.agents()))

    # A coroutine that writes to the context, and not an async generator as the generated type has it: a generator that
    # is dropped half-way is closed by the garbage collector, in whatever task that happens to run.
    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Any
    ) -> None:
        """Serves one agent until its stream ends or a newer stream of the same node takes over."""
        access.check_is_agent(context)
        hello = await self._hello(request_iterator)
        agent = wire.agent_from_proto(hello.hello)
        if await self.relay.pass_on(hello, request_iterator, context):
            return
        outbox = self._connect(agent)
        try:
            outbox.put(pb.SessionResponse(welcome=self._welcome()))
            log.info("storage agent connected", node=agent.node, address=agent.address)
            async with task_scope() as group:
                group.create_task(self._read_until_end(request_iterator, agent.node, outbox), name=f"read {agent.node}")
                await self._write(outbox, agent.node, context)
        finally:
            self._disconnect(agent.node, outbox)

    def agents(self) -> list[AgentView]:
        """The agents that are connected, by node."""
        return self.cluster.agents()

    def holds(self, node: str, revision: str) -> bool:
        """Whether an agent says that it has a revision."""
        return self.cluster.holds(node, revision)

    def post(self, node: str, message: pb.SessionResponse) -> bool:
        """Sends an agent a message; returns whether it is connected."""
        outbox = self._outboxes.get(node)
        if outbox is not None:
            outbox.put(message)
        return outbox is not None

    def send_away(self) -> None:
        """Ends all sessions that are served here; agents come back by themselves."""
        for outbox in self._outboxes.values():
            outbox.end(_draining())

    def close(self) -> None:
        """Ends all sessions, and takes no more."""
        self._is_closed = True
        self.send_away()

    def _connect(self, agent: Agent) -> Outbox:
        if self._is_closed:
            # Its hello was on its way while the others were ended; it would hold up the stop.
            raise _draining()
        if (older := self._outboxes.get(agent.node)) is not None:
            older.end(Conflict("a newer stream of the same node has taken over", reason="TAKEN_OVER"))
        self._outboxes[agent.node] = outbox = Outbox()
        self.cluster.join(agent)
        self._publish()
        return outbox

    def _disconnect(self, node: str, outbox: Outbox) -> None:
        if self._outboxes.get(node) is outbox:
            del self._outboxes[node]
            self.cluster.leave(node)
            self._publish()
            log.info("storage agent disconnected", node=node)

    def _welcome(self) -> pb.SyncWelcome:
        welcome = pb.SyncWelcome()
        welcome.heartbeat_interval.FromTimedelta(timedelta(seconds=self._settings.heartbeat_seconds))
        welcome.claim_ttl.FromTimedelta(timedelta(seconds=self._settings.claim_seconds))
        return welcome

    async def _hello(self, requests: AsyncIterator[pb.SessionRequest]) -> pb.SessionRequest:
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                first = await anext(requests, None)
        except TimeoutError:
            first = None
        if first is None or first.WhichOneof("message") != "hello":
            raise InvalidRequest("the first message of a session must be a hello", reason="HELLO_EXPECTED")
        return first

    async def _read_until_end(self, requests: AsyncIterator[pb.SessionRequest], node: str, outbox: Outbox) -> None:
        try:
            await self._read(requests, node, outbox)
        except HeliosError as error:
            outbox.end(error)
        else:
            outbox.end()

    async def _read(self, requests: AsyncIterator[pb.SessionRequest], node: str, outbox: Outbox) -> None:
        while True:
            try:
                async with asyncio.timeout(self._silence_seconds):
                    message = await anext(requests, None)
            except TimeoutError:
                raise Unavailable("the agent was silent for too long", reason="SESSION_SILENT") from None
            if message is None:
                return
            if self._outboxes.get(node) is outbox:
                self._take(message, node, outbox)
                self._publish()

    async def _write(self, outbox: Outbox, node: str, context: Any) -> None:
        while True:
            try:
                async with asyncio.timeout(self._settings.heartbeat_seconds):
                    await outbox.wait()
            except TimeoutError:
                await self._tell(context, pb.SessionResponse(heartbeat=pb.SyncHeartbeat()))
                continue
            if outbox.is_ended:
                return
            messages, blobs = outbox.take()
            for message in messages:
                await self._tell(context, message)
            for hash_ in blobs:
                holders = map(wire.holder_to_proto, self.cluster.holders(node, hash_))
                await self._tell(context, pb.SessionResponse(holders=pb.BlobHolders(hash=hash_, holders=holders)))

    async def _tell(self, context: Any, message: pb.SessionResponse) -> None:
        try:
            async with asyncio.timeout(self._silence_seconds):
                await context.write(message)
        except TimeoutError:
            raise Unavailable("the agent does not read what it is told", reason="OUTBOX_FULL") from None

    def _take(self, message: pb.SessionRequest, node: str, outbox: Outbox) -> None:
        match message.WhichOneof("message"):
            case "inventory":
                self._take_inventory(message.inventory, node, outbox)
            case "want":
                want = message.want
                self.cluster.want(node, wire.hash_from_proto(want.hash), wire.spans_from_proto(want.held))
                outbox.tell_holders(want.hash)
            case "unwant":
                hash_ = wire.hash_from_proto(message.unwant.hash)
                self.cluster.unwant(node, hash_, is_whole=message.unwant.is_whole)
            case "claim":
                self._claim(message.claim, node, outbox)
            case "claims_ended":
                ended = message.claims_ended
                self.cluster.end_claims(
                    node,
                    wire.hash_from_proto(ended.hash),
                    done=wire.spans_from_proto(ended.done),
                    given_up=wire.spans_from_proto(ended.given_up),
                )
            case "prefetch_report":
                self.on_prefetch_report(node, message.prefetch_report)
            case "hello":
                raise InvalidRequest("a session has one hello", reason="HELLO_EXPECTED")
            case _:
                # A heartbeat, or what a newer agent says.
                pass

    def _take_inventory(self, inventory: pb.Inventory, node: str, outbox: Outbox) -> None:
        wire.check_inventory(inventory)
        self.cluster.hold(
            node,
            blobs=inventory.blobs,
            gone_blobs=inventory.gone_blobs,
            revisions=inventory.revisions,
            gone_revisions=inventory.gone_revisions,
        )
        outbox.put(pb.SessionResponse(inventory_ack=pb.InventoryAck(sequence=inventory.sequence)))

    def _claim(self, claim: pb.ClaimRequest, node: str, outbox: Outbox) -> None:
        granted = self.cluster.claim(
            node,
            wire.hash_from_proto(claim.hash),
            wire.spans_from_proto(claim.spans, limit=wire.MAX_SPANS),
            limit=claim.limit,
            excluded=frozenset(claim.excluded_nodes[:_NODE_EXCLUSIONS]),
            now=time.monotonic(),
        )
        result = pb.ClaimResult(
            request_id=claim.request_id,
            granted=wire.spans_to_proto(granted.spans),
            holders=map(wire.holder_to_proto, granted.holders),
        )
        outbox.put(pb.SessionResponse(claim_result=result))

    def _publish(self) -> None:
        for node, hash_ in self.cluster.take_news():
            self._outboxes[node].tell_holders(hash_)


class _NoOther:
    """There is one registry."""

    async def pass_on(self, first: pb.SessionRequest, requests: AsyncIterator[pb.SessionRequest], context: Any) -> bool:
        """Serves it here."""
        del first, requests, context
        return False

    async def ask(self, context: Any, stub_class: Any, call: Any, request: Any) -> None:
        """Answers it here."""
        del context, stub_class, call, request


def _draining() -> Draining:
    return Draining("the registry stops, or another one brings the agents together now")
