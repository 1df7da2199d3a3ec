"""REST through the public listener: answers, streams, errors, limits, browsers."""

import asyncio
import gzip
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator

import httpx
import pytest

from helios.mesh import errors
from tests.wire.gateway import Gateway

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]
CHAT = "/v1/chat/completions"
MIB = 1 << 20


def openai_error(answer: httpx.Response) -> dict[str, str | None]:
    """Returns the error object, having checked that it has OpenAI's form and nothing of gRPC around it."""
    assert answer.headers["content-type"] == "application/json", answer.text
    assert not {name for name in answer.headers if name.startswith(("grpc-", "x-openai", "x-envoy"))}
    body = answer.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert isinstance(body["error"], dict)
    return body["error"]


async def test_a_unary_answer_comes_through(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    answer = await rest.post(CHAT, json={"model": "m"})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["replica"] == "replica"
    assert "grpc-status" not in answer.headers
    assert gateway.picker.requests[0].model == "m"
    assert gateway.picker.requests[0].envoy_node == "edge-under-test"


async def test_a_stream_comes_through_event_by_event(rest: httpx.AsyncClient) -> None:
    arrivals = []
    body = {"model": "m", "stream": True, "chunks": 5, "pause": 0.05}
    async with rest.stream("POST", CHAT, json=body) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        chunks = []
        async for chunk in answer.aiter_raw():
            arrivals.append(time.monotonic())
            chunks.append(chunk.decode())
    assert "".join(chunks).split("\n\n")[:-1] == [*(f'data: {{"index":{i}}}' for i in range(5)), "data: [DONE]"]
    assert arrivals[-1] - arrivals[0] > 0.15, "events came in one piece"


async def test_the_picker_learns_how_long_a_body_is(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    body = json.dumps({"model": "m", "messages": ["x" * 5000]}).encode()
    headers = {"content-type": "application/json", "x-helios-body-bytes": "7"}
    assert (await rest.post(CHAT, content=body, headers=headers)).status_code == 200
    assert gateway.picker.requests[-1].headers["x-helios-body-bytes"] == str(len(body))

    async def pieces() -> AsyncIterator[bytes]:
        yield body

    assert (await rest.post(CHAT, content=pieces(), headers=headers)).status_code == 200
    assert "x-helios-body-bytes" not in gateway.picker.requests[-1].headers, "nobody said"


async def test_what_an_ordinary_request_and_its_answer_meet(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    # Neither the script that refuses and shapes errors, nor a JSON parser.
    met = await _met(gateway)
    for body in ({"model": "m"}, {"model": "m", "stream": True}):
        assert (await rest.post(CHAT, json=body)).status_code == 200
    met += Counter({"lua_lift_executions": 2})
    assert await _met(gateway) == met
    assert (await rest.post(f"{CHAT}?beta=true", json={"model": "é"})).status_code == 200
    met += Counter({"lua_lift_executions": 1, "json_to_metadata_rq_success": 1})
    found = await _met(gateway)
    assert found.pop("lua_executions") > met.pop("lua_executions", 0)
    assert found == met


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        ("ModelNotFound", 404, "model_not_found"),
        ("InvalidRequest", 400, "invalid_request"),
        ("QuotaExceeded", 429, "quota_exceeded"),
        ("NoReadyReplica", 503, "no_ready_replica"),
        ("Unauthenticated", 401, "unauthenticated"),
        ("PermissionDenied", 403, "permission_denied"),
        ("DeadlineExceeded", 504, "deadline_exceeded"),
        ("Corrupted", 500, "corrupted"),
    ],
)
@pytest.mark.parametrize("source", ["replica", "picker", "control"])
async def test_an_error_of_the_mesh_has_its_status_and_code(
    gateway: Gateway, rest: httpx.AsyncClient, *, source: str, kind: str, status: int, code: str
) -> None:
    error = getattr(errors, kind)('a "quoted" message\nin two lines, ünïcode', retry_after_seconds=7)
    if source == "control":
        gateway.control.failures["ListModels"] = error
        answer = await rest.get("/v1/models")
    else:
        gateway.picker.pick = (lambda _: error) if source == "picker" else None
        gateway.replica.refusal = error if source == "replica" else None
        answer = await rest.post(CHAT, json={"model": "m"})
    assert answer.status_code == status
    body = openai_error(answer)
    assert body["message"] == 'a "quoted" message\nin two lines, ünïcode'
    assert (body["type"], body["code"]) == (error.openai_type, code)
    assert answer.headers["retry-after"] == "7"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/chat/completions/x", 404, "unknown_url"),
        ("GET", "/", 404, "unknown_url"),
        ("GET", "/favicon.ico", 404, "unknown_url"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/models/m", 404, "unknown_url"),
        ("GET", "/admin/v1/workers", 404, "unknown_url"),
        ("POST", "/admin/v1/models/m:preload", 404, "unknown_url"),
        ("GET", "/admin/v1/models", 404, "unknown_url"),
        ("POST", "/helios.api.admin.v1.AdminService/ListWorkers", 404, "unknown_url"),
        ("POST", "/helios.api.registry.v1.RegistryService/ListModels", 404, "unknown_url"),
        ("POST", "/helios.api.inference.v1.OpenAIService/CreateChatCompletion", 404, "unknown_url"),
        ("POST", "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources", 404, "unknown_url"),
        ("GET", "/v1/../admin/v1/workers", 404, "unknown_url"),
        ("GET", "/v1/%2e%2e/admin/v1/workers", 404, "unknown_url"),
    ],
)
async def test_what_is_not_served_is_an_openai_error(
    gateway: Gateway, rest: httpx.AsyncClient, *, method: str, path: str, status: int, code: str
) -> None:
    answer = await rest.request(method, path, content=b"{}" if method == "POST" else None)
    assert (answer.status_code, openai_error(answer)["code"]) == (status, code)
    assert not gateway.control.calls
    assert not gateway.registry.calls


