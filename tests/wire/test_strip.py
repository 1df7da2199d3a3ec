"""What clients send of the mesh's own headers changes nothing, on every route of both listeners."""

from collections.abc import Awaitable, Callable

import grpc
import grpc.aio
import httpx
import pytest

from helios.api.catalog.v1 import model_service_pb2, model_service_pb2_grpc
from helios.api.inference.v1 import inference_service_pb2, inference_service_pb2_grpc
from helios.api.registry.v1 import registry_service_pb2, registry_service_pb2_grpc
from tests.wire.fakes import Call
from tests.wire.gateway import TOKEN, Gateway

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]

FORGED = [
    "x-helios-endpoint",
    "x-helios-route-model",
    "x-helios-route-revision",
    "x-helios-envoy",
    "x-helios-request-id",
    "x-helios-",
    "x-helios-m",
    "x-helios-mode",
    "x-helios-modem",
    "x-helios-models",
    "x-helios-model-x",
    "X-Helios-Endpoint",
    "x-envoy-max-retries",
    "x-envoy-retry-on",
    "x-envoy-retry-grpc-on",
    "x-envoy-retriable-status-codes",
    "x-envoy-retriable-header-names",
    "x-envoy-hedge-on-per-try-timeout",
    "x-envoy-original-path",
    "x-envoy-original-host",
    "x-envoy-expected-rq-timeout-ms",
    "x-envoy-upstream-rq-timeout-ms",
    "x-envoy-upstream-rq-per-try-timeout-ms",
    "x-envoy-upstream-rq-timeout-alt-response",
    "x-envoy-upstream-alt-stat-name",
    "x-envoy-upstream-stream-duration-ms",
    "x-envoy-decorator-operation",
    "x-envoy-force-trace",
    "x-envoy-internal",
    "x-envoy-attempt-count",
    "x-envoy-peer-metadata",
    "x-envoy-external-address",
    "x-envoy-ip-tags",
    "X-Envoy-Whatever",
    "x-forwarded-client-cert",
    "x-openai-error",
]
# A number, so that it would be obeyed where a number is expected; long, so that no port or id holds it by chance.
EVIL = "6660006660"

Sender = Callable[[Gateway, dict[str, str]], Awaitable[Call]]


async def _rest_chat(gateway: Gateway, headers: dict[str, str]) -> Call:
    answer = await _request(gateway.edge, "POST", "/v1/chat/completions", headers, {"model": "m"})
    assert answer.status_code == 200
    return gateway.replica.calls[-1]


async def _grpc_tokenize(gateway: Gateway, headers: dict[str, str]) -> Call:
    async with grpc.aio.insecure_channel(gateway.edge) as channel:
        stub = inference_service_pb2_grpc.InferenceServiceStub(channel)
        await stub.Tokenize(inference_service_pb2.TokenizeRequest(model="m"), metadata=_lower(headers), timeout=10)
    return gateway.replica.calls[-1]


async def _rest_models(gateway: Gateway, headers: dict[str, str]) -> Call:
    assert (await _request(gateway.edge, "GET", "/v1/models", headers)).status_code == 200
    return gateway.control.calls[-1]


async def _rest_model(gateway: Gateway, headers: dict[str, str]) -> Call:
    assert (await _request(gateway.edge, "GET", "/v1/models/a/b", headers)).status_code == 200
    return gateway.control.calls[-1]


async def _grpc_models(gateway: Gateway, headers: dict[str, str]) -> Call:
    async with grpc.aio.insecure_channel(gateway.edge) as channel:
        stub = model_service_pb2_grpc.ModelServiceStub(channel)
        await stub.ListModels(model_service_pb2.ListModelsRequest(), metadata=_lower(headers), timeout=10)
    return gateway.control.calls[-1]


async def _admin_rest(gateway: Gateway, headers: dict[str, str]) -> Call:
    assert (await _request(gateway.admin, "GET", "/admin/v1/workers", headers | _token())).status_code == 200
    return gateway.control.calls[-1]


async def _admin_registry_rest(gateway: Gateway, headers: dict[str, str]) -> Call:
    assert (await _request(gateway.admin, "GET", "/admin/v1/models", headers | _token())).status_code == 200
    return gateway.registry.calls[-1]


async def _admin_registry_grpc(gateway: Gateway, headers: dict[str, str]) -> Call:
    async with grpc.aio.insecure_channel(gateway.admin) as channel:
        stub = registry_service_pb2_grpc.RegistryServiceStub(channel)
        metadata = _lower(headers | _token())
        await stub.ListModels(registry_service_pb2.ListModelsRequest(), metadata=metadata, timeout=10)
    return gateway.registry.calls[-1]


ROUTES: list[Sender] = [
    _rest_chat,
    _grpc_tokenize,
    _rest_models,
    _rest_model,
    _grpc_models,
    _admin_rest,
    _admin_registry_rest,
    _admin_registry_grpc,
]


@pytest.mark.parametrize("send", ROUTES, ids=lambda send: send.__name__.strip("_"))
async def test_no_forged_header_arrives_anywhere(gateway: Gateway, send: Sender) -> None:
    # A trailing hyphen alone is refused by no one, but two names that differ in case only are one name.
    call = await send(gateway, dict.fromkeys(FORGED, EVIL))
    reached = [call.metadata, *(request.headers for request in gateway.picker.requests)]
    for headers in reached:
        assert {name for name, value in headers.items() if EVIL in value} == set()
    assert call.metadata.get("x-helios-endpoint") in {None, gateway.replica_address}


@pytest.mark.parametrize("send", ROUTES, ids=lambda send: send.__name__.strip("_"))
async def test_a_forged_header_with_an_underscore_is_refused(gateway: Gateway, send: Sender) -> None:
    with pytest.raises((AssertionError, grpc.aio.AioRpcError)):
        await send(gateway, {"x_helios_endpoint": EVIL})
    assert not gateway.replica.calls
    assert not gateway.control.calls
    assert not gateway.registry.calls


async def test_the_model_header_is_kept(gateway: Gateway) -> None:
    call = await _grpc_tokenize(gateway, {"x-helios-model": "m"})
    assert gateway.picker.requests[0].model == "m"
    assert call.metadata["x-helios-model"] == "m"
    assert not gateway.picker.bodies, "the body was not needed"


async def test_native_grpc_without_the_header_shows_its_body(gateway: Gateway) -> None:
    await _grpc_tokenize(gateway, {})
    assert gateway.picker.bodies[0].endswith(b"\x0a\x01m")


async def test_the_request_id_is_envoys_own(gateway: Gateway) -> None:
    call = await _rest_chat(gateway, {"x-request-id": "mine" * 100})
    assert call.metadata["x-request-id"] != "mine" * 100
    assert call.metadata["x-client-request-id"] == "mine" * 32
    call = await _rest_chat(gateway, {"x-request-id": "a", "x-client-request-id": "b"})
    assert call.metadata["x-client-request-id"] == "b"


async def test_trace_context_passes(gateway: Gateway) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    call = await _rest_chat(gateway, {"traceparent": parent})
    assert call.metadata["traceparent"] == parent


async def _request(
    address: str, method: str, path: str, headers: dict[str, str], body: dict[str, str] | None = None
) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=10, trust_env=False) as client:
        return await client.request(method, path, headers=headers, json=body)


def _token() -> dict[str, str]:
    return {"authorization": f"Bearer {TOKEN}"}


def _lower(headers: dict[str, str]) -> tuple[tuple[str, str], ...]:
    # grpc-python refuses upper case, as HTTP/2 does.
    return tuple((name.lower(), value) for name, value in headers.items())
