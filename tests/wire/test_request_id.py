"""Every answer names its request, so that `helios why` can be asked: REST and gRPC, answers and errors."""

import json
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import httpx
import pytest
import pytest_asyncio

from helios.api.inference.v1 import inference_service_pb2, inference_service_pb2_grpc
from helios.mesh import errors
from tests.wire.gateway import Gateway

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]
CHAT = "/v1/chat/completions"
MODEL = (("x-helios-model", "m"),)


@pytest_asyncio.fixture(loop_scope="module")
async def stub(gateway: Gateway) -> AsyncIterator[inference_service_pb2_grpc.InferenceServiceStub]:
    async with grpc.aio.insecure_channel(gateway.edge) as channel:
        yield inference_service_pb2_grpc.InferenceServiceStub(channel)


@pytest.mark.parametrize("is_streaming", [False, True])
async def test_a_rest_answer_has_the_id_that_picker_and_replica_saw(
    gateway: Gateway, rest: httpx.AsyncClient, *, is_streaming: bool
) -> None:
    answer = await rest.post(CHAT, json={"model": "m", "stream": is_streaming})
    request_id = answer.headers["x-request-id"]
    assert gateway.picker.requests[-1].headers["x-request-id"] == request_id
    assert gateway.replica.calls[-1].metadata["x-request-id"] == request_id


@pytest.mark.parametrize("source", ["picker", "replica", "route", "body"])
async def test_a_rest_error_has_an_id(gateway: Gateway, rest: httpx.AsyncClient, source: str) -> None:
    error = errors.NoReadyReplica("as told", retry_after_seconds=7)
    gateway.picker.pick = (lambda _: error) if source == "picker" else None
    gateway.replica.refusal = error if source == "replica" else None
    body = b"{" if source == "body" else json.dumps({"model": "m"}).encode()
    path = "/v1/nothing" if source == "route" else CHAT
    answer = await rest.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code >= 400
    assert answer.headers["x-request-id"]
    if source in ("picker", "replica"):
        assert gateway.picker.requests[-1].headers["x-request-id"] == answer.headers["x-request-id"]


async def test_a_grpc_answer_has_the_id_in_its_initial_metadata(
    gateway: Gateway, stub: inference_service_pb2_grpc.InferenceServiceStub
) -> None:
    call = stub.Tokenize(inference_service_pb2.TokenizeRequest(model="m"), metadata=MODEL, timeout=10)
    await call
    metadata = dict(await call.initial_metadata())
    assert metadata["x-request-id"] == gateway.replica.calls[-1].metadata["x-request-id"]


async def test_a_grpc_error_has_the_id_in_its_metadata(
    gateway: Gateway, stub: inference_service_pb2_grpc.InferenceServiceStub
) -> None:
    gateway.picker.pick = lambda _: errors.ModelNotFound("as told")
    call = stub.Chat(inference_service_pb2.ChatRequest(model="m"), metadata=MODEL, timeout=10)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    told = {**dict(caught.value.initial_metadata()), **dict(caught.value.trailing_metadata())}
    assert told["x-request-id"] == gateway.picker.requests[-1].headers["x-request-id"]
