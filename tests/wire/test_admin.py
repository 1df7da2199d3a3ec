"""The admin listener: who gets in, and the REST paths of its services."""

import json

import grpc
import grpc.aio
import httpx
import pytest

from helios.api.admin.v1 import admin_service_pb2, admin_service_pb2_grpc
from helios.api.engine.v1 import engine_settings_pb2
from helios.api.registry.v1 import (
    artifact_service_pb2,
    artifact_service_pb2_grpc,
    registry_service_pb2,
    registry_service_pb2_grpc,
)
from helios.mesh import errors
from tests.wire.gateway import TOKEN, Gateway
from tests.wire.test_rest import openai_error

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]
BEARER = f"Bearer {TOKEN}"


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"Basic {TOKEN}",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
    ],
)
@pytest.mark.parametrize("path", ["/admin/v1/workers", "/v1/models", "/nothing", "/admin/v1/models"])
async def test_without_the_token_nothing_is_answered(gateway: Gateway, authorization: str | None, path: str) -> None:
    headers = {} if authorization is None else {"authorization": authorization}
    answer = await _get(gateway, path, headers)
    assert (answer.status_code, openai_error(answer)["type"]) == (401, "authentication_error")
    assert not gateway.control.calls
    assert not gateway.registry.calls


@pytest.mark.parametrize("token", [None, "Bearer wrong"])
async def test_grpc_without_the_token_is_unauthenticated(gateway: Gateway, token: str | None) -> None:
    metadata = () if token is None else (("authorization", token),)
    async with grpc.aio.insecure_channel(gateway.admin) as channel:
        stub = admin_service_pb2_grpc.AdminServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ListWorkers(admin_service_pb2.ListWorkersRequest(), metadata=metadata, timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not gateway.control.calls


async def test_grpc_with_the_token_reaches_both_servers(gateway: Gateway) -> None:
    metadata = (("authorization", BEARER),)
    async with grpc.aio.insecure_channel(gateway.admin) as channel:
        admin = admin_service_pb2_grpc.AdminServiceStub(channel)
        await admin.ListWorkers(admin_service_pb2.ListWorkersRequest(), metadata=metadata, timeout=10)
        registry = registry_service_pb2_grpc.RegistryServiceStub(channel)
        await registry.ListModels(registry_service_pb2.ListModelsRequest(), metadata=metadata, timeout=10)
        artifacts = artifact_service_pb2_grpc.ArtifactServiceStub(channel)
        await artifacts.ListArtifacts(artifact_service_pb2.ListArtifactsRequest(), metadata=metadata, timeout=10)
    assert [call.method for call in gateway.control.calls] == ["ListWorkers"]
    assert [call.method for call in gateway.registry.calls] == ["ListModels", "ListArtifacts"]
    assert "authorization" not in gateway.control.calls[0].metadata, "the token goes no further"


async def test_artifacts_are_found_and_removed_over_rest(gateway: Gateway) -> None:
    path = f"/admin/v1/artifacts/compile-cache/{'a' * 64}"
    headers = {"authorization": BEARER}
    assert (await _get(gateway, f"/admin/v1/artifacts?revision=sha256:{'b' * 64}", headers)).status_code == 200
    assert (await _get(gateway, path, headers)).status_code == 200
    listed, got = gateway.registry.calls
    assert (listed.method, listed.request.revision) == ("ListArtifacts", f"sha256:{'b' * 64}")
    assert (got.method, got.request.kind, got.request.key) == ("GetArtifact", "compile-cache", "a" * 64)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_the_token_opens(gateway: Gateway, scheme: str) -> None:
    answer = await _get(gateway, "/admin/v1/workers", {"authorization": f"{scheme} {TOKEN}"})
    assert answer.status_code == (200 if scheme == "Bearer" else 401)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:9", 200),
        ("localhost", 200),
        ("LocalHost:8081", 200),
        ("[::1]", 200),
        ("[::1]:8081", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:8081", 403),
        ("evil.example:8081", 403),
        ("127.0.0.1@evil.example", 400),
        ("x127.0.0.1", 403),
    ],
)
async def test_only_the_listeners_own_host_is_served(gateway: Gateway, host: str, status: int) -> None:
    answer = await _get(gateway, "/admin/v1/workers", {"authorization": BEARER, "host": host})
    assert answer.status_code in {status, 403} if status != 200 else answer.status_code == 200
    assert len(gateway.control.calls) == (1 if status == 200 else 0)


