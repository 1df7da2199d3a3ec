"""The express lane with the real proxy and the real Envoy: requests that nobody picked are counted and explained, and
none is lost when their replica goes.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Mapping

import grpc
import grpc.aio
import httpx
import pytest

from helios.api.admin.v1 import admin_service_pb2 as admin_pb
from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceStub
from helios.api.fleet.v1 import fleet_service_pb2 as fleet_pb
from helios.api.fleet.v1 import types_pb2
from helios.mesh.channel import Dialer
from helios.proxy.settings import RoutingSettings
from tests.proxy.fakes import READY, until
from tests.proxy.harness import World
from tests.proxy.test_gateway import Edge, replica_server, running_edge
from tests.wire.fakes import FakeReplica

pytestmark = pytest.mark.leaks("Envoy keeps connections to servers of this process until it is gone")
QUICKLY = RoutingSettings(express_per_second=0.5)
# Generous: the lane opens some three seconds after a model was asked for first.
WAIT_SECONDS = 30.0
CHAT = "/v1/chat/completions"


async def explain(stub: AdminServiceStub, request_id: str) -> str:
    """How a request was routed, as `helios why` has it; of one that nobody picked, once its replica has told of it."""
    while True:
        try:
            return str(await stub.ExplainRequest(admin_pb.ExplainRequestRequest(request_id=request_id), timeout=10))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        await asyncio.sleep(0.02)


async def ask(edge: Edge, client: httpx.AsyncClient, text: str = "") -> str:
    """One request, which its replica, the one that calls itself by its address, reports; returns its id."""
    answer = await client.post(CHAT, json={"model": "m", "messages": [{"role": "user", "content": text}]})
    assert answer.status_code == 200, answer.text
    name, request_id = answer.json()["replica"], str(answer.headers["x-request-id"])
    replicas = edge.worker.replicas
    replica_id = next(key for key, replica in replicas.items() if len(replicas) == 1 or replica.address == name)
    delta = types_pb2.LoadDelta(replica_id=replica_id)
    delta.started.add(request_id=request_id)
    delta.finished.add(request_id=request_id).duration.FromMilliseconds(5)
    edge.worker.say(load=fleet_pb.LoadReport(deltas=[delta]))
    return request_id


async def test_requests_of_the_lane_are_explained_and_none_is_lost_in_a_drain(world: World) -> None:
    world.registry.put("m")
    async with running_edge(world, routing=QUICKLY) as edge, edge.client() as client:
        identity = world.identity("admin-edge")
        async with Dialer(edge.proxy.control_address, identity=identity, peer="proxy") as dialer:
            stub = dialer.stub(AdminServiceStub)
            async with asyncio.timeout(WAIT_SECONDS):
                while "express lane" not in await explain(stub, await ask(edge, client)):
                    await asyncio.sleep(0.05)
            # What a request says of its own urgency is the picker's to weigh.
            for body, headers in (({"service_tier": "flex"}, {}), ({}, {"x-service-tier": "flex"})):
                picked = await client.post("/v1/chat/completions", json={"model": "m"} | body, headers=headers)
                assert picked.headers["x-service-tier"] == "flex"
            assert "express lane" in await explain(stub, await ask(edge, client))
            # Drained while requests come: each is answered, by this replica or by the next one.
            async with asyncio.TaskGroup() as group:
                asked = [group.create_task(client.post("/v1/chat/completions", json={"model": "m"})) for _ in range(20)]
                await stub.EvictModel(admin_pb.EvictModelRequest(model="m"), timeout=10)
            assert {task.result().status_code for task in asked} == {200}
            assert (await client.post("/v1/chat/completions", json={"model": "m"})).status_code == 200


async def test_of_several_replicas_envoy_picks_explains_and_loses_nothing_in_a_drain(world: World) -> None:
    other = FakeReplica()
    async with (
        running_edge(world, routing=QUICKLY) as edge,
        replica_server(world, other) as address,
        edge.client() as client,
        Dialer(edge.proxy.control_address, identity=world.identity("admin-edge"), peer="proxy") as dialer,
    ):
        addresses = itertools.cycle((edge.worker.address(), address))
        edge.worker.address = lambda: next(addresses)
        edge.replica.name, other.name = next(addresses), next(addresses)
        world.registry.put("m", min_replicas=2)
        await until(lambda: [replica.state for replica in edge.worker.replicas.values()] == [READY, READY])

        stub = dialer.stub(AdminServiceStub)
        async with asyncio.timeout(WAIT_SECONDS):
            while "express lane" not in await explain(stub, await ask(edge, client)):
                await asyncio.sleep(0.05)
        # Both turns of a conversation meet one replica, although it was not idle.
        talks = [f"{number} is a number of some note. " * 40 for number in range(6)]
        before = {talk: await where(ask(edge, client, talk), other) for talk in talks[:3]}
        # The next ones go where less is done: what was sent lately does not count for long on a slow machine.
        taken = address if before[talks[0]] else edge.replica.name
        busy = next(key for key, replica in edge.worker.replicas.items() if replica.address == taken)
        load = types_pb2.ReplicaLoad(running_requests=5)
        edge.worker.say(load=fleet_pb.LoadReport(deltas=[types_pb2.LoadDelta(replica_id=busy, load=load)]))
        await asyncio.sleep(0.3)
        before |= {talk: await where(ask(edge, client, talk), other) for talk in talks[3:]}
        assert set(before.values()) == {True, False}
        assert {talk: await where(ask(edge, client, talk), other) for talk in reversed(talks)} == before
        request_id = await ask(edge, client, talks[0])
        async with asyncio.timeout(WAIT_SECONDS):
            while "the best of 2, by Envoy" not in (told := await explain(stub, request_id)):
                await asyncio.sleep(0.15)
                await ask(edge, client)
        assert "prefix 1.00" in told or "prefix 0.8" in told, told
        # One is drained while requests come: each is answered, and none is sent there once it has heard that it drains.
        by_address = {edge.replica.name: edge.replica, other.name: other}
        drained = Drains(by_address, {key: replica.address for key, replica in edge.worker.replicas.items()})
        edge.worker.commands = drained
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(client.post(CHAT, json={"model": "m"}), name="ask") for _ in range(10)]
            await stub.ScaleModel(admin_pb.ScaleModelRequest(model="m", replica_count=1), timeout=10)
            async with asyncio.timeout(WAIT_SECONDS):
                while not drained.call_counts:
                    asked.append(group.create_task(client.post(CHAT, json={"model": "m"}), name="ask"))
                    await asyncio.sleep(0.02)
            for _ in range(30):
                asked.append(group.create_task(client.post(CHAT, json={"model": "m"}), name="ask"))
                await asyncio.sleep(0.02)
        assert {task.result().status_code for task in asked} == {200}
        ((left, call_count),) = drained.call_counts.items()
        assert len(by_address[left].calls) == call_count
        # Then all: who asks meanwhile waits for the next one.
        async with asyncio.TaskGroup() as group:
            await stub.ScaleModel(admin_pb.ScaleModelRequest(model="m", replica_count=0), timeout=10)
            asked = [group.create_task(client.post(CHAT, json={"model": "m"}), name="ask") for _ in range(20)]
        assert {task.result().status_code for task in asked} == {200}


class Drains(list[fleet_pb.Command]):
    """What a worker is told; of each replica that is told to drain, how many calls it had until then, by address."""

    def __init__(self, replicas: Mapping[str, FakeReplica], addresses: Mapping[str, str]) -> None:
        super().__init__()
        self.call_counts: dict[str, int] = {}
        self._replicas, self._addresses = replicas, addresses

    def append(self, command: fleet_pb.Command) -> None:
        """A command comes."""
        super().append(command)
        address = self._addresses.get(command.drain.replica_id)
        if address is not None:
            self.call_counts[address] = len(self._replicas[address].calls)


async def test_a_replica_of_the_lane_that_can_not_be_reached_is_sent_nothing_after_some_requests(world: World) -> None:
    async with (
        running_edge(world, routing=QUICKLY) as edge,
        edge.client() as client,
        Dialer(edge.proxy.control_address, identity=world.identity("admin-edge"), peer="proxy") as dialer,
    ):
        stub = dialer.stub(AdminServiceStub)
        async with replica_server(world, FakeReplica()) as address:
            edge.worker.address = lambda: address
            world.registry.put("m")
            async with asyncio.timeout(WAIT_SECONDS):
                while "express lane" not in await explain(stub, await ask(edge, client)):
                    await asyncio.sleep(0.05)
        # Its worker believes it well; where it listened is nobody.
        for _ in range(40):
            with contextlib.suppress(httpx.ReadTimeout):
                assert (await client.post(CHAT, json={"model": "m"}, timeout=1)).status_code == 503
            if "STATE_OPEN" in str(await stub.ListReplicas(admin_pb.ListReplicasRequest(model="m"), timeout=10)):
                return
            await asyncio.sleep(0.05)
        pytest.fail("its breaker is not open after forty requests")


async def where(asking: Awaitable[str], other: FakeReplica) -> bool:
    """Whether a request came to the other replica."""
    before = len(other.calls)
    await asking
    return len(other.calls) > before
