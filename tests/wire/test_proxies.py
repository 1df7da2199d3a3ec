"""Two proxies behind one Envoy: each pick goes by what its own proxy has told Envoy, and a hold outlives its proxy."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest
import pytest_asyncio
from envoy.service.auth.v3 import external_auth_pb2_grpc
from envoy.service.ext_proc.v3 import external_processor_pb2_grpc

from helios.api.catalog.v1 import model_service_pb2
from helios.api.inference.v1 import inference_service_pb2
from helios.api.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from helios.mesh.envoy.settings import EdgeSettings, replica_cluster
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.server import MeshServer
from helios.mesh.xds.server import EDS_SERVICE, XdsServer, add_xds
from tests.ports import free_port
from tests.wire import fakes
from tests.wire.gateway import PROXY, REPLICA, START_SECONDS, TOKEN, running_envoy

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.leaks("Envoy keeps connections to the module's fakes, which are in this process"),
]

BODY = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
NAMES = ("a", "b")
CHECK_SERVICE = "envoy.service.auth.v3.Authorization"


@dataclass
class Proxy:
    """One of the proxies: its picker and its feed, always at the same unix socket."""

    name: str
    address: str
    identity: IdentityFiles
    picker: fakes.FakePicker = field(default_factory=fakes.FakePicker)
    check: fakes.FakeCheck = field(default_factory=fakes.FakeCheck)
    xds: XdsServer = field(default_factory=XdsServer)
    control: fakes.Recorder = field(default_factory=fakes.Recorder)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start(self, *endpoints: str) -> None:
        """Serves; it knows nothing of what it told Envoy before."""
        self.xds = XdsServer()
        self.picker = fakes.FakePicker(endpoints=list(endpoints), cluster=replica_cluster(self.name))
        self.check = fakes.FakeCheck(cluster=replica_cluster(self.name))
        self.xds.open()
        self.xds.publish(endpoints)
        served = (CHECK_SERVICE, fakes.EXT_PROC_SERVICE, EDS_SERVICE, "helios.api.catalog.v1.ModelService")
        policy = {service: frozenset({"edge"}) for service in served}
        server = MeshServer(listen=self.address, identity=self.identity, policy=policy, options=PROXY)
        external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(self.picker, server.grpc)
        external_auth_pb2_grpc.add_AuthorizationServicer_to_server(self.check, server.grpc)
        add_xds(self.xds, server.grpc)
        self.control.add(model_service_pb2, "ModelService", server.grpc)
        await self._stack.enter_async_context(server)

    async def stop(self) -> None:
        """Ends it; what it holds breaks off."""
        await self._stack.aclose()


@dataclass
class Gateway:
    """Envoy, two proxies and a replica."""

    edge: str
    proxies: tuple[Proxy, Proxy]
    replica: fakes.FakeReplica
    endpoint: str

    async def fed(self) -> None:
        """Waits until Envoy routes by what each proxy has published."""
        for proxy in self.proxies:
            await proxy.xds.wait_acked(proxy.xds.version, time.monotonic() + START_SECONDS)


@asynccontextmanager
async def serve_replica(replica: fakes.FakeReplica, identity: IdentityFiles) -> AsyncIterator[str]:
    services = ("OpenAIService", "InferenceService")
    policy = {f"helios.api.inference.v1.{name}": frozenset({"edge"}) for name in services}
    server = MeshServer(listen="127.0.0.1:0", identity=identity, policy=policy, options=REPLICA)
    fakes.add_replica(replica, server.grpc)
    async with server:
        yield server.address


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Gateway]:
    directory: Path = tmp_path_factory.mktemp("gw")
    authority = CertificateAuthority.open(directory / "pki")
    leaves = {
        name: authority.issue(name, directory / "pki" / name) for name in ("worker", "proxy", "edge", "admin-edge")
    }
    replica = fakes.FakeReplica()
    async with AsyncExitStack() as stack:
        endpoint = await stack.enter_async_context(serve_replica(replica, leaves["worker"]))
        one, two = (Proxy(name, f"unix:{directory}/{name}.sock", leaves["proxy"]) for name in NAMES)
        for proxy in (one, two):
            await proxy.start(endpoint)
            stack.push_async_callback(proxy.stop)
        settings = EdgeSettings(
            directory=directory / "envoy",
            envoy_admin=f"unix:{directory}/envoy.sock",
            admin_token=TOKEN,
            picker=(one.address, two.address),
            feeds=((one.name, one.address), (two.name, two.address)),
            control=(one.address, two.address),
            registry=(one.address,),
            edge_identity=leaves["edge"],
            admin_identity=leaves["admin-edge"],
            edge_port=free_port(),
            admin_port=free_port(),
            access_log=directory / "access.log",
        )
        envoy = await stack.enter_async_context(running_envoy(settings))
        edge = (await envoy.admin.listeners())["edge"]
        yield Gateway(edge, (one, two), replica, endpoint)


@pytest_asyncio.fixture(loop_scope="module")
async def gateway(shared: Gateway) -> Gateway:
    """Both proxies know the replica, and Envoy knows it of both."""
    for proxy in shared.proxies:
        proxy.picker.hold = proxy.picker.pick = None
        proxy.picker.endpoints = [shared.endpoint]
        proxy.picker.requests.clear()
        proxy.check.requests.clear()
        proxy.check.endpoints = []
        proxy.xds.publish([shared.endpoint])
    await shared.fed()
    return shared


@pytest_asyncio.fixture(loop_scope="module")
async def rest(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://{gateway.edge}", timeout=30, trust_env=False) as client:
        yield client


async def ask(rest: httpx.AsyncClient) -> httpx.Response:
    return await rest.post("/v1/chat/completions", json=BODY)


async def chat(edge: str) -> int:
    """The code of a native request, which goes by the conversation alone."""
    async with grpc.aio.insecure_channel(edge) as channel:
        request = inference_service_pb2.ChatRequest(model="m")
        call = InferenceServiceStub(channel).Chat(request, timeout=20, metadata=(("x-helios-model", "m"),))
        with suppress(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        return int((await call.code()).value[0])


async def test_both_proxies_pick(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    for _ in range(8):
        assert await chat(gateway.edge) == 0
    assert all(proxy.picker.requests and not proxy.check.requests for proxy in gateway.proxies)


async def test_both_proxies_pick_at_once(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    for proxy in gateway.proxies:
        proxy.check.endpoints = [gateway.endpoint]
    for _ in range(8):
        assert (await ask(rest)).status_code == 200
    assert all(proxy.check.requests and not proxy.picker.requests for proxy in gateway.proxies)


async def test_whoever_is_asked_next_picks_what_could_not_be_picked_at_once(
    gateway: Gateway, rest: httpx.AsyncClient
) -> None:
    for _ in range(4):
        assert (await ask(rest)).status_code == 200
    for what in ("check", "picker"):
        assert sum(len(getattr(proxy, what).requests) for proxy in gateway.proxies) == 4


async def test_a_pick_goes_by_what_its_own_proxy_has_told_envoy(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    one, two = gateway.proxies
    await two.xds.wait_acked(two.xds.publish([]), time.monotonic() + START_SECONDS)
    codes: dict[str, set[int]] = {"a": set(), "b": set()}
    answers: dict[str, set[int]] = {"a": set(), "b": set()}
    for _ in range(8):
        before = len(one.picker.requests)
        code = await chat(gateway.edge)
        codes["a" if len(one.picker.requests) > before else "b"].add(code)
    assert codes == {"a": {0}, "b": {14}}
    for proxy in (one, two):
        proxy.check.endpoints = [gateway.endpoint]
    for _ in range(8):
        before = len(one.check.requests)
        answer = await ask(rest)
        answers["a" if len(one.check.requests) > before else "b"].add(answer.status_code)
    assert answers == {"a": {200}, "b": {503}}


async def test_a_pick_that_read_the_body_has_its_cluster_too(gateway: Gateway) -> None:
    async with grpc.aio.insecure_channel(gateway.edge) as channel:
        for _ in range(4):
            request = inference_service_pb2.ChatRequest(model="m")
            messages = [message async for message in InferenceServiceStub(channel).Chat(request, timeout=20)]
            assert messages
    assert sum(len(proxy.picker.bodies) for proxy in gateway.proxies) >= 4


async def test_a_hold_moves_when_its_proxy_goes(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    one, two = gateway.proxies
    held: asyncio.Queue[Proxy] = asyncio.Queue()

    def hold(proxy: Proxy) -> Any:
        async def wait(_: Any) -> None:
            held.put_nowait(proxy)
            await asyncio.Event().wait()

        return wait

    one.picker.hold, two.picker.hold = hold(one), hold(two)
    async with asyncio.TaskGroup() as group, asyncio.timeout(60):
        answer = group.create_task(ask(rest))
        first = await held.get()
        other = two if first is one else one
        other.picker.hold = None
        await first.stop()
        assert (await answer).status_code == 200
        assert len(other.picker.requests) == 1
        # While it is away, the other one has all of them; endpoints of the one that is gone are no matter.
        for _ in range(4):
            assert (await ask(rest)).status_code == 200
        assert len(other.picker.requests) == 5
    await first.start(gateway.endpoint)
    await gateway.fed()


async def test_calls_of_control_go_to_the_proxy_that_is_there(gateway: Gateway, rest: httpx.AsyncClient) -> None:
    one, two = gateway.proxies
    await one.stop()
    try:
        for _ in range(6):
            assert (await rest.get("/v1/models")).status_code == 200
    finally:
        await one.start(gateway.endpoint)
    assert two.control.calls
    await gateway.fed()