@pytest.mark.parametrize(
    ("origin", "is_served"),
    [
        ("http://127.0.0.1:{port}", True),
        ("http://localhost:{port}", True),
        ("http://[::1]:{port}", True),
        ("http://127.0.0.1:1", False),
        ("http://127.0.0.1", False),
        ("https://127.0.0.1:{port}", False),
        ("https://evil.example", False),
        ("http://localhost:{port}.evil.example", False),
        ("null", False),
        ("", False),
    ],
)
async def test_only_the_listeners_own_origin_is_served(gateway: Gateway, origin: str, *, is_served: bool) -> None:
    origin = origin.format(port=gateway.admin.rpartition(":")[2])
    answer = await _get(gateway, "/admin/v1/workers", {"authorization": BEARER, "origin": origin})
    assert answer.status_code == (200 if is_served else 403)
    assert "access-control-allow-origin" not in answer.headers
    if not is_served:
        assert openai_error(answer)["type"] == "permission_error"
        assert not gateway.control.calls


async def test_there_is_no_cors(gateway: Gateway) -> None:
    headers = {"origin": "https://evil.example", "access-control-request-method": "GET"}
    async with httpx.AsyncClient(base_url=f"http://{gateway.admin}", trust_env=False) as client:
        answer = await client.options("/admin/v1/workers", headers=headers)
    assert answer.status_code == 403
    assert not {name for name in answer.headers if name.startswith("access-control")}


