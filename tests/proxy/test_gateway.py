"""The real proxy behind the real Envoy: hold at zero, end to end, with a fake replica that answers for real."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from helios.api.inference.v1 import inference_service_pb2 as inference_pb
from helios.api.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from helios.mesh.envoy import rest, routes
from helios.mesh.envoy.settings import EdgeSettings
from helios.mesh.server import MeshServer
from helios.mesh.status import error_from_rpc
from helios.proxy.settings import HoldSettings
from tests.ports import free_port
from tests.proxy.fakes import READY, FakeWorker, until
from tests.proxy.harness import Proxy, World
from tests.wire.fakes import FakeReplica, add_replica
from tests.wire.gateway import QUICK, running_envoy

pytestmark = pytest.mark.leaks("Envoy keeps connections to servers of this process until it is gone")
INFERENCE = frozenset({"edge"})
TOKEN = "token-of-this-test-0123456789"
CHAT = "/helios.api.inference.v1.InferenceService/Chat"
GRPCURL = Path(sys.executable).with_name("grpcurl")


@dataclass
class Edge:
    """A gateway with a real proxy."""

    world: World
    proxy: Proxy
    worker: FakeWorker
    replica: FakeReplica
    address: str
    admin_address: str

    @asynccontextmanager
    async def client(self) -> AsyncIterator[httpx.AsyncClient]:
        """A REST client."""
        async with httpx.AsyncClient(base_url=f"http://{self.address}", timeout=20, trust_env=False) as client:
            yield client


@asynccontextmanager
async def replica_server(world: World, replica: FakeReplica) -> AsyncIterator[str]:
    """Serves a fake replica; gives its address."""
    names = ("helios.api.inference.v1.OpenAIService", "helios.api.inference.v1.InferenceService")
    server = MeshServer(
        listen="127.0.0.1:0",
        identity=world.identity("worker"),
        policy=dict.fromkeys(names, INFERENCE),
        options=QUICK,
    )
    add_replica(replica, server.grpc)
    async with server:
        yield server.address


@asynccontextmanager
async def running_edge(world: World, **overrides: object) -> AsyncIterator[Edge]:
    """Starts everything."""
    async with AsyncExitStack() as stack:
        replica = FakeReplica()
        address = await stack.enter_async_context(replica_server(world, replica))
        await stack.enter_async_context(world.running_registry())
        proxy = await stack.enter_async_context(world.running_proxy(**overrides))
        worker = FakeWorker(address=lambda: address)
        await stack.enter_async_context(world.worker(proxy, worker))
        settings = EdgeSettings(
            directory=world.directory / "envoy",
            envoy_admin=f"unix:{world.directory}/envoy.sock",
            admin_token=TOKEN,
            picker=(proxy.picker_address,),
            control=(proxy.control_address,),
            registry=(world.registry_target,),
            edge_identity=world.identity("edge"),
            admin_identity=world.identity("admin-edge"),
            edge_port=free_port(),
            admin_port=free_port(),
            access_log=world.directory / "access.log",
        )
        admin = await stack.enter_async_context(running_envoy(settings))
        listeners = await admin.admin.listeners()
        yield Edge(world, proxy, worker, replica, listeners["edge"], listeners["admin"])


async def test_a_rest_request_at_zero_is_held_and_answered(world: World) -> None:
    world.registry.put("m", aliases=["alias"])
    async with running_edge(world) as edge, edge.client() as client:
        edge.worker.start_seconds = 0.3
        answers = []
        async with asyncio.TaskGroup() as group:
            answers = [
                group.create_task(client.post("/v1/chat/completions", json={"model": name})) for name in ("m", "alias")
            ]
        for name, answer in zip(("m", "alias"), answers, strict=True):
            assert answer.result().status_code == 200, answer.result().text
            headers = answer.result().json()["headers"]
            assert headers["x-helios-route-model"] == name
            assert headers["x-helios-route-revision"] == "sha256:1"
        assert len(edge.worker.starts) == 1
        models = await client.get("/v1/models")
        assert [(model["id"], model["object"]) for model in models.json()["data"]] == [("m", "model")]
        assert (await client.get("/v1/models/alias")).json()["id"] == "m"


async def test_an_unknown_model_is_404_and_a_bad_body_400(world: World) -> None:
    world.registry.put("m")
    async with running_edge(world) as edge, edge.client() as client:
        unknown = await client.post("/v1/chat/completions", json={"model": "nope"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
        json_type = {"content-type": "application/json"}
        for body in (b"{", b"{}", b"", b'{"model": 3}', b"[]"):
            answer = await client.post("/v1/chat/completions", content=body, headers=json_type)
            assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error"), body
        for name in ("x" * 100_000, "a\nb\0c", "é—\U0001f600", "../../etc/passwd"):
            answer = await client.post("/v1/chat/completions", json={"model": name})
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name[:50]
            async with grpc.aio.insecure_channel(edge.address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await InferenceServiceStub(channel).Tokenize(
                        inference_pb.TokenizeRequest(model=name, text="x"), timeout=10
                    )
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND, name[:50]
        assert edge.worker.starts == []
        for wrong in ("fast", 3):
            for is_streamed in (False, True):
                tiered = {"model": "m", "service_tier": wrong, "stream": is_streamed}
                answer = await client.post("/v1/chat/completions", json=tiered)
                error = answer.json()["error"]
                assert (answer.status_code, error["type"], error["param"]) == (
                    400,
                    "invalid_request_error",
                    "service_tier",
                )


async def test_native_grpc_is_routed_with_and_without_the_header(world: World) -> None:
    world.registry.put("m")
    async with running_edge(world) as edge, grpc.aio.insecure_channel(edge.address) as channel:
        stub = InferenceServiceStub(channel)
        request = inference_pb.TokenizeRequest(model="m", text="hello")
        assert list((await stub.Tokenize(request, timeout=10)).token_ids) == [1, 2, 3]
        header = (("x-helios-model", "m"),)
        assert list((await stub.Tokenize(request, timeout=10, metadata=header)).token_ids) == [1, 2, 3]
        assert [call.metadata["x-helios-route-model"] for call in edge.replica.calls] == ["m", "m"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(inference_pb.TokenizeRequest(model="nope", text="x"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        # The details survive: a gRPC client sees the reason.
        assert error_from_rpc(caught.value).reason == "MODEL_NOT_FOUND"
        call = stub.Tokenize(request, timeout=10, metadata=(("x-service-tier", "flex"),))
        assert list((await call).token_ids) == [1, 2, 3]
        assert dict(await call.initial_metadata())["x-service-tier"] == "flex"
        assert edge.replica.calls[-1].metadata["x-helios-priority"] == "1"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Tokenize(request, timeout=10, metadata=(("x-service-tier", "fast"),))
        assert error_from_rpc(caught.value).reason == "INVALID_VALUE"


async def test_a_hold_that_expires_is_a_clean_503(world: World) -> None:
    world.registry.put("m")
    async with running_edge(world, hold=HoldSettings(limit_seconds=0.4)) as edge, edge.client() as client:
        edge.worker.start_seconds = 20
        answer = await client.post("/v1/chat/completions", json={"model": "m"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "hold_expired")
        assert int(answer.headers["retry-after"]) >= 1


async def test_a_client_that_leaves_ends_its_hold(world: World) -> None:
    world.registry.put("m")
    limits = HoldSettings(limit_seconds=15, model_count=1)
    async with running_edge(world, hold=limits) as edge, edge.client() as client:
        edge.worker.start_seconds = 1.0
        with pytest.raises(httpx.ReadTimeout):
            await client.post("/v1/chat/completions", json={"model": "m"}, timeout=0.3)
        async with asyncio.timeout(5):
            assert (await client.post("/v1/chat/completions", json={"model": "m"})).status_code == 200


async def look(edge: Edge, client: httpx.AsyncClient) -> None:
    """Looks at everything that there is to be looked at: every GET of the proxy at both addresses, and health."""
    for path in ("/healthz", "/v1/models", "/v1/models/m"):
        assert (await client.get(path)).status_code == 200, path
    authorized = {"authorization": f"Bearer {TOKEN}"}
    reads = [p for p, methods in rest.literal_paths((routes.ADMIN_SERVICE,)).items() if "GET" in methods]
    assert len(reads) >= 5
    for path in (*reads, "/v1/models/m"):
        # Events are watched for ever unless they are to end.
        answer = await client.get(
            f"http://{edge.admin_address}{path}", params={"until_now": "true"}, headers=authorized
        )
        assert answer.status_code == 200, (path, answer.text)
    async with grpc.aio.insecure_channel(edge.address) as channel:
        service = "helios.api.catalog.v1.ModelService"
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=10)


async def test_looking_is_no_use_of_a_model(world: World) -> None:
    """Whoever watches a model must neither start it nor keep it up: it would never be at zero."""
    world.registry.put("m")
    # The replica reports nothing, so that what was picked counts as under way for a while.
    async with running_edge(world, idle_timeout_seconds=1, reservation_seconds=1) as edge, edge.client() as client:
        await look(edge, client)
        assert edge.worker.starts == []
        assert (await client.post("/v1/chat/completions", json={"model": "m"})).status_code == 200
        assert len(edge.worker.starts) == 1
        async with asyncio.timeout(20):
            while edge.worker.replicas:
                await look(edge, client)
        await look(edge, client)
        assert len(edge.worker.starts) == 1


@asynccontextmanager
async def envoy_of(world: World) -> AsyncIterator[httpx.AsyncClient]:
    """An Envoy that outlives the proxy, and a client of it; the registry runs, too."""
    settings = EdgeSettings(
        directory=world.directory / "envoy",
        envoy_admin=f"unix:{world.directory}/envoy.sock",
        admin_token=TOKEN,
        picker=(f"unix:{world.directory}/picker.sock",),
        control=(f"unix:{world.directory}/control.sock",),
        registry=(world.registry_target,),
        edge_identity=world.identity("edge"),
        admin_identity=world.identity("admin-edge"),
        edge_port=free_port(),
        admin_port=free_port(),
        access_log=world.directory / "access.log",
    )
    async with running_envoy(settings) as envoy:
        edge = (await envoy.admin.listeners())["edge"]
        async with httpx.AsyncClient(base_url=f"http://{edge}", timeout=20, trust_env=False) as client:
            yield client


async def test_a_request_that_is_held_outlives_a_restart_of_the_proxy(world: World) -> None:
    world.registry.put("m")
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(replica_server(world, FakeReplica()))
        await stack.enter_async_context(world.running_registry())
        client = await stack.enter_async_context(envoy_of(world))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        worker = FakeWorker(start_seconds=60)
        async with world.running_proxy() as proxy, world.worker(proxy, worker):
            held = group.create_task(client.post("/v1/chat/completions", json={"model": "m"}))
            await until(lambda: worker.replicas)
            await until((world.directory / "proxy" / "workers.json").exists)
        await asyncio.sleep(0.3)
        assert not held.done()
        async with world.running_proxy() as proxy, world.worker(proxy, worker):
            (replica_id,) = worker.replicas
            worker.change(replica_id, state=READY, address=address)
            assert (await held).status_code == 200
        assert len(worker.starts) == 1


async def test_a_request_that_comes_while_the_proxy_is_away_is_answered(world: World) -> None:
    world.registry.put("m")
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(replica_server(world, FakeReplica()))
        await stack.enter_async_context(world.running_registry())
        client = await stack.enter_async_context(envoy_of(world))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        worker = FakeWorker(address=lambda: address)
        async with world.running_proxy() as proxy, world.worker(proxy, worker):
            assert (await client.post("/v1/chat/completions", json={"model": "m"})).status_code == 200
            await until((world.directory / "proxy" / "workers.json").exists)
        during = group.create_task(client.post("/v1/chat/completions", json={"model": "m"}))
        await asyncio.sleep(0.2)
        async with world.running_proxy() as proxy, world.worker(proxy, worker):
            assert (await during).status_code == 200
        assert len(worker.starts) == 1


async def grpcurl(*arguments: str) -> tuple[int, str]:
    """Runs grpcurl; returns its status and all it printed."""
    process = await asyncio.create_subprocess_exec(
        GRPCURL, "-plaintext", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    async with asyncio.timeout(20):
        output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_grpcurl_sees_public_services_on_the_edge_and_all_on_the_admin_edge(world: World) -> None:
    world.registry.put("m")
    token = ("-H", f"authorization: Bearer {TOKEN}")
    async with running_edge(world) as edge:
        _, public = await grpcurl(edge.address, "list")
        assert "helios.api.inference.v1.OpenAIService" in public
        assert "helios.api.catalog.v1.ModelService" in public
        assert "Admin" not in public
        assert "Registry" not in public
        status, described = await grpcurl(edge.address, "describe", "helios.api.inference.v1.InferenceService.Chat")
        assert (status, "ChatRequest" in described) == (0, True)
        status, hidden = await grpcurl(edge.address, "describe", "helios.api.admin.v1.AdminService")
        assert status != 0, hidden
        status, model = await grpcurl(
            "-d", '{"model": "m"}', edge.address, "helios.api.catalog.v1.ModelService/GetModel"
        )
        assert status == 0, model
        assert json.loads(model)["id"] == "m"
        _, everything = await grpcurl(*token, edge.admin_address, "list")
        assert "helios.api.admin.v1.AdminService" in everything
        assert "helios.api.registry.v1.RegistryService" in everything
        status, workers = await grpcurl(*token, edge.admin_address, "helios.api.admin.v1.AdminService/ListWorkers")
        assert status == 0, workers
        assert json.loads(workers)["workers"][0]["workerId"] == "w1"
        status, started = await grpcurl(
            *token, "-d", '{"model": "m"}', edge.admin_address, "helios.api.admin.v1.AdminService/PreloadModel"
        )
        assert status == 0, started
        assert len(json.loads(started)["replicas"]) == 1


@pytest.mark.parametrize("words", [10, 6000], ids=["sent along", "asked for"])
async def test_a_conversation_stays_where_its_beginning_is(world: World, words: int) -> None:
    async with AsyncExitStack() as stack:
        edge = await stack.enter_async_context(running_edge(world))
        second = FakeReplica(name="second")
        addresses = iter([edge.worker.address(), await stack.enter_async_context(replica_server(world, second))])
        edge.worker.address = lambda: next(addresses)
        world.registry.put("m", min_replicas=2)
        client = await stack.enter_async_context(edge.client())
        envoy = await stack.enter_async_context(world.envoy(edge.proxy))
        await until(lambda: len(envoy.endpoints) == 2)
        places: dict[int, list[str]] = {}
        for turn in range(3):
            for talk in range(6):
                messages = [{"role": "system", "content": f"Talk number {talk}. " * 60}]
                # 2 KiB, or 200 in the end: near to what is looked at.
                messages += [{"role": "user", "content": "And then? " * words}] * (turn + 1)
                answer = await client.post("/v1/chat/completions", json={"model": "m", "messages": messages})
                assert answer.status_code == 200, answer.text
                places.setdefault(talk, []).append(answer.json()["replica"])
        assert all(len(set(place)) == 1 for place in places.values()), places
        assert {place[0] for place in places.values()} == {"replica", "second"}, "and all are not in one place"


async def test_bodies_arrive_whole_whether_the_picker_sees_them_or_not(world: World) -> None:
    world.registry.put("m")
    async with running_edge(world) as edge, edge.client() as client:
        for size in (100, 499, 500, 511, 512, 4000, 15_999, 16_000, 100_000):
            frame = len(json.dumps({"model": "m", "messages": [{"role": "user", "content": ""}]}))
            text = "x" * (size - frame)
            for path in ("chat/completions", "completions"):
                body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]})
                answer = await client.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
                assert answer.status_code == 200, (size, answer.text)
                assert answer.json()["size"] == size == len(body)
        # Refusals are read before the body is.
        long = json.dumps({"model": "nope", "messages": [{"role": "user", "content": "x" * 4000}]})
        unknown = await client.post("/v1/completions", content=long, headers={"content-type": "application/json"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_replica_that_cannot_be_reached_is_given_up_by_what_envoy_says(world: World) -> None:
    def reservations() -> float | None:
        return REGISTRY.get_sample_value("helios_reservations")

    hold = HoldSettings(limit_seconds=0.5)
    async with running_edge(world, reservation_seconds=3600, hold=hold) as edge, edge.client() as client:
        # Nobody listens there, and its worker is well.
        edge.worker.address = lambda: f"127.0.0.1:{free_port()}"
        world.registry.put("m", min_replicas=1)
        envoy = await (stack := AsyncExitStack()).enter_async_context(world.envoy(edge.proxy))
        async with stack:
            await until(lambda: len(envoy.endpoints) == 1)
            reasons: list[str | None] = []
            async with asyncio.timeout(30):
                # Requests may wait at first, too, until the real Envoy has the endpoint.
                while None not in reasons or reasons[-1] != "hold_expired":
                    answer = await client.post("/v1/completions", json={"model": "m", "prompt": "x"})
                    assert answer.status_code == 503, answer.text
                    reasons.append(answer.headers.get("x-helios-reason"))
            assert reasons.count(None) >= 3, "the breaker opens at the third"
            await until(lambda: reservations() == 0)


async def test_a_prompt_is_asked_for_where_it_matters_only(world: World) -> None:
    world.registry.put("m", min_replicas=1)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(world.running_registry())
        proxy = await stack.enter_async_context(world.running_proxy())
        envoy = await stack.enter_async_context(world.envoy(proxy))
        addresses = iter(("10.0.0.1:1", "10.0.0.2:1"))
        await stack.enter_async_context(world.worker(proxy, FakeWorker(address=lambda: next(addresses))))
        await until(lambda: len(envoy.endpoints) == 1)
        assert not (await envoy.ask("m", body=b"never read")).asked_body, "one replica"
        world.registry.put("m", min_replicas=2)
        await until(lambda: len(envoy.endpoints) == 2)
        answer = await envoy.ask("m", body=b"no frame", headers={"content-length": "1000"})
        assert (answer.asked_body, answer.status) == (True, 200), "what is wrong with it is the replica's to say"
        for headers in (
            {"x-helios-body-bytes": "300000"},
            {"content-length": "511"},
            {"content-length": "0"},
            {"content-length": ""},
        ):
            assert not (await envoy.ask("m", body=b"", headers=headers)).asked_body, headers
        embeddings = "/helios.api.inference.v1.OpenAIService/CreateEmbedding"
        lengthy = {"content-length": "1000"}
        assert not (await envoy.ask("m", body=b"", path=embeddings, headers=lengthy)).asked_body