@pytest.mark.parametrize(
    ("path", "status", "is_admin"),
    [("/nothing", 404, False), (CHAT, 405, False), ("/v1/models", 405, False), ("/admin/v1/workers", 401, True)],
)
async def test_an_error_that_answers_head_has_no_body(
    gateway: Gateway, *, path: str, status: int, is_admin: bool
) -> None:
    # Bytes on the wire, since HTTP clients skip a body here and read the next answer wrong instead.
    reader, writer = await asyncio.open_connection(*(gateway.admin if is_admin else gateway.edge).split(":"))
    writer.write(f"HEAD {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
    async with asyncio.timeout(10):
        answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert body == b""


async def test_an_upgrade_is_refused_without_blaming_the_host(rest: httpx.AsyncClient) -> None:
    answer = await rest.get("/v1/realtime", headers={"connection": "upgrade", "upgrade": "websocket"})
    assert answer.status_code == 403
    assert "Host" not in str(openai_error(answer)["message"])


async def test_an_encoded_body_is_415(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    answer = await rest.post(CHAT, content=gzip.compress(b'{"model":"m"}'), headers=headers)
    assert (answer.status_code, openai_error(answer)["code"]) == (415, "unsupported_media_type")
    assert "gzip" in str(openai_error(answer)["message"])
    assert not gateway.picker.requests


@pytest.mark.parametrize("path", ["/v1/models/%ff", "/v1/models/a%80b"])
async def test_a_name_that_is_not_utf8_is_400(gateway: Gateway, rest: httpx.AsyncClient, path: str) -> None:
    answer = await rest.get(path)
    assert (answer.status_code, openai_error(answer)["code"]) == (400, "invalid_request")
    assert not gateway.control.calls


async def test_headers_below_the_edges_limit_reach_the_servers(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    # A fourth of it would already be too much for gRPC's default.
    assert (await rest.get("/v1/models", headers={"cookie": "x" * 50_000})).status_code == 200
    assert (await rest.post(CHAT, json={"model": "m"}, headers={"cookie": "x" * 50_000})).status_code == 200
    assert gateway.replica.calls


async def test_http_1_0_is_served(gateway: Gateway) -> None:
    # ab, and nginx as a reverse proxy without proxy_http_version.
    reader, writer = await asyncio.open_connection(*gateway.edge.split(":"))
    writer.write(b"GET /v1/models HTTP/1.0\r\n\r\n")
    async with asyncio.timeout(10):
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert b" 200 OK" in head
    assert json.loads(body)["data"] == []


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "multipart/form-data; boundary=x"],
)
async def test_a_body_that_is_not_json_by_its_type_is_415(
    gateway: Gateway, rest: httpx.AsyncClient, content_type: str
) -> None:
    answer = await rest.post(CHAT, content=b'{"model":"m"}', headers={"content-type": content_type})
    assert (answer.status_code, openai_error(answer)["code"]) == (415, "unsupported_media_type")
    assert not gateway.replica.calls


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/json ;charset=utf-8", None]
)
async def test_json_is_recognised(gateway: Gateway, rest: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {"content-type": content_type} if content_type else {}
    answer = await rest.post(CHAT, content=b'{"model":"m"}', headers=headers)
    assert answer.status_code == 200
    assert gateway.picker.requests[0].model == "m"


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","max_tokens":5,"n":2,"user":"u","service_tier":"flex","prompt_cache_key":"k"}',
        b'{\r\n\t"messages" : [ {"role":"user", "content":"\\"model\\":\\"x\\" \\\\"} ] ,\n "model" : "org/name" }\n',
        b'{"tools":[{"model":"x","max_tokens":9}],"model":"m","metadata":{"user":"x"}}',
        b'{"model":"a\\/b","user":"\\u00e9"}',
        '{"model":"é","user":"ü"}'.encode(),
        b'{"mode\\u006c":"m"}',
        b'{"model":"m","max_tokens":1.5,"n":-1}',
        b'{"model":"m","max_tokens":1000000000000001,"user":null,"n":true}',
        b'{"model":"m","user":"' + b"u" * 300 + b'"}',
        b'{"model":"m","user":"","max_tokens":0}',
        b'{"model":"m","x":' + b"[" * 70 + b"]" * 70 + b"}",
        b'{"model":"m","user":"u","user":"v"}',
    ],
    ids=lambda body: repr(body)[:30],
)
async def test_what_is_read_of_a_body_is_what_a_parser_reads(
    gateway: Gateway, rest: httpx.AsyncClient, body: bytes
) -> None:
    # Without a content type it goes to Envoy's parser at once.
    for headers in ({"content-type": "application/json"}, {}):
        assert (await rest.post(CHAT, content=body, headers=headers)).status_code == 200
    read, parsed = (request.lifted for request in gateway.picker.requests[:2])
    assert read == parsed
    assert parsed["model"] == json.loads(body)["model"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[1,,2],"model":"m"}',
        b'{"model":"m","messages":[{"role":"user"},]}',
        b'{"model":"m","messages":[{"role" "user"}]}',
        b'{"model":"m","prompt":"two\nlines"}',
        b'{"model":"m"}}',
        b'{"model":"m",}',
    ],
)
async def test_of_what_is_no_json_nothing_is_read(gateway: Gateway, rest: httpx.AsyncClient, body: bytes) -> None:
    # So the picker reads it, and says what is wrong with it before anything is started for it.
    for headers in ({"content-type": "application/json"}, {}):
        await rest.post(CHAT, content=body, headers=headers)
    assert [request.lifted for request in gateway.picker.requests] == [{}, {}]
    assert gateway.picker.bodies[0].endswith(body)


