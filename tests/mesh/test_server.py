"""Servers and dialers over real mTLS: who may call, what errors become, and renewal under load."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from helios.api.catalog.v1 import model_service_pb2 as pb
from helios.api.catalog.v1 import model_service_pb2_grpc as pb_grpc
from helios.mesh import errors
from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority
from helios.mesh.server import MeshServer, ServerOptions, peer_component
from helios.mesh.status import error_from_rpc

SERVICE = "helios.api.catalog.v1.ModelService"


class Catalog(pb_grpc.ModelServiceServicer):
    """Answers with the caller's component; the model's name says what goes wrong."""

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(object=str(peer_component(context)))

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        if request.model == "bug":
            raise ZeroDivisionError("secret of the implementation")
        if request.model == "slow":
            await asyncio.sleep(0.3)
            return pb.Model()
        if request.model == "grouped":
            async with asyncio.TaskGroup() as group:
                group.create_task(refuse(), name="refuse")
        raise errors.ModelNotFound("no such model", metadata={"model": request.model})


async def refuse() -> None:
    raise errors.Overloaded("a task of the handler says no")


@pytest.fixture(params=["grpc", "http2"])
def transport(request: pytest.FixtureRequest) -> str:
    """Everything here holds on both transports."""
    return str(request.param)


@pytest.fixture
async def server(authority: CertificateAuthority, tmp_path: Path, transport: Any) -> AsyncIterator[MeshServer]:
    identity = authority.issue("proxy", tmp_path / "proxy")
    mesh_server = MeshServer(
        listen="127.0.0.1:0",
        identity=identity,
        policy={SERVICE: frozenset({"edge"})},
        options=ServerOptions(drain_seconds=2.0, transport=transport),
    )
    pb_grpc.add_ModelServiceServicer_to_server(Catalog(), mesh_server.grpc)
    mesh_server.serve(SERVICE)
    async with mesh_server:
        yield mesh_server


@pytest.fixture
async def edge(server: MeshServer, authority: CertificateAuthority, tmp_path: Path) -> AsyncIterator[Dialer]:
    async with Dialer(server.address, identity=authority.issue("edge", tmp_path / "edge"), peer="proxy") as dialer:
        yield dialer


async def failure(call: Any) -> errors.HeliosError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return error_from_rpc(caught.value)


@pytest.mark.parametrize("message", [b"\x0a\x01\xff", b"\xff\xff\xff"], ids=["invalid UTF-8", "no protobuf"])
async def test_a_message_that_cant_be_parsed_is_the_callers_mistake(edge: Dialer, message: bytes) -> None:
    def raw(channel: grpc.aio.Channel) -> Any:
        return channel.unary_unary(f"/{SERVICE}/GetModel")

    error = await failure(edge.stub(raw)(message, timeout=5))
    assert type(error) is errors.InvalidRequest
    assert "DecodeError" not in error.message


async def test_metadata_that_the_edge_lets_pass_is_taken(edge: Dialer) -> None:
    metadata = (("cookie", "a" * (60 << 10)),)
    response = await edge.stub(pb_grpc.ModelServiceStub).ListModels(
        pb.ListModelsRequest(), timeout=5, metadata=metadata
    )
    assert response.object == "edge"


async def test_the_server_knows_its_caller(edge: Dialer) -> None:
    response = await edge.stub(pb_grpc.ModelServiceStub).ListModels(pb.ListModelsRequest(), timeout=5)
    assert response.object == "edge"


@pytest.mark.parametrize(("trust_domain", "namespace"), [("other.example", "default"), ("helios.local", "other")])
async def test_a_namesake_of_another_mesh_is_refused(
    server: MeshServer, authority: CertificateAuthority, tmp_path: Path, trust_domain: str, namespace: str
) -> None:
    # The authority that signed is the same.
    others = CertificateAuthority.open(tmp_path / "pki", trust_domain=trust_domain, namespace=namespace)
    assert others.pem == authority.pem
    identity = others.issue("edge", tmp_path / "stranger")
    async with Dialer(server.address, identity=identity, peer="proxy") as dialer:
        error = await failure(dialer.stub(pb_grpc.ModelServiceStub).ListModels(pb.ListModelsRequest(), timeout=5))
    assert type(error) is errors.PermissionDenied
    assert error.metadata["component"] == ""


async def test_a_component_outside_the_policy_is_refused(
    server: MeshServer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    identity = authority.issue("storage", tmp_path / "storage")
    async with Dialer(server.address, identity=identity, peer="proxy") as dialer:
        error = await failure(dialer.stub(pb_grpc.ModelServiceStub).ListModels(pb.ListModelsRequest(), timeout=5))
    assert type(error) is errors.PermissionDenied
    assert error.metadata["component"] == "storage"


async def test_a_certificate_of_another_authority_is_refused(server: MeshServer, tmp_path: Path) -> None:
    stranger = CertificateAuthority.open(tmp_path / "other").issue("edge", tmp_path / "stranger")
    async with Dialer(server.address, identity=stranger, peer="proxy") as dialer:
        error = await failure(dialer.stub(pb_grpc.ModelServiceStub).ListModels(pb.ListModelsRequest(), timeout=3))
    assert type(error) in (errors.Unavailable, errors.DeadlineExceeded)


async def test_a_client_refuses_a_server_that_is_another_component(
    server: MeshServer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    identity = authority.issue("edge", tmp_path / "edge")
    async with Dialer(server.address, identity=identity, peer="registry") as dialer:
        error = await failure(dialer.stub(pb_grpc.ModelServiceStub).ListModels(pb.ListModelsRequest(), timeout=3))
    assert type(error) in (errors.Unavailable, errors.DeadlineExceeded)


async def test_plain_text_is_refused(server: MeshServer) -> None:
    async with Dialer(server.address, identity=None, peer="proxy") as dialer:
        error = await failure(dialer.stub(pb_grpc.ModelServiceStub).ListModels(pb.ListModelsRequest(), timeout=3))
    assert type(error) in (errors.Unavailable, errors.DeadlineExceeded)


async def test_a_raised_error_arrives_as_itself(edge: Dialer) -> None:
    error = await failure(edge.stub(pb_grpc.ModelServiceStub).GetModel(pb.GetModelRequest(model="x"), timeout=5))
    assert type(error) is errors.ModelNotFound
    assert error.metadata == {"model": "x"}


async def test_an_error_of_a_handlers_task_arrives_as_itself(edge: Dialer) -> None:
    request = pb.GetModelRequest(model="grouped")
    error = await failure(edge.stub(pb_grpc.ModelServiceStub).GetModel(request, timeout=5))
    assert type(error) is errors.Overloaded


async def test_an_unforeseen_error_is_internal_and_tells_nothing(edge: Dialer) -> None:
    error = await failure(edge.stub(pb_grpc.ModelServiceStub).GetModel(pb.GetModelRequest(model="bug"), timeout=5))
    assert type(error) is errors.Bug
    assert "secret" not in error.message


async def test_renewing_both_leaves_fails_no_call(
    edge: Dialer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    answered = 0
    stop = asyncio.Event()

    async def call_on() -> None:
        nonlocal answered
        while not stop.is_set():
            stub = edge.stub(pb_grpc.ModelServiceStub)
            assert (await stub.ListModels(pb.ListModelsRequest(), timeout=5)).object == "edge"
            answered += 1
            # Calls all the time, of which a core has room for others.
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for number in range(4):
            group.create_task(call_on(), name=f"caller {number}")
        for _ in range(3):
            authority.issue("proxy", tmp_path / "proxy")
            authority.issue("edge", tmp_path / "edge")
            await asyncio.sleep(1.2)
        stop.set()
    assert answered > 50


async def test_draining_lets_running_calls_end(server: MeshServer, edge: Dialer) -> None:
    async with asyncio.TaskGroup() as group:
        slow = edge.stub(pb_grpc.ModelServiceStub).GetModel(pb.GetModelRequest(model="slow"), timeout=5)
        running = group.create_task(_await(slow), name="slow call")
        await asyncio.sleep(0.1)
        await server.drain(2.0)
    assert running.result() == pb.Model()
    assert type(await failure(edge.stub(pb_grpc.ModelServiceStub).ListModels(pb.ListModelsRequest(), timeout=1))) in (
        errors.Unavailable,
        errors.DeadlineExceeded,
    )


async def _await(call: Any) -> Any:
    return await call


async def test_a_drain_that_was_given_up_leaves_no_server_behind(
    server: MeshServer, edge: Dialer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    health = edge.stub(health_pb2_grpc.HealthStub).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
    await health.read()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await server.drain(30.0)
    async with asyncio.timeout(5):
        await server.__aexit__(None, None, None)
    again = MeshServer(listen=server.address, identity=authority.issue("proxy", tmp_path / "again"), policy={})
    async with again:
        assert again.address == server.address


async def test_health_answers_for_each_service(edge: Dialer) -> None:
    health = edge.stub(health_pb2_grpc.HealthStub)
    response = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=5)
    assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_a_taken_address_is_a_clear_error(server: MeshServer) -> None:
    second = MeshServer(listen=server.address, identity=None, policy={})
    with pytest.raises(errors.InvalidRequest, match="in use"):
        async with second:
            pass


async def test_a_renewal_cuts_no_stream_that_runs(
    server: MeshServer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    identity = authority.issue("edge", tmp_path / "edge")
    async with asyncio.timeout(10), Dialer(server.address, identity=identity, peer="proxy") as dialer:
        call = dialer.stub(health_pb2_grpc.HealthStub).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        authority.issue("edge", tmp_path / "edge")
        await asyncio.sleep(1.1)
        response = await dialer.stub(pb_grpc.ModelServiceStub).ListModels(pb.ListModelsRequest(), timeout=5)
        assert response.object == "edge"
        await server.set_serving(is_serving=False)
        assert (await call.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_dialer_goes_on_with_its_leaf_while_the_new_one_cannot_be_read(
    server: MeshServer, authority: CertificateAuthority, tmp_path: Path
) -> None:
    identity = authority.issue("edge", tmp_path / "edge")
    async with Dialer(server.address, identity=identity, peer="proxy") as dialer:
        authority.issue("edge", tmp_path / "edge")
        key = (tmp_path / "edge" / "current" / "tls.key").resolve()
        key.rename(key.with_suffix(".away"))
        response = await dialer.stub(pb_grpc.ModelServiceStub).ListModels(pb.ListModelsRequest(), timeout=5)
        assert response.object == "edge"