@pytest.mark.parametrize(
    ("method", "path", "called", "fields"),
    [
        ("POST", "/admin/v1/models/m:preload", "PreloadModel", {"model": "m"}),
        ("POST", "/admin/v1/models/org/name:preload", "PreloadModel", {"model": "org/name"}),
        ("POST", "/admin/v1/models/org%2Fname:preload", "PreloadModel", {"model": "org/name"}),
        ("POST", "/admin/v1/models/a/b/c-1.5_x:scale", "ScaleModel", {"model": "a/b/c-1.5_x", "replica_count": 2}),
        ("POST", "/admin/v1/models/org/name:evict", "EvictModel", {"model": "org/name", "dry_run": True}),
        ("POST", "/admin/v1/models/org/name:stage", "StageModel", {"model": "org/name", "dry_run": True}),
        ("POST", "/admin/v1/models/org/name:unstage", "UnstageModel", {"model": "org/name", "dry_run": True}),
        ("POST", "/admin/v1/replicas/r-1:sleep", "SleepReplica", {"replica_id": "r-1", "dry_run": True}),
        ("POST", "/admin/v1/replicas/r-1:wake", "WakeReplica", {"replica_id": "r-1", "dry_run": True}),
        ("POST", "/admin/v1/workers/w-1:cordon", "CordonWorker", {"worker_id": "w-1", "dry_run": True}),
        ("POST", "/admin/v1/workers/w-1:uncordon", "UncordonWorker", {"worker_id": "w-1", "dry_run": True}),
        ("POST", "/admin/v1/workers/w-1:drain", "DrainWorker", {"worker_id": "w-1", "dry_run": True}),
        ("GET", "/admin/v1/scaling-decisions?model=m&page_size=7", "ListScalingDecisions", {"page_size": 7}),
        ("GET", "/admin/v1/workers", "ListWorkers", {}),
        ("GET", "/admin/v1/workers?page_size=7", "ListWorkers", {"page_size": 7}),
        ("GET", "/admin/v1/replicas?model=org/name", "ListReplicas", {"model": "org/name"}),
        ("POST", "/admin/v1/replicas/r-1:reset-breaker", "ResetBreaker", {"replica_id": "r-1", "dry_run": True}),
        (
            "GET",
            "/admin/v1/events?model=org/name&until_now=true",
            "WatchEvents",
            {"model": "org/name", "until_now": True},
        ),
        ("GET", "/admin/v1/requests/1f-2e", "ExplainRequest", {"request_id": "1f-2e"}),
        ("GET", "/admin/v1/requests?model=org/name&state=REQUEST_STATE_REFUSED", "ListRequests", {"state": 5}),
        ("GET", "/v1/models", "ListModels", {}),
        ("GET", "/v1/models/org/name", "GetModel", {"model": "org/name"}),
    ],
)
async def test_rest_of_the_proxys_services(
    gateway: Gateway, admin: httpx.AsyncClient, *, method: str, path: str, called: str, fields: dict[str, object]
) -> None:
    body = {name: fields[name] for name in ("replica_count", "dry_run") if name in fields}
    answer = await admin.request(method, path, json=body if method == "POST" else None)
    assert answer.status_code == 200, answer.text
    call = gateway.control.calls[-1]
    assert call.method == called
    assert {name: getattr(call.request, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("method", "path", "called", "fields"),
    [
        ("POST", "/admin/v1/models:ingest", "IngestModel", {"name": "m", "source": "dir:/x"}),
        ("GET", "/admin/v1/models", "ListModels", {}),
        ("GET", "/admin/v1/models/m", "GetModel", {"name": "m"}),
        ("GET", "/admin/v1/models/org/name", "GetModel", {"name": "org/name"}),
        ("GET", "/admin/v1/models/org%2Fname", "GetModel", {"name": "org/name"}),
        ("DELETE", "/admin/v1/models/org/name", "DeleteModel", {"name": "org/name", "dry_run": False}),
        ("DELETE", "/admin/v1/models/org/name?dry_run=true", "DeleteModel", {"name": "org/name", "dry_run": True}),
        ("GET", "/admin/v1/revisions/org/name", "ListRevisions", {"name": "org/name"}),
        ("GET", "/admin/v1/manifests/sha256:abc", "GetManifest", {"revision": "sha256:abc"}),
        ("POST", "/admin/v1/blobs:collect", "CollectBlobs", {"dry_run": True}),
        ("PUT", "/admin/v1/aliases/team/best", "PutAlias", {"alias": "team/best", "model": "org/name"}),
        ("DELETE", "/admin/v1/aliases/team/best", "DeleteAlias", {"alias": "team/best"}),
        ("PUT", "/admin/v1/policies/org/name", "UpdatePolicy", {"name": "org/name", "dry_run": False}),
        ("PUT", "/admin/v1/policies/org/name?dry_run=true", "UpdatePolicy", {"name": "org/name", "dry_run": True}),
        ("PUT", "/admin/v1/engine-settings/org/name", "UpdateEngineSettings", {"name": "org/name"}),
        ("PUT", "/admin/v1/engine-settings/m?dry_run=true", "UpdateEngineSettings", {"name": "m", "dry_run": True}),
        ("PUT", "/admin/v1/policies/m?dry_run=true", "UpdatePolicy", {"name": "m", "dry_run": True}),
    ],
)
async def test_rest_of_the_registry(
    gateway: Gateway, admin: httpx.AsyncClient, *, method: str, path: str, called: str, fields: dict[str, object]
) -> None:
    bodies = {
        "IngestModel": {"name": "m", "source": "dir:/x"},
        "CollectBlobs": {"dry_run": True, "grace": "60s"},
        "PutAlias": {"model": "org/name"},
        "UpdatePolicy": {
            "min_replicas": 1,
            "routing": {"prefix_weight": 0.0, "kv_weight": 0.5, "choice": "REPLICA_CHOICE_POWER_OF_TWO"},
        },
        "UpdateEngineSettings": {
            "kv_cache_bytes": "67108864",
            "prefix_caching": False,
            "compilation": "COMPILATION_MODE_EAGER",
            "speculative_decoding": {"method": "ngram", "token_count": 3},
        },
    }
    gateway.registry.answers["IngestModel"] = [
        registry_service_pb2.IngestModelResponse(progress=registry_service_pb2.IngestProgress(phase="store")),
        registry_service_pb2.IngestModelResponse(done=registry_service_pb2.IngestDone(new_bytes=5)),
    ]
    answer = await admin.request(method, path, json=bodies.get(called))
    assert answer.status_code == 200, answer.text
    call = gateway.registry.calls[-1]
    assert call.method == called
    assert {name: getattr(call.request, name) for name in fields} == fields
    if called == "UpdatePolicy":
        assert call.request.policy.min_replicas == 1
        routing = call.request.policy.routing
        assert (routing.prefix_weight, routing.kv_weight) == (0.0, 0.5)
        assert routing.HasField("prefix_weight")
        assert not routing.HasField("session_weight")
        assert routing.choice == registry_service_pb2.REPLICA_CHOICE_POWER_OF_TWO
    if called == "UpdateEngineSettings":
        settings = call.request.settings
        assert (settings.kv_cache_bytes, settings.compilation) == (64 << 20, engine_settings_pb2.COMPILATION_MODE_EAGER)
        assert settings.HasField("prefix_caching")
        assert not settings.prefix_caching
        assert settings.speculative_decoding.token_count == 3
    if called == "IngestModel":
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.text.count("data: ") == 2


async def test_an_ingest_that_fails_in_mid_stream_ends_with_its_error(
    gateway: Gateway, admin: httpx.AsyncClient
) -> None:
    gateway.registry.answers["IngestModel"] = [
        registry_service_pb2.IngestModelResponse(progress=registry_service_pb2.IngestProgress(phase="store")),
        registry_service_pb2.IngestModelResponse(
            error=registry_service_pb2.IngestError(message="full", type="rate_limit_error", code="disk_full")
        ),
    ]
    gateway.registry.failures["IngestModel"] = errors.DiskFull("full")
    answer = await admin.post("/admin/v1/models:ingest", json={"name": "m", "source": "dir:/x"})
    assert answer.status_code == 200
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.splitlines() if line]
    assert events[-1] == {"error": {"message": "full", "type": "rate_limit_error", "code": "disk_full"}}


