"""Two whole proxies with real servers and mTLS, one lease: what a client of either sees."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import replacement_service_pb2 as replacement_pb
from helios.api.fleet.v1.replacement_service_pb2_grpc import ReplacementServiceStub
from helios.api.registry.v1 import lease_service_pb2 as lease_pb
from helios.api.registry.v1.key_service_pb2_grpc import add_KeyServiceServicer_to_server
from helios.api.registry.v1.lease_service_pb2_grpc import LeaseServiceServicer, add_LeaseServiceServicer_to_server
from helios.api.registry.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.errors import Conflict, NotFound
from helios.mesh.server import MeshServer, ServerOptions
from helios.proxy.settings import PeerSettings
from helios.registry.client import KeySpec
from helios.registry.database import Database
from helios.registry.keys.keys import Keys
from helios.registry.keys.servicer import KeyServicer
from helios.registry.keys.store import KeyStore
from tests.proxy.fakes import READY, FakeEnvoy, FakeWorker, until
from tests.proxy.harness import KEY_SERVICE, REGISTRY_SERVICE, Proxy, World

LEASE_SERVICE = "helios.api.registry.v1.LeaseService"


@dataclass
class FakeLeases(LeaseServiceServicer):
    """One lease, which lasts until it is released or taken away."""

    holder: str = ""
    address: str = ""
    epoch: int = 0

    async def AcquireLease(self, request: lease_pb.AcquireLeaseRequest, context: Any) -> lease_pb.AcquireLeaseResponse:
        is_granted = self.holder in ("", request.holder)
        if is_granted:
            self.holder, self.address = request.holder, request.address
            self.epoch = max(self.epoch, request.seen_epoch) + 1
        return lease_pb.AcquireLeaseResponse(granted=is_granted, lease=self._lease())

    async def RenewLease(self, request: lease_pb.RenewLeaseRequest, context: Any) -> lease_pb.RenewLeaseResponse:
        if (self.holder, self.epoch) != (request.holder, request.epoch):
            raise Conflict("lost", reason="LEASE_LOST", metadata={"holder": self.holder})
        return lease_pb.RenewLeaseResponse(lease=self._lease())

    async def ReleaseLease(self, request: lease_pb.ReleaseLeaseRequest, context: Any) -> lease_pb.ReleaseLeaseResponse:
        if (self.holder, self.epoch) == (request.holder, request.epoch):
            self.holder = self.address = ""
        return lease_pb.ReleaseLeaseResponse(lease=self._lease())

    async def ListLeases(self, request: lease_pb.ListLeasesRequest, context: Any) -> lease_pb.ListLeasesResponse:
        return lease_pb.ListLeasesResponse(leases=[self._lease()])

    def _lease(self) -> lease_pb.Lease:
        lease = lease_pb.Lease(name="proxy-leader", epoch=self.epoch, holder=self.holder, address=self.address)
        lease.expires_in.FromSeconds(1)
        return lease


@dataclass
class TwinWorker(FakeWorker):
    """One end of a worker that has dialled several proxies: they share what they hold."""

    twins: list[FakeWorker] = field(default_factory=list)

    def say(self, **message: Any) -> None:
        """Everybody is told everything but acks."""
        super().say(**message)
        if "replica_event" in message or "load" in message:
            for twin in self.twins:
                twin._outbox.put_nowait(fleet_pb.SessionRequest(**message))


@dataclass
class Mesh:
    """Two proxies with all around them."""

    leases: FakeLeases
    proxies: dict[str, Proxy] = field(default_factory=dict)
    envoys: dict[str, FakeEnvoy] = field(default_factory=dict)
    workers: dict[str, TwinWorker] = field(default_factory=dict)
    stops: dict[str, AsyncExitStack] = field(default_factory=dict)

    @property
    def starts(self) -> list[fleet_pb.StartReplica]:
        return [start for worker in self.workers.values() for start in worker.starts]


@asynccontextmanager
async def two_proxies(world: World, keys: Keys | None = None) -> AsyncIterator[Mesh]:
    """Proxies p1, which leads, and p2, with one worker that has dialled both."""
    mesh = Mesh(FakeLeases())
    server = MeshServer(
        listen=f"unix:{world.directory}/registry.sock",
        identity=world.identity("registry"),
        policy={name: frozenset({"proxy"}) for name in (LEASE_SERVICE, KEY_SERVICE, REGISTRY_SERVICE)},
        options=ServerOptions(drain_seconds=0.1),
    )
    add_RegistryServiceServicer_to_server(world.registry, server.grpc)
    add_LeaseServiceServicer_to_server(mesh.leases, server.grpc)
    if keys is not None:
        add_KeyServiceServicer_to_server(KeyServicer(keys), server.grpc)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(server)
        world.registry_target = server.address
        for name in ("p1", "p2"):
            own = mesh.stops[name] = await stack.enter_async_context(AsyncExitStack())
            proxy = mesh.proxies[name] = await own.enter_async_context(
                world.running_proxy(
                    proxy_id=name,
                    state_directory=world.directory / name,
                    picker_listen=f"unix:{world.directory}/{name}-picker.sock",
                    control_listen=f"unix:{world.directory}/{name}-control.sock",
                    peers=PeerSettings(lease=True, ttl_seconds=2),
                )
            )
            await until(lambda: mesh.leases.holder == "p1", seconds=20)
            mesh.envoys[name] = await own.enter_async_context(world.envoy(proxy))
            worker = mesh.workers[name] = TwinWorker()
            if name == "p2":
                worker.replicas = mesh.workers["p1"].replicas
            await own.enter_async_context(world.worker(proxy, worker))
        first, second = mesh.workers.values()
        first.twins, second.twins = [second], [first]
        yield mesh


async def test_a_request_at_a_follower_is_started_by_the_leader(world: World) -> None:
    world.registry.put("m")
    async with two_proxies(world) as mesh:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(envoy.ask(timeout=30)) for envoy in mesh.envoys.values()]
        answers = [task.result() for task in asked]
        assert [answer.status for answer in answers] == [200, 200]
        assert len({answer.endpoint for answer in answers}) == 1
        assert [start.model for start in mesh.starts] == ["m"]
        assert not mesh.workers["p2"].starts


async def test_a_failed_start_is_told_by_a_follower(world: World) -> None:
    world.registry.put("m")
    async with two_proxies(world) as mesh:
        mesh.workers["p1"].fail = "ENGINE_DIED"
        answer = await mesh.envoys["p2"].ask(timeout=30)
        assert answer.status == 503
        assert "ENGINE_DIED" in answer.body
        assert "retry-after" in answer.headers


async def test_the_follower_leads_when_the_leader_stops(world: World) -> None:
    world.registry.put("m")
    async with two_proxies(world) as mesh:
        mesh.workers["p2"].twins = []
        await mesh.stops["p1"].aclose()
        answer = await mesh.envoys["p2"].ask(timeout=30)
        assert answer.status == 200
        assert mesh.leases.holder == "p2"
        assert [start.model for start in mesh.workers["p2"].starts] == ["m"]


async def test_a_picker_process_knows_what_workers_say_to_its_proxy(world: World) -> None:
    world.registry.put("m")
    async with two_proxies(world) as mesh, AsyncExitStack() as stack:
        picker = await stack.enter_async_context(
            world.running_proxy(
                proxy_id="p3",
                state_directory=world.directory / "p3",
                picker_listen=f"unix:{world.directory}/p3-picker.sock",
                control_listen=f"unix:{world.directory}/p3-control.sock",
                feed_target=mesh.proxies["p2"].control_address,
            )
        )
        envoy = await stack.enter_async_context(world.envoy(picker))
        # Held there, started by the leader, known by the worker's word to p2.
        answer = await envoy.ask(timeout=30)
        assert answer.status == 200
        assert [start.model for start in mesh.workers["p1"].starts] == ["m"]
        # What changes later is told, too.
        (replica_id,) = mesh.workers["p1"].replicas
        mesh.workers["p1"].change(replica_id, state=READY, address="127.0.0.1:19999")

        async def moved() -> bool:
            return (await envoy.ask(timeout=30)).endpoint == "127.0.0.1:19999"

        async with asyncio.timeout(20):
            while not await moved():
                await asyncio.sleep(0.02)


async def test_an_operator_s_call_reaches_the_leader_through_any_proxy(world: World) -> None:
    world.registry.put("m")
    async with two_proxies(world) as mesh, world.admin(mesh.proxies["p2"]) as (admin, models):
        (replica,) = await admin.preload("m")
        assert [start.replica_id for start in mesh.workers["p1"].starts] == [replica.replica_id]
        answer = await mesh.envoys["p1"].ask(timeout=30, headers={"x-request-id": "asked-of-p1"})
        assert answer.status == 200
        # Only the proxy that picked it knows of it.
        assert (await admin.explain("asked-of-p1")).summary.request_id == "asked-of-p1"
        # What the relay tells the other one of it, too.
        move = replacement_pb.NoteMoveRequest(request_id="asked-of-p1", left_endpoint=answer.endpoint, token_count=3)
        relay = world.identity("relay")
        async with Dialer(mesh.proxies["p2"].control_address, identity=relay, peer="proxy") as dialer:
            assert (await dialer.stub(ReplacementServiceStub).NoteMove(move, timeout=20)).is_noted
            move.request_id = "never"
            assert not (await dialer.stub(ReplacementServiceStub).NoteMove(move, timeout=20)).is_noted
        assert [one.left for one in (await admin.explain("asked-of-p1")).moves] == [replica.replica_id]
        (listed,) = await admin.list_requests()
        assert listed.request_id == "asked-of-p1"
        assert (await models.get_model("m")).replicas.ready == 1
        with pytest.raises(NotFound):
            await admin.explain("never")
        assert await admin.evict("m") == 1
        await until(lambda: not mesh.workers["p1"].replicas, seconds=20)


async def test_a_key_has_one_limit_at_all_proxies(world: World) -> None:
    world.registry.put("m")
    database = await Database.open(world.directory / "keys.db")
    keys = Keys(KeyStore(database))
    try:
        async with two_proxies(world, keys) as mesh:
            _, secret = await keys.create(KeySpec("web", requests_per_minute=6), "test")
            headers = {"authorization": f"Bearer {secret}"}

            async def ask(name: str) -> int:
                status = 401
                while status in (401, 503):
                    # The proxy has not been told of the key yet, or of any.
                    status = (await mesh.envoys[name].ask(headers=headers, timeout=30)).status
                return status

            began = time.monotonic()
            async with asyncio.timeout(30):
                statuses = [await ask(name) for name in ("p2", "p1", "p2", "p2", "p1", "p2", "p1", "p2", "p1", "p2")]
            assert set(statuses) <= {200, 429}
            assert 6 <= statuses.count(200) <= 6 + (time.monotonic() - began) / 10
            keys.close()
    finally:
        await database.close()
