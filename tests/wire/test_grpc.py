"""Native gRPC through the public listener."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.api import httpbody_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from helios.api.admin.v1 import admin_service_pb2, admin_service_pb2_grpc
from helios.api.catalog.v1 import model_service_pb2, model_service_pb2_grpc
from helios.api.inference.v1 import inference_service_pb2, inference_service_pb2_grpc, openai_service_pb2_grpc
from helios.mesh import errors
from helios.mesh.status import error_from_rpc
from tests.wire.gateway import Gateway

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]
MODEL = (("x-helios-model", "m"),)


@pytest_asyncio.fixture(loop_scope="module")
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(gateway.edge) as opened:
        yield opened


async def test_a_stream_of_bodies_comes_through(channel: grpc.aio.Channel) -> None:
    body = {"model": "m", "stream": True, "chunks": 3}
    call = openai_service_pb2_grpc.OpenAIServiceStub(channel).CreateChatCompletion(
        _body(body), metadata=MODEL, timeout=10
    )
    received = [message async for message in call]
    assert [message.content_type for message in received] == ["text/event-stream"] * 4
    assert received[-1].data == b"data: [DONE]\n\n"


async def test_a_typed_call_comes_through(channel: grpc.aio.Channel) -> None:
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    answer = await stub.Tokenize(inference_service_pb2.TokenizeRequest(model="m"), metadata=MODEL, timeout=10)
    assert list(answer.token_ids) == [1, 2, 3]


@pytest.mark.parametrize("source", ["replica", "picker", "control"])
@pytest.mark.parametrize(
    "kind", ["ModelNotFound", "QuotaExceeded", "NoReadyReplica", "InvalidRequest", "DeadlineExceeded"]
)
async def test_an_error_keeps_its_status(gateway: Gateway, channel: grpc.aio.Channel, source: str, kind: str) -> None:
    error = getattr(errors, kind)("as told", retry_after_seconds=7)
    gateway.picker.pick = (lambda _: error) if source == "picker" else None
    gateway.replica.refusal = error if source == "replica" else None
    if source == "control":
        gateway.control.failures["ListModels"] = error
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (_list_models(channel) if source == "control" else _chat(channel))
    assert (caught.value.code().name, caught.value.details()) == (error.grpc_code, "as told")
    trailers = dict(caught.value.trailing_metadata() or ())
    assert json.loads(str(trailers["x-openai-error"]))["error"]["message"] == "as told"
    assert trailers["retry-after"] == "7"
    if source != "picker":
        assert type(error_from_rpc(caught.value)) is type(error)


# The picker's pause decides how much of the body Envoy has read when the answer to the headers comes.
@pytest.mark.parametrize("pause_seconds", [0.0, 0.3], ids=["at once", "held"])
@pytest.mark.parametrize("metadata", [MODEL, ()], ids=["by header", "by body"])
async def test_a_message_of_40_mib_is_refused(
    gateway: Gateway, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...], pause_seconds: float
) -> None:
    gateway.picker.hold = lambda _: asyncio.sleep(pause_seconds)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _send_text(channel, 40 << 20, metadata)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert not gateway.replica.calls


@pytest.mark.parametrize("pause_seconds", [0.0, 0.3], ids=["at once", "held"])
@pytest.mark.parametrize("metadata", [MODEL, ()], ids=["by header", "by body"])
async def test_a_message_of_32_mib_passes(
    gateway: Gateway, channel: grpc.aio.Channel, metadata: tuple[tuple[str, str], ...], pause_seconds: float
) -> None:
    gateway.picker.hold = lambda _: asyncio.sleep(pause_seconds)
    # The rest is the document around the text.
    size = (32 << 20) - 100
    answer = await _send_text(channel, size, metadata)
    assert json.loads(answer.data)["size"] > size
    assert [len(body) > size for body in gateway.picker.bodies] == ([] if metadata else [True])


async def test_details_arrive(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    gateway.control.failures["GetModel"] = errors.ModelNotFound("no such model", metadata={"model": "x"})
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetModel(model_service_pb2.GetModelRequest(model="x"), timeout=10)
    raw = dict(caught.value.trailing_metadata() or ())["grpc-status-details-bin"]
    assert isinstance(raw, bytes)
    info = error_details_pb2.ErrorInfo()
    assert status_pb2.Status.FromString(raw).details[0].Unpack(info)
    assert (info.reason, dict(info.metadata)) == ("MODEL_NOT_FOUND", {"model": "x"})


async def test_a_stale_pick_is_unavailable(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    gateway.picker.endpoints = ["127.0.0.1:1"]
    stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Tokenize(inference_service_pb2.TokenizeRequest(model="m"), metadata=MODEL, timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_admin_services_do_not_exist_here(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    stub = admin_service_pb2_grpc.AdminServiceStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.ListWorkers(admin_service_pb2.ListWorkersRequest(), timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not gateway.control.calls


async def test_health_and_reflection_answer(channel: grpc.aio.Channel) -> None:
    health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request]), timeout=10)
    async for answer in call:
        assert "helios.api.catalog.v1.ModelService" in {entry.name for entry in answer.list_services_response.service}


async def test_a_clients_cancel_reaches_the_replica(gateway: Gateway, channel: grpc.aio.Channel) -> None:
    gateway.replica.cancelled.clear()
    body = {"model": "m", "stream": True, "chunks": 1000, "pause": 0.05}
    call = openai_service_pb2_grpc.OpenAIServiceStub(channel).CreateChatCompletion(
        _body(body), metadata=MODEL, timeout=60
    )
    await call.read()
    call.cancel()
    async with asyncio.timeout(5):
        await gateway.replica.cancelled.wait()


async def _list_models(channel: grpc.aio.Channel) -> None:
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    await stub.ListModels(model_service_pb2.ListModelsRequest(), timeout=10)


async def _chat(channel: grpc.aio.Channel) -> None:
    stub = openai_service_pb2_grpc.OpenAIServiceStub(channel)
    async for _ in stub.CreateChatCompletion(_body({"model": "m"}), metadata=MODEL, timeout=10):
        pass


async def _send_text(channel: grpc.aio.Channel, size: int, metadata: tuple[tuple[str, str], ...]) -> Any:
    stub = openai_service_pb2_grpc.OpenAIServiceStub(channel)
    call = stub.CreateChatCompletion(_body({"model": "m", "text": "a" * size}), metadata=metadata, timeout=20)
    return await call.read()


def _body(document: dict[str, object]) -> httpbody_pb2.HttpBody:
    return httpbody_pb2.HttpBody(content_type="application/json", data=json.dumps(document).encode())
