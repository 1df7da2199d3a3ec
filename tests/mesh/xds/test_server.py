"""The ADS servicer over a real gRPC connection; Envoy's own side is in tests/wire."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest
from envoy.config.endpoint.v3 import endpoint_pb2
from envoy.service.discovery.v3 import ads_pb2_grpc, discovery_pb2

from helios.mesh.errors import Unavailable
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.xds.server import ADS_SERVICE, ENDPOINTS_TYPE, XdsServer, add_xds

A, B = "127.0.0.1:1", "127.0.0.1:2"


class FakeEnvoy:
    """The client's half of a delta stream."""

    def __init__(self, call: Any, node: str) -> None:
        self._call = call
        self._node = node

    async def subscribe(self) -> None:
        request = discovery_pb2.DeltaDiscoveryRequest(type_url=ENDPOINTS_TYPE, resource_names_subscribe=["replicas"])
        request.node.id = self._node
        await self._call.write(request)

    async def receive(self) -> tuple[Any, set[str]]:
        async with asyncio.timeout(5):
            response = await self._call.read()
        assignment = endpoint_pb2.ClusterLoadAssignment()
        assert response.resources[0].resource.Unpack(assignment)
        addresses = [entry.endpoint.address.socket_address for entry in assignment.endpoints[0].lb_endpoints]
        return response, {f"{address.address}:{address.port_value}" for address in addresses}

    async def answer(self, response: Any, error: str = "") -> None:
        request = discovery_pb2.DeltaDiscoveryRequest(type_url=ENDPOINTS_TYPE, response_nonce=response.nonce)
        if error:
            request.error_detail.message = error
        await self._call.write(request)


@pytest.fixture
async def xds() -> XdsServer:
    return XdsServer()


@pytest.fixture
async def channel(xds: XdsServer) -> AsyncIterator[grpc.aio.Channel]:
    options = ServerOptions(drain_seconds=0.1)
    server = MeshServer(listen="127.0.0.1:0", identity=None, policy={ADS_SERVICE: frozenset({"edge"})}, options=options)
    add_xds(xds, server.grpc)
    async with server, grpc.aio.insecure_channel(server.address) as opened:
        yield opened


def connect(channel: grpc.aio.Channel, node: str = "edge") -> FakeEnvoy:
    return FakeEnvoy(ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel).DeltaAggregatedResources(), node)


async def test_an_envoy_gets_endpoints_and_acknowledges(xds: XdsServer, channel: grpc.aio.Channel) -> None:
    xds.open()
    version = xds.publish([A])
    envoy = connect(channel)
    await envoy.subscribe()
    response, endpoints = await envoy.receive()
    assert endpoints == {A}
    with pytest.raises(Unavailable, match="in time"):
        await xds.wait_acked(version, time.monotonic() + 0.1)
    await envoy.answer(response)
    await xds.wait_acked(version, time.monotonic() + 5)
    await xds.wait_acked(version, time.monotonic() + 5, node="edge")


async def test_all_envoys_are_waited_for_or_one(xds: XdsServer, channel: grpc.aio.Channel) -> None:
    xds.open()
    version = xds.publish([A])
    quick, slow = connect(channel, "quick"), connect(channel, "slow")
    for envoy in (quick, slow):
        await envoy.subscribe()
    await quick.answer((await quick.receive())[0])
    pending, _ = await slow.receive()
    await xds.wait_acked(version, time.monotonic() + 5, node="quick")
    with pytest.raises(Unavailable) as caught:
        await xds.wait_acked(version, time.monotonic() + 0.1)
    assert caught.value.metadata["lagging"] == "slow"
    await slow.answer(pending)
    await xds.wait_acked(version, time.monotonic() + 5)


async def test_without_any_envoy_the_deadline_passes(xds: XdsServer) -> None:
    xds.open()
    with pytest.raises(Unavailable) as caught:
        await xds.wait_acked(xds.publish([A]), time.monotonic() + 0.05)
    assert caught.value.metadata["lagging"] == "none connected"


async def test_a_refusal_is_counted_and_the_next_version_still_comes(xds: XdsServer, channel: grpc.aio.Channel) -> None:
    xds.open()
    xds.publish([A])
    envoy = connect(channel)
    await envoy.subscribe()
    await envoy.answer((await envoy.receive())[0], error="no")
    version = xds.publish([A, B])
    response, endpoints = await envoy.receive()
    assert endpoints == {A, B}
    await envoy.answer(response)
    await xds.wait_acked(version, time.monotonic() + 5)
    assert xds.statistics().nack_count == 1


async def test_nothing_is_sent_before_open(xds: XdsServer, channel: grpc.aio.Channel) -> None:
    xds.publish([A])
    envoy = connect(channel)
    await envoy.subscribe()
    with pytest.raises(Unavailable):
        await xds.wait_acked(1, time.monotonic() + 0.2)
    assert xds.statistics().push_count == 0
    xds.open()
    assert (await envoy.receive())[1] == {A}


async def test_an_envoy_that_comes_back_gets_everything(xds: XdsServer, channel: grpc.aio.Channel) -> None:
    xds.open()
    xds.publish([A, B])
    for _ in range(2):
        envoy = connect(channel)
        await envoy.subscribe()
        response, endpoints = await envoy.receive()
        assert endpoints == {A, B}
        await envoy.answer(response)
        await xds.wait_acked(1, time.monotonic() + 5)
        envoy._call.cancel()
        async with asyncio.timeout(5):
            while xds.statistics().envoy_count:
                await asyncio.sleep(0.01)


async def test_the_other_protocol_is_refused(channel: grpc.aio.Channel) -> None:
    call = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel).StreamAggregatedResources()
    assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
