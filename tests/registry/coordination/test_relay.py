"""Registries that pass agents' sessions on to one of them, over mTLS: agents and people see nothing of it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc.aio
import pytest

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.api.registry.v1.sync_service_pb2_grpc import SyncServiceStub, add_SyncServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.requests import StreamRequests
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.status import error_from_rpc
from helios.registry.access import POLICY, SYNC_SERVICE
from helios.registry.client import SyncClient
from helios.registry.coordination.relay import Relay
from helios.registry.coordination.seats import Seats
from helios.registry.coordination.standing import Seat
from helios.registry.sync.servicer import SyncServicer
from tests.ports import free_port

WAIT_SECONDS = 30.0
HASH = "a" * 64


class SetSeats:
    """Says whose the seat is as the test has set it."""

    def __init__(self) -> None:
        self.seat = Seat(is_mine=False, address="", epoch=0)

    async def take(self) -> Seat:
        return self.seat

    async def give_up(self) -> None:
        """Nobody asks."""


@dataclass
class Registry:
    """One of them, looking when it is told to."""

    seats: SetSeats
    relay: Relay
    sync: SyncServicer
    address: str
    dialer: Dialer

    async def see(self, address: str, epoch: int = 1) -> None:
        """Has the database say who the coordinator is."""
        self.seats.seat = Seat(is_mine=address == self.address, address=address, epoch=epoch)
        await self.relay.look()

    def nodes(self) -> list[str]:
        """The agents that it serves by itself."""
        return [view.agent.node for view in self.sync.cluster.agents()]

    async def listed(self) -> list[str]:
        """The agents that people are told of."""
        return [agent.node for agent in await SyncClient(self.dialer).list_agents()]


@dataclass(frozen=True)
class Mesh:
    """Certificates of one mesh."""

    directory: Path

    def identity(self, component: str) -> IdentityFiles:
        """Returns a component's, made on first use."""
        files = IdentityFiles(self.directory / component)
        if files.certificate.exists():
            return files
        return CertificateAuthority.open(self.directory / "ca").issue(component, self.directory / component)

    def registry(self) -> AbstractAsyncContextManager[Registry]:
        """Runs a registry in this process."""
        return registry(self)


@pytest.fixture
def mesh(tmp_path: Path) -> Mesh:
    return Mesh(tmp_path)


@asynccontextmanager
async def registry(mesh: Mesh) -> AsyncIterator[Registry]:
    sync, seats = SyncServicer(), SetSeats()
    own = mesh.identity("registry")
    relay = Relay(cast(Seats, seats), identity=own, look_seconds=60.0, on_moved=sync.send_away)
    sync.relay = relay
    policy = {SYNC_SERVICE: POLICY[SYNC_SERVICE]}
    server = MeshServer(listen="127.0.0.1:0", identity=own, policy=policy, options=ServerOptions(drain_seconds=1.0))
    add_SyncServiceServicer_to_server(sync, server.grpc)
    server.serve(SYNC_SERVICE)
    async with server, Dialer(server.address, identity=mesh.identity("storage"), peer="registry") as dialer:
        try:
            yield Registry(seats, relay, sync, server.address, dialer)
        finally:
            sync.close()


class Agent:
    """A session, message by message."""

    def __init__(self, dialer: Dialer, node: str) -> None:
        hello = pb.SessionRequest(hello=pb.AgentHello(node=node, address=f"{node}:1"))
        self.requests = StreamRequests(hello, max_count=100)
        self._call = dialer.stub(SyncServiceStub).Session(self.requests)

    async def expect(self, kind: str) -> pb.SessionResponse:
        """The next message of a kind; heartbeats and news are passed over."""
        async with asyncio.timeout(WAIT_SECONDS):
            while True:
                response = await self._call.read()
                assert isinstance(response, pb.SessionResponse), "the session goes on"
                if response.WhichOneof("message") == kind:
                    return response

    async def end(self) -> str:
        """The reason that the session ends with."""
        async with asyncio.timeout(WAIT_SECONDS):
            try:
                while await self._call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError as error:
                return error_from_rpc(error).reason
        return ""

    async def claim(self, *starts: int) -> list[int]:
        """Claims spans of ten bytes; returns where those begin that were granted."""
        spans = [pb.Span(offset=start, length=10) for start in starts]
        self.requests.put(pb.SessionRequest(claim=pb.ClaimRequest(request_id=1, hash=HASH, spans=spans, limit=9)))
        return [span.offset for span in (await self.expect("claim_result")).claim_result.granted]


@asynccontextmanager
async def agent(at: Registry, node: str) -> AsyncIterator[Agent]:
    it = Agent(at.dialer, node)
    try:
        yield it
    finally:
        it.requests.close()
        it._call.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


async def test_agents_of_two_registries_share_what_they_read(mesh: Mesh) -> None:
    async with mesh.registry() as one, mesh.registry() as two:
        for each in (one, two):
            await each.see(one.address)
        async with agent(one, "a") as first, agent(two, "b") as second:
            for it in (first, second):
                await it.expect("welcome")
                it.requests.put(pb.SessionRequest(want=pb.BlobWant(hash=HASH, size_bytes=30)))
                await it.expect("holders")
            assert await first.claim(0, 10) == [0, 10]
            assert await second.claim(0, 10, 20) == [20]
            assert (one.nodes(), two.nodes()) == (["a", "b"], [])
            assert await one.listed() == await two.listed() == ["a", "b"]
        await until(lambda: one.nodes() == [])


async def test_a_coordinator_that_does_not_answer_is_done_without(mesh: Mesh) -> None:
    async with mesh.registry() as one:
        await one.see(f"127.0.0.1:{free_port()}")
        async with agent(one, "a") as it:
            await it.expect("welcome")
            assert one.nodes() == await one.listed() == ["a"]
            # It looks again at once, and another registry has the seat by then.
            async with mesh.registry() as two:
                await two.see(two.address, epoch=2)
                await one.see(two.address, epoch=2)
                assert await it.end() == "DRAINING"
                async with agent(one, "a") as again:
                    await again.expect("welcome")
                    assert two.nodes() == await one.listed() == ["a"]


async def test_sessions_leave_for_the_new_coordinator(mesh: Mesh) -> None:
    async with mesh.registry() as one, mesh.registry() as two:
        for each in (one, two):
            await each.see(one.address)
        async with agent(one, "a") as first, agent(two, "b") as second:
            for it in (first, second):
                await it.expect("welcome")
            # The old one has not heard of it; whoever passes on has.
            await two.see(two.address, epoch=2)
            assert await second.end() == "DRAINING"
            async with agent(two, "b") as again:
                await again.expect("welcome")
                assert two.nodes() == ["b"]
            await one.see(two.address, epoch=2)
            assert await first.end() == "DRAINING"


async def test_who_is_taken_for_the_coordinator_and_is_not_says_so(mesh: Mesh) -> None:
    async with mesh.registry() as one, mesh.registry() as two:
        await one.see(two.address)
        await two.see(one.address)
        async with agent(one, "a") as it:
            await it.expect("welcome")
            assert (one.nodes(), two.nodes()) == (["a"], []), "it is not passed on for ever"


async def test_what_an_agent_did_wrong_is_told_to_it(mesh: Mesh) -> None:
    async with mesh.registry() as one, mesh.registry() as two:
        for each in (one, two):
            await each.see(one.address)
        async with agent(two, "a") as it:
            await it.expect("welcome")
            it.requests.put(pb.SessionRequest(want=pb.BlobWant(hash="no hash")))
            assert await it.end() == "INVALID_DIGEST"