async def test_of_duplicate_model_keys_the_last_one_is_lifted(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    await rest.post(CHAT, content=b'{"model":"first","model":"last"}', headers={"content-type": "application/json"})
    assert gateway.picker.requests[0].model == "last"


@pytest.mark.parametrize("body", [b"{", b"", b"[]", b'{"model": 7}', b"null", b'{"messages": []}'])
async def test_a_body_without_a_model_reaches_the_picker_as_such(
    gateway: Gateway, rest: httpx.AsyncClient, body: bytes
) -> None:
    gateway.picker.pick = lambda _: errors.InvalidRequest("no model")
    answer = await rest.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert openai_error(answer)["message"] == "no model"
    assert gateway.picker.requests[0].model in {"", "7"}


async def test_the_picker_may_ask_for_the_body(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    answer = await rest.post(CHAT, content=b'{"x": 1}', headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert gateway.picker.bodies[0].endswith(b'{"x": 1}')


async def test_a_body_of_32_mib_passes(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    shell = b'{"model":"m","text":""}'
    # The gRPC frame and HttpBody's own fields count, too: 64 bytes are ample.
    padding = b"a" * (32 * MIB - len(shell) - 64)
    body = shell[:-2] + padding + shell[-2:]
    answer = await rest.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["size"] == len(body)
    assert gateway.picker.requests[0].model == "m"


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_a_body_of_40_mib_is_413(gateway: Gateway, rest: httpx.AsyncClient, *, is_chunked: bool) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b'{"model":"m","text":"'
        for _ in range(40):
            yield b"a" * MIB
        yield b'"}'

    content = chunks() if is_chunked else b'{"model":"m","text":"' + b"a" * (40 * MIB) + b'"}'
    answer = await rest.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, openai_error(answer)["code"]) == (413, "request_too_large")
    assert not gateway.replica.calls


async def test_a_client_that_leaves_cancels_the_replica(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    gateway.replica.cancelled.clear()
    async with rest.stream("POST", CHAT, json={"model": "m", "stream": True, "chunks": 1000, "pause": 0.05}) as answer:
        await anext(answer.aiter_raw())
    async with asyncio.timeout(5):
        await gateway.replica.cancelled.wait()


async def test_an_endpoint_that_is_gone_is_a_clean_503(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    gateway.picker.endpoints = ["127.0.0.1:1"]
    answer = await rest.post(CHAT, json={"model": "m"})
    assert (answer.status_code, openai_error(answer)["code"]) == (503, "unavailable")
    assert answer.headers["retry-after"]
    assert not gateway.replica.calls


async def test_a_dead_endpoint_is_passed_over(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    await gateway.publish("127.0.0.1:1", gateway.replica_address)
    gateway.picker.endpoints = ["127.0.0.1:1", gateway.replica_address]
    answer = await rest.post(CHAT, json={"model": "m"})
    assert (answer.status_code, answer.json()["replica"]) == (200, "replica")


async def test_the_last_refusal_is_the_replicas_own(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    gateway.replica.refusal = errors.Draining("going away", retry_after_seconds=3)
    answer = await rest.post(CHAT, json={"model": "m"})
    assert (answer.status_code, openai_error(answer)["message"]) == (503, "going away")
    assert len(gateway.replica.calls) == 1, "one candidate, no retry"


async def test_models_are_listed_without_the_picker(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    answer = await rest.get("/v1/models")
    assert answer.status_code == 200
    assert answer.json()["data"] == []
    assert not gateway.picker.requests


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("m", "m"),
        ("org/name", "org/name"),
        ("org%2Fname", "org/name"),
        ("a/b/c.gguf", "a/b/c.gguf"),
        ("m?beta=true", "m"),
    ],
)
async def test_a_models_name_may_hold_slashes(gateway: Gateway, rest: httpx.AsyncClient, path: str, model: str) -> None:
    answer = await rest.get(f"/v1/models/{path}")
    assert answer.status_code == 200
    assert gateway.control.calls[0].request.model == model


@pytest.mark.parametrize(
    "headers", [{"x_helios_endpoint": "x"}, {"x-big": "a" * 70_000}], ids=["underscore", "too large"]
)
async def test_headers_that_are_refused_reach_nobody(
    gateway: Gateway, rest: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    answer = await rest.post(CHAT, json={"model": "m"}, headers=headers)
    assert answer.status_code in {400, 431}
    assert openai_error(answer)["type"] == "invalid_request_error"
    assert not gateway.picker.requests


async def test_healthz_is_ok(rest: httpx.AsyncClient) -> None:
    assert (await rest.get("/healthz")).status_code == 200


async def test_a_preflight_lets_browsers_in(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    headers = {
        "origin": "https://app.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
    }
    answer = await rest.options(CHAT, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in answer.headers["access-control-allow-methods"]
    allowed = {name.strip() for name in answer.headers["access-control-allow-headers"].split(",")}
    assert {"authorization", "content-type", "*"} <= allowed
    assert "access-control-allow-credentials" not in answer.headers
    assert not gateway.picker.requests


@pytest.mark.parametrize(("path", "status"), [(CHAT, 200), ("/v1/nothing", 404)])
async def test_answers_and_errors_are_readable_across_origins(rest: httpx.AsyncClient, path: str, status: int) -> None:
    answer = await rest.post(path, json={"model": "m"}, headers={"origin": "https://app.example"})
    assert answer.status_code == status
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "retry-after" in answer.headers["access-control-expose-headers"]


async def test_the_access_log_names_the_request(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    answer = await rest.post(CHAT, json={"model": "logged"}, headers={"x-request-id": "mine"})
    wanted = answer.headers["x-request-id"]
    deadline = time.monotonic() + 15
    lines: list[dict[str, str]] = []
    while not lines and time.monotonic() < deadline:
        text = (gateway.directory / "access.log").read_text()
        lines = [line for line in map(json.loads, text.splitlines()) if line.get("request_id") == wanted]
        await asyncio.sleep(0.2)
    assert lines[0]["model"] == "logged"
    assert lines[0]["path"] == CHAT
    assert lines[0]["client_request_id"] == "mine"
    assert lines[0]["endpoint"] == gateway.replica_address


async def _met(gateway: Gateway) -> Counter[str]:
    """How many requests have met which of these, and that no script has failed."""
    assert gateway.envoy is not None
    values: Counter[str] = Counter()
    for line in (await gateway.envoy.admin.prometheus()).splitlines():
        if found := re.fullmatch(r"envoy_(?:http_)?((?:lua|json_to_metadata)_\w+)\{.*\} (\d+)", line):
            values[found[1]] += int(found[2])
    assert not any(values[f"{script}_errors"] for script in ("lua", "lua_lift", "lua_lane"))
    return Counter(
        {name: values[name] for name in ("lua_executions", "lua_lift_executions", "json_to_metadata_rq_success")}
    )
