"""API keys through the real Envoy, the real proxy and a registry's real keys: 401, 404, 429 and OpenAI's headers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import httpx
import openai
import pytest

from helios.api.inference.v1 import inference_service_pb2 as inference_pb
from helios.api.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from helios.proxy.settings import AdmissionSettings
from helios.registry.client import KeySpec, Priority
from helios.registry.database import Database
from helios.registry.keys.keys import Keys
from helios.registry.keys.store import KeyStore
from tests.proxy.harness import World
from tests.proxy.test_gateway import Edge, running_edge

pytestmark = pytest.mark.leaks("Envoy keeps connections to servers of this process until it is gone")
CHAT = "/v1/chat/completions"
LIMITS = ("limit", "remaining", "reset")


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Asks again until it holds; fails the test at the deadline."""
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.02)


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@asynccontextmanager
async def guarded_edge(world: World, *, is_required: bool = True) -> AsyncIterator[tuple[Edge, Keys]]:
    """A gateway where keys are required, models m and other, and the registry's real keys."""
    world.registry.put("m")
    world.registry.put("other")
    database = await Database.open(world.directory / "keys.db")
    world.keys = Keys(KeyStore(database))
    try:
        async with running_edge(world, admission=AdmissionSettings(require_keys=is_required)) as edge:
            yield edge, world.keys
            world.keys.close()
    finally:
        await database.close()


async def accepted(client: httpx.AsyncClient, secret: str, model: str = "m") -> httpx.Response:
    """Asks until the proxy has been told of the key."""
    answer = await client.get("/v1/models", headers=bearer(secret))

    async def ask() -> bool:
        nonlocal answer
        answer = await client.get("/v1/models", headers=bearer(secret))
        return answer.status_code == 200

    await until(ask)
    return await client.post(CHAT, json={"model": model, "max_tokens": 50}, headers=bearer(secret))


async def test_a_key_opens_what_it_names_and_its_end_is_told_at_once(world: World) -> None:
    async with guarded_edge(world) as (edge, keys), edge.client() as client:
        _, secret = await keys.create(KeySpec("web", models=("m",)), "test")
        answer = await accepted(client, secret)
        assert answer.status_code == 200, answer.text
        # The replica never sees it, and a key without limits has no such headers.
        assert not [name for name in answer.json()["headers"] if "authorization" in name]
        assert secret not in answer.text
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]
        models = await client.get("/v1/models", headers=bearer(secret))
        assert [model["id"] for model in models.json()["data"]] == ["m"]
        for path in ("/v1/models/other", "/v1/models/nothing"):
            hidden = await client.get(path, headers=bearer(secret))
            assert (hidden.status_code, hidden.json()["error"]["code"]) == (404, "model_not_found")
        refused = await client.post(CHAT, json={"model": "other"}, headers=bearer(secret))
        unknown = await client.post(CHAT, json={"model": "nothing"}, headers=bearer(secret))
        assert refused.status_code == unknown.status_code == 404
        assert refused.json()["error"]["message"] == unknown.json()["error"]["message"].replace("nothing", "other")
        await keys.revoke("web", "test")

        async def is_refused() -> bool:
            return (await client.post(CHAT, json={"model": "m"}, headers=bearer(secret))).status_code == 401

        await until(is_refused)


async def test_without_a_key_or_with_a_wrong_one_clients_get_openais_401(world: World) -> None:
    async with guarded_edge(world) as (edge, keys), edge.client() as client:
        _, secret = await keys.create(KeySpec("web"), "test")
        await accepted(client, secret)
        for headers, code in (({}, "missing_api_key"), (bearer(f"{secret}x"), "invalid_api_key")):
            for answer in (
                await client.post(CHAT, json={"model": "m"}, headers=headers),
                await client.post(CHAT, content=b"no model", headers=headers | {"content-type": "application/json"}),
                await client.get("/v1/models", headers=headers),
            ):
                assert answer.status_code == 401, answer.text
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("authentication_error", code)
            assert answer.headers["content-type"].startswith("application/json")
        api = openai.AsyncOpenAI(base_url=f"http://{edge.address}/v1", api_key="sk-wrong", max_retries=0)
        async with api:
            with pytest.raises(openai.AuthenticationError):
                await api.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
        async with grpc.aio.insecure_channel(edge.address) as channel:
            stub, request = InferenceServiceStub(channel), inference_pb.TokenizeRequest(model="m", text="x")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Tokenize(request, timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            metadata = (("authorization", f"Bearer {secret}"), ("x-helios-model", "m"))
            assert (await stub.Tokenize(request, timeout=20, metadata=metadata)).token_ids
        assert (await client.get("/healthz")).status_code == 200


async def test_limits_are_told_as_openai_tells_them(world: World) -> None:
    async with guarded_edge(world) as (edge, keys), edge.client() as client:
        spec = KeySpec("web", requests_per_minute=3, tokens_per_minute=1000)
        _, secret = await keys.create(spec, "test")
        answer = await accepted(client, secret)
        names = {f"x-ratelimit-{part}-{what}" for part in LIMITS for what in ("requests", "tokens")}
        assert {name for name in answer.headers if name.startswith("x-ratelimit")} == names
        assert answer.headers["x-ratelimit-limit-tokens"] == "1000"
        assert answer.headers["x-ratelimit-remaining-requests"] == "2"
        # 50 are asked for; the prompt is guessed.
        assert 900 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 950
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
        # What it took was less: the replica says so, and the rest is there again.
        starts = edge.worker.starts
        edge.worker.report(starts[0].replica_id, finished=[(answer.headers["x-request-id"], 0)])
        for number in range(2):
            answer = await client.post(CHAT, json={"model": "m", "max_tokens": 2}, headers=bearer(secret))
            assert answer.status_code == 200, number
        full = await client.post(CHAT, json={"model": "m"}, headers=bearer(secret))
        assert (full.status_code, full.json()["error"]["code"]) == (429, "rate_limit_requests")
        assert full.json()["error"]["type"] == "rate_limit_error"
        assert full.headers["x-helios-reason"] == "rate_limit_requests"
        assert full.headers["x-ratelimit-remaining-requests"] == "0"
        assert 1 <= int(full.headers["retry-after"]) <= 20


async def test_a_request_above_the_whole_limit_is_told_so(world: World) -> None:
    async with guarded_edge(world) as (edge, keys), edge.client() as client:
        _, secret = await keys.create(KeySpec("web", tokens_per_minute=100), "test")
        assert (await accepted(client, secret)).status_code == 200
        request = {"model": "m", "max_completion_tokens": 60, "n": 2}
        answer = await client.post(CHAT, json=request, headers=bearer(secret))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "exceeds_token_limit")
        exceeded = await client.post(CHAT, json=request | {"n": 1}, headers=bearer(secret))
        assert (exceeded.status_code, exceeded.json()["error"]["code"]) == (429, "rate_limit_tokens")


