"""The express lane with the real proxy and the real Envoy: requests that nobody picked are counted and explained, and
none is lost when their replica goes.
"""

import asyncio

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
from tests.proxy.harness import World
from tests.proxy.test_gateway import Edge, running_edge

pytestmark = pytest.mark.leaks("Envoy keeps connections to servers of this process until it is gone")
QUICKLY = RoutingSettings(express_per_second=0.5)
# Generous: the lane opens some three seconds after a model was asked for first.
WAIT_SECONDS = 30.0


async def explain(stub: AdminServiceStub, request_id: str) -> str:
    """How a request was routed, as `helios why` has it; of one that nobody picked, once its replica has told of it."""
    while True:
        try:
            return str(await stub.ExplainRequest(admin_pb.ExplainRequestRequest(request_id=request_id), timeout=10))
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
        await asyncio.sleep(0.02)


async def ask(edge: Edge, client: httpx.AsyncClient) -> str:
    """One request, which its replica reports; returns its id."""
    answer = await client.post("/v1/chat/completions", json={"model": "m"})
    assert answer.status_code == 200, answer.text
    (replica_id,) = edge.worker.replicas
    request_id = answer.headers["x-request-id"]
    delta = types_pb2.LoadDelta(replica_id=replica_id)
    delta.started.add(request_id=request_id)
    delta.finished.add(request_id=request_id).duration.FromMilliseconds(5)
    edge.worker.say(load=fleet_pb.LoadReport(deltas=[delta]))
    return str(request_id)


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