async def test_an_empty_post_needs_no_body(gateway: Gateway, admin: httpx.AsyncClient) -> None:
    answer = await admin.post("/admin/v1/models/m:preload")
    assert answer.status_code == 200, answer.text
    assert gateway.control.calls[-1].request.model == "m"


async def test_errors_have_the_same_form(gateway: Gateway, admin: httpx.AsyncClient) -> None:
    gateway.registry.failures["GetModel"] = errors.ModelNotFound("no model m", metadata={"param": "name"})
    answer = await admin.get("/admin/v1/models/m")
    assert answer.status_code == 404
    assert openai_error(answer) == {
        "message": "no model m",
        "type": "invalid_request_error",
        "param": "name",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/admin/v1/models/m:scale", {"replica_count": -1}, 400),
        ("POST", "/admin/v1/models/m:scale", {"replica_count": "many"}, 400),
        ("POST", "/admin/v1/models/m:explode", {}, 404),
        ("POST", "/admin/v1/models/m", {}, 404),
        ("PATCH", "/admin/v1/workers", {}, 405),
        ("POST", "/v1/chat/completions", {"model": "m"}, 404),
    ],
)
async def test_bad_requests_are_clear(
    gateway: Gateway, admin: httpx.AsyncClient, *, method: str, path: str, body: dict[str, object], status: int
) -> None:
    answer = await admin.request(method, path, json=body)
    assert answer.status_code == status
    assert openai_error(answer)["type"] == "invalid_request_error"
    assert not gateway.control.calls
    assert not gateway.replica.calls


async def _get(gateway: Gateway, path: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(base_url=f"http://{gateway.admin}", timeout=10, trust_env=False) as client:
        return await client.get(path, headers=headers)