async def test_on_loopback_nobody_needs_a_key_and_one_that_is_sent_counts(world: World) -> None:
    async with guarded_edge(world, is_required=False) as (edge, keys), edge.client() as client:
        for headers in ({}, bearer("none"), bearer("sk-other")):
            answer = await client.post(CHAT, json={"model": "m"}, headers=headers)
            assert answer.status_code == 200, answer.text
            assert "authorization" not in answer.json()["headers"]
        _, secret = await keys.create(KeySpec("web", models=("other",)), "test")

        async def is_known() -> bool:
            return (await client.post(CHAT, json={"model": "m"}, headers=bearer(secret))).status_code == 404

        await until(is_known)
        wrong = await client.post(CHAT, json={"model": "m"}, headers=bearer(f"{secret}x"))
        assert wrong.status_code == 401
        # A band of its own: without a key normal at most, with one what the key has at most.
        _, urgent = await keys.create(KeySpec("urgent", priority=Priority.HIGH), "test")
        await accepted(client, urgent)
        for headers, asked, given, band in (
            ({}, "flex", "flex", "1"),
            ({}, "priority", "default", None),
            (bearer(urgent), "priority", "priority", "3"),
            (bearer(urgent), "auto", "priority", "3"),
            (bearer(urgent), "default", "default", "2"),
        ):
            answer = await client.post(CHAT, json={"model": "m", "service_tier": asked}, headers=headers)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-service-tier"] == given
            assert answer.json()["headers"].get("x-helios-priority") == band
        silent = await client.post(CHAT, json={"model": "m", "service_tier": None})
        assert "x-service-tier" not in silent.headers


async def test_a_client_can_not_set_what_the_picker_leaves_for_the_answer(world: World) -> None:
    async with guarded_edge(world, is_required=False) as (edge, _), edge.client() as client:
        forged = {f"x-helios-ratelimit-{part}-tokens": "7" for part in LIMITS}
        answer = await client.post(CHAT, json={"model": "m"}, headers=forged)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if "ratelimit" in name]


async def test_keys_are_known_over_a_restart_without_the_registry(world: World) -> None:
    world.registry.put("m")
    database = await Database.open(world.directory / "keys.db")
    world.keys = Keys(KeyStore(database))
    key, secret = await world.keys.create(KeySpec("web", models=("m*",), requests_per_minute=5), "test")
    path = world.directory / "proxy" / "keys.json"
    async with world.running_registry(), world.running_proxy():

        async def is_told() -> bool:
            is_known = (world.directory / "proxy" / "catalogue.json").exists()
            return is_known and path.exists() and key.id in path.read_text()

        await until(is_told)
        world.keys.close()
    await database.close()
    assert secret not in path.read_text()
    guarded = AdmissionSettings(require_keys=True)
    async with running_edge(world, admission=guarded, registry_target="") as edge, edge.client() as client:
        assert (await client.post(CHAT, json={"model": "m"}, headers=bearer(secret))).status_code == 200
        assert (await client.post(CHAT, json={"model": "m"})).status_code == 401


async def test_a_rest_client_can_say_how_long_it_waits(world: World) -> None:
    world.registry.put("m")
    async with running_edge(world) as edge, edge.client() as client:
        edge.worker.start_seconds = 60
        answer = await client.post(CHAT, json={"model": "m"}, headers={"grpc-timeout": "400m"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "hold_expired")
        assert answer.headers["x-helios-reason"] == "hold_expired"
        assert int(answer.headers["retry-after"]) >= 1
