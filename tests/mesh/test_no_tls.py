"""A mesh without TLS of its own, as under Istio's sidecars: nobody can be told apart here, and that is said."""

from typing import Any, Literal

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from helios.mesh.channel import Dialer
from helios.mesh.server import NO_TLS_COMPONENT, MeshServer, ServerOptions, peer_component


class Told(health_pb2_grpc.HealthServicer):
    """Answers, and notes who asked."""

    def __init__(self) -> None:
        self.components: list[str | None] = []

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> health_pb2.HealthCheckResponse:
        del request
        self.components.append(peer_component(context))
        return health_pb2.HealthCheckResponse()


@pytest.mark.parametrize("transport", ["grpc", "http2"])
async def test_a_caller_without_tls_is_nobody_in_particular(transport: Literal["grpc", "http2"]) -> None:
    told = Told()
    server = MeshServer(listen="127.0.0.1:0", identity=None, policy={}, options=ServerOptions(transport=transport))
    health_pb2_grpc.add_HealthServicer_to_server(told, server.grpc)
    async with server, Dialer(server.address, identity=None, peer="registry") as dialer:
        await dialer.stub(health_pb2_grpc.HealthStub).Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert told.components == [NO_TLS_COMPONENT]
