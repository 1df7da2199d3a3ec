"""The session between agents and a registry: real sockets and mTLS, the registry's own servicer."""

import asyncio
import io
import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc.aio
import pytest
from rich.console import Console

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.api.registry.v1.sync_service_pb2_grpc import SyncServiceStub, add_SyncServiceServicer_to_server
from helios.cli.nodes import node_table
from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.requests import StreamRequests
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.status import error_from_rpc
from helios.mesh.tasks import task_scope
from helios.mesh.transfer.spans import Span
from helios.registry.access import SYNC_SERVICE
from helios.registry.client import SyncClient
from helios.registry.sync.servicer import SyncServicer
from helios.registry.sync.settings import SyncSettings
from helios.storage.sync.holdings import Holdings
from helios.storage.sync.session import ClaimAnswer, Peer, SyncSession

WAIT_SECONDS = 30.0
HASH, OTHER = "a" * 64, "b" * 64
Stream = grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]
ADDRESSES = {"one": "127.0.0.1:1", "two": "127.0.0.1:2"}


async def wait_until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not condition():
            await asyncio.sleep(0.01)


@dataclass
class Fetch:
    """An interest that remembers whom it met."""

    hash: str = HASH
    size_bytes: int = 100
    spans: list[Span] = field(default_factory=list)
    peers: Sequence[Peer] | None = None

    def held(self) -> list[Span]:
        return self.spans

    def meet(self, peers: Sequence[Peer]) -> None:
        self.peers = peers


@dataclass
class Registry:
    """A registry that can be restarted at the same address."""

    pki: Path
    authority: CertificateAuthority
    settings: SyncSettings
    address: str = "127.0.0.1:0"
    servicer: SyncServicer = field(default_factory=SyncServicer)

    def identity(self, component: str) -> IdentityFiles:
        directory = self.pki / component
        return IdentityFiles(directory) if directory.exists() else self.authority.issue(component, directory)

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[None]:
        self.servicer = SyncServicer(self.settings)
        policy = {SYNC_SERVICE: frozenset({"storage", "admin-edge"})}
        server = MeshServer(
            listen=self.address,
            identity=self.identity("registry"),
            policy=policy,
            options=ServerOptions(drain_seconds=5.0),
        )
        add_SyncServiceServicer_to_server(self.servicer, server.grpc)
        async with server:
            self.address = server.address
            try:
                yield
            finally:
                self.servicer.close()

    @asynccontextmanager
    async def session(self, node: str, here: Callable[[], Holdings] = Holdings) -> AsyncIterator[SyncSession]:
        async with (
            Dialer(self.address, identity=self.identity("storage"), peer="registry") as dialer,
            task_scope() as group,
        ):
            session = SyncSession(dialer, node=node, holdings=here, patience_seconds=1.0)
            group.create_task(session.run(ADDRESSES[node]), name=f"session {node}")
            yield session

    def counts(self) -> dict[str, tuple[int, int]]:
        return {view.agent.node: (view.blob_count, view.revision_count) for view in self.servicer.cluster.agents()}


def hello(node: str, address: str = "") -> pb.SessionRequest:
    return pb.SessionRequest(hello=pb.AgentHello(node=node, address=address))


@asynccontextmanager
async def open_stream(dialer: Dialer, first: pb.SessionRequest, *messages: pb.SessionRequest) -> AsyncIterator[Stream]:
    """Says these messages and no more, and leaves the stream open."""
    requests = StreamRequests(first, *messages, max_count=1)
    try:
        yield dialer.stub(SyncServiceStub).Session(requests, timeout=WAIT_SECONDS)
    finally:
        requests.close()


async def end_of(stream: Stream) -> str:
    """The reason that a stream ends with."""
    try:
        while await stream.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error).reason
    return ""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "pki", CertificateAuthority.open(tmp_path / "ca"), SyncSettings())


async def test_what_a_node_holds_is_known_and_known_again_after_a_restart_of_the_registry(registry: Registry) -> None:
    here = Holdings(frozenset(f"{number:064x}" for number in range(2_500)), frozenset({f"sha256:{HASH}"}))
    async with AsyncExitStack() as stack:
        async with registry.serve():
            await stack.enter_async_context(registry.session("one", lambda: here))
            await wait_until(lambda: registry.counts() == {"one": (2_500, 1)})
            here = Holdings(frozenset({HASH}))
            await wait_until(lambda: registry.counts() == {"one": (1, 0)})
        async with registry.serve():
            await wait_until(lambda: registry.counts() == {"one": (1, 0)})
        await stack.aclose()


async def test_agents_meet_and_one_of_them_reads_from_the_cloud(registry: Registry) -> None:
    async with registry.serve(), registry.session("one") as one, registry.session("two") as two:
        await wait_until(lambda: one.is_connected and two.is_connected)
        first, second = Fetch(), Fetch()
        one.want(first)
        two.want(second)
        await wait_until(lambda: second.peers == [Peer("one", ADDRESSES["one"], is_whole=False)])
        await wait_until(lambda: first.peers == [Peer("two", ADDRESSES["two"], is_whole=False)])
        assert await one.claim(HASH, [(0, 50), (50, 100)], limit=1) == ClaimAnswer(((0, 50),))
        answer = await two.claim(HASH, [(0, 50), (50, 100)], limit=2)
        assert answer == ClaimAnswer(((50, 100),), (Peer("one", ADDRESSES["one"], is_whole=False),))
        one.end_claims(HASH, done=[(0, 50)])
        two.end_claims(HASH, given_up=[(50, 100)])
        await wait_until(lambda: registry.servicer.cluster.take_news() == set())
        answer = await two.claim(HASH, [(0, 50)], limit=2, excluded=["one"])
        assert answer is not None
        assert answer.granted == ((0, 50),), "whom it can't read from is no help to it"
        one.unwant(first, is_whole=True)
        await wait_until(lambda: second.peers == [Peer("one", ADDRESSES["one"], is_whole=True)])


async def test_the_claims_of_a_node_that_is_gone_are_free(registry: Registry) -> None:
    async with registry.serve(), registry.session("two") as two:
        second = Fetch()
        async with registry.session("one") as one:
            await wait_until(lambda: one.is_connected and two.is_connected)
            one.want(Fetch())
            two.want(second)
            assert await one.claim(HASH, [(0, 100)], limit=1) == ClaimAnswer(((0, 100),))
            answer = await two.claim(HASH, [(0, 100)], limit=1)
            assert answer is not None
            assert not answer.granted
        await wait_until(lambda: second.peers == [])
        assert await two.claim(HASH, [(0, 100)], limit=1) == ClaimAnswer(((0, 100),))


async def test_a_node_without_a_registry_reads_for_itself(registry: Registry) -> None:
    async with AsyncExitStack() as stack:
        async with registry.serve():
            one = await stack.enter_async_context(registry.session("one"))
            await wait_until(lambda: one.is_connected)
            fetch = Fetch(spans=[(0, 10)])
            one.want(fetch)
        await wait_until(lambda: not one.is_connected)
        async with asyncio.timeout(WAIT_SECONDS):
            assert await one.claim(HASH, [(0, 100)], limit=1) is None
        async with registry.serve():
            await wait_until(lambda: one.is_connected)
            await wait_until(lambda: [view.wanted for view in registry.servicer.cluster.agents()] == [(HASH,)])
            assert await one.claim(HASH, [(0, 100)], limit=1) == ClaimAnswer(((0, 100),))
        await stack.aclose()


async def test_a_newer_stream_of_a_node_takes_over(registry: Registry) -> None:
    async with (
        registry.serve(),
        Dialer(registry.address, identity=registry.identity("storage"), peer="registry") as dialer,
        open_stream(dialer, hello("one", "127.0.0.1:1")) as older,
    ):
        assert isinstance(await older.read(), pb.SessionResponse)
        async with open_stream(dialer, hello("one", "127.0.0.1:2")) as newer:
            assert isinstance(await newer.read(), pb.SessionResponse)
            assert await end_of(older) == "TAKEN_OVER"
            assert [view.agent.address for view in registry.servicer.cluster.agents()] == ["127.0.0.1:2"]


async def test_an_agent_that_falls_silent_is_forgotten(registry: Registry) -> None:
    registry.settings = SyncSettings(heartbeat_seconds=0.3)
    async with (
        registry.serve(),
        Dialer(registry.address, identity=registry.identity("storage"), peer="registry") as dialer,
    ):
        # A test's stream says nothing by itself: no welcome was heard, so there are no heartbeats.
        async with open_stream(dialer, hello("one")) as stream:
            assert await end_of(stream) == "SESSION_SILENT"
        assert registry.counts() == {}


async def test_only_agents_speak_for_nodes_and_people_look(registry: Registry) -> None:
    async with (
        registry.serve(),
        registry.session("one") as one,
        Dialer(registry.address, identity=registry.identity("admin-edge"), peer="registry") as dialer,
    ):
        await wait_until(lambda: one.is_connected)
        one.want(Fetch())
        await wait_until(lambda: registry.servicer.cluster.agents()[0].wanted)
        (agent,) = await SyncClient(dialer).list_agents()
        assert (agent.node, agent.address, agent.wanted_blobs) == ("one", ADDRESSES["one"], (HASH,))
        screen = io.StringIO()
        Console(file=screen, width=120).print(node_table([agent, replace(agent, node="two", address="")]))
        assert re.search(r"one +127.0.0.1:1 .* 0 +0 +1 *\n *two +not reached by others", screen.getvalue())
        async with open_stream(dialer, hello("two")) as stream:
            assert await end_of(stream) == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (pb.SessionRequest(hello=pb.AgentHello(node="one")), "HELLO_EXPECTED"),
        (pb.SessionRequest(want=pb.BlobWant(hash="A" * 64)), "INVALID_DIGEST"),
        (pb.SessionRequest(want=pb.BlobWant(hash=HASH, held=[pb.Span(offset=1)])), "INVALID_RANGE"),
        (pb.SessionRequest(inventory=pb.Inventory(blobs=[HASH] * 1_001)), "TOO_MANY_BLOBS"),
        (pb.SessionRequest(claim=pb.ClaimRequest(hash=HASH, spans=[pb.Span(length=1)] * 257)), "INVALID_RANGE"),
    ],
)
async def test_nonsense_ends_a_session(registry: Registry, message: pb.SessionRequest, reason: str) -> None:
    async with (
        registry.serve(),
        Dialer(registry.address, identity=registry.identity("storage"), peer="registry") as dialer,
        open_stream(dialer, hello("one"), message) as stream,
    ):
        assert await end_of(stream) == reason
