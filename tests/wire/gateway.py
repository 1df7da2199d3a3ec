"""A real Envoy in front of fakes, on ephemeral ports, over real mTLS."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from envoy.service.ext_proc.v3 import external_processor_pb2_grpc

from helios.api.admin.v1 import admin_service_pb2
from helios.api.catalog.v1 import model_service_pb2
from helios.api.proxy.v1.lane_service_pb2_grpc import add_LaneServiceServicer_to_server
from helios.api.registry.v1 import artifact_service_pb2, registry_service_pb2
from helios.mesh.envoy.admin import EnvoyAdmin
from helios.mesh.envoy.bootstrap import install
from helios.mesh.envoy.process import command
from helios.mesh.envoy.settings import EdgeSettings, Limits
from helios.mesh.identity import CertificateAuthority
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.xds.server import ADS_SERVICE, XdsServer, add_xds
from helios.mesh.xds.state import Endpoint, ExpressRoute
from tests.ports import free_port
from tests.wire import fakes

TOKEN = "test-token-0123456789abcdef"
START_SECONDS = 20.0
STOP_SECONDS = 10.0
QUICK = ServerOptions(drain_seconds=0.2)
# As the real ones have it: replicas and proxy on http2, the picker without a table of headers.
REPLICA = ServerOptions(drain_seconds=0.2, transport="http2")
PROXY = ServerOptions(drain_seconds=0.2, transport="http2", header_table_bytes=0)


@dataclass
class Gateway:
    """A running gateway and its fakes."""

    directory: Path
    authority: CertificateAuthority
    picker: fakes.FakePicker = field(default_factory=fakes.FakePicker)
    lane: fakes.FakeLane = field(default_factory=fakes.FakeLane)
    replica: fakes.FakeReplica = field(default_factory=fakes.FakeReplica)
    control: fakes.Recorder = field(default_factory=fakes.Recorder)
    registry: fakes.Recorder = field(default_factory=fakes.Recorder)
    xds: XdsServer = field(default_factory=XdsServer)
    edge: str = ""
    admin: str = ""
    envoy: "RunningEnvoy | None" = None
    replica_address: str = ""
    proxy_address: str = ""
    settings: EdgeSettings = field(init=False)
    _proxy: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def start_proxy(self) -> None:
        """Starts a proxy with what ``picker``, ``control`` and ``xds`` are now, always at the same unix socket."""
        server = await self._proxy.enter_async_context(_proxy(self))
        self.proxy_address = server.address

    async def stop_proxy(self) -> None:
        """Stops it; holds and ADS streams break."""
        await self._proxy.aclose()

    async def publish(self, *endpoints: str) -> None:
        """Publishes endpoints and waits until Envoy routes by them."""
        await self.xds.wait_acked(self.xds.publish(endpoints), time.monotonic() + 10)

    async def publish_express(self, *names: str) -> None:
        """Puts models into the express lane, all of them the first replica's, and waits until Envoy routes by it."""
        endpoint = Endpoint.parse(self.replica_address)
        await self.publish_routes(*(ExpressRoute(name, endpoint, "sha256:1", name) for name in names))

    async def publish_routes(self, *routes: ExpressRoute) -> None:
        """Says what is in the express lane, and waits until Envoy routes by it."""
        version = self.xds.publish_express(routes)
        await self.xds.wait_express_acked(version, time.monotonic() + START_SECONDS)

    @asynccontextmanager
    async def serve_replica(self, replica: fakes.FakeReplica) -> AsyncIterator[str]:
        """Starts one more replica; gives its address."""
        server = MeshServer(
            listen="127.0.0.1:0",
            identity=self.authority.issue("worker", self.directory / "pki" / "worker"),
            policy={
                "helios.api.inference.v1.OpenAIService": frozenset({"edge"}),
                "helios.api.inference.v1.InferenceService": frozenset({"edge"}),
            },
            options=REPLICA,
        )
        fakes.add_replica(replica, server.grpc)
        server.serve("helios.api.inference.v1.OpenAIService")
        async with server:
            yield server.address


@asynccontextmanager
async def running_gateway(directory: Path, *, limits: Limits | None = None) -> AsyncIterator[Gateway]:
    """Starts fakes and Envoy, stops them by their handles. Needs about half a second."""
    gateway = Gateway(directory, CertificateAuthority.open(directory / "pki"))
    async with AsyncExitStack() as stack:
        await gateway.start_proxy()
        stack.push_async_callback(gateway.stop_proxy)
        registry = await stack.enter_async_context(_registry(gateway))
        gateway.replica_address = await stack.enter_async_context(gateway.serve_replica(gateway.replica))
        gateway.picker.endpoints = [gateway.replica_address]
        gateway.xds.open()
        gateway.xds.publish([gateway.replica_address])
        settings = gateway.settings = EdgeSettings(
            directory=directory / "envoy",
            envoy_admin=f"unix:{directory}/envoy.sock",
            admin_token=TOKEN,
            picker=(gateway.proxy_address,),
            control=(gateway.proxy_address,),
            registry=(registry.address,),
            edge_identity=gateway.authority.issue("edge", directory / "pki" / "edge"),
            admin_identity=gateway.authority.issue("admin-edge", directory / "pki" / "admin-edge"),
            edge_port=free_port(),
            admin_port=free_port(),
            node_id="edge-under-test",
            access_log=directory / "access.log",
            limits=limits or Limits(),
        )
        gateway.envoy = await stack.enter_async_context(running_envoy(settings))
        listeners = await gateway.envoy.admin.listeners()
        gateway.edge, gateway.admin = listeners["edge"], listeners["admin"]
        await gateway.xds.wait_acked(gateway.xds.version, time.monotonic() + START_SECONDS)
        yield gateway


@dataclass(frozen=True)
class RunningEnvoy:
    """An Envoy that is ready."""

    admin: EnvoyAdmin
    process: asyncio.subprocess.Process


@asynccontextmanager
async def running_envoy(settings: EdgeSettings) -> AsyncIterator[RunningEnvoy]:
    """Starts Envoy, waits until it listens, ends it by its handle."""
    path = install(settings)
    with Path(settings.directory, "envoy.log").open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command(path), stdout=output, stderr=output)
        try:
            async with EnvoyAdmin(settings.envoy_admin) as admin:
                await admin.wait_ready(time.monotonic() + START_SECONDS)
                yield RunningEnvoy(admin, process)
        finally:
            if process.returncode is None:
                process.terminate()
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


@asynccontextmanager
async def _proxy(gateway: Gateway) -> AsyncIterator[MeshServer]:
    server = MeshServer(
        listen=f"unix:{gateway.directory}/proxy.sock",
        identity=gateway.authority.issue("proxy", gateway.directory / "pki" / "proxy"),
        policy={
            fakes.EXT_PROC_SERVICE: frozenset({"edge"}),
            ADS_SERVICE: frozenset({"edge"}),
            "helios.api.proxy.v1.LaneService": frozenset({"edge"}),
            "helios.api.catalog.v1.ModelService": frozenset({"edge", "admin-edge"}),
            "helios.api.admin.v1.AdminService": frozenset({"admin-edge"}),
        },
        options=PROXY,
    )
    external_processor_pb2_grpc.add_ExternalProcessorServicer_to_server(gateway.picker, server.grpc)
    add_LaneServiceServicer_to_server(gateway.lane, server.grpc)
    add_xds(gateway.xds, server.grpc)
    gateway.control.add(model_service_pb2, "ModelService", server.grpc)
    gateway.control.add(admin_service_pb2, "AdminService", server.grpc)
    server.serve("helios.api.catalog.v1.ModelService", "helios.api.admin.v1.AdminService")
    async with server:
        yield server


@asynccontextmanager
async def _registry(gateway: Gateway) -> AsyncIterator[MeshServer]:
    server = MeshServer(
        listen="127.0.0.1:0",
        identity=gateway.authority.issue("registry", gateway.directory / "pki" / "registry"),
        policy={
            f"helios.api.registry.v1.{name}": frozenset({"admin-edge"})
            for name in ("RegistryService", "ArtifactService")
        },
        options=QUICK,
    )
    gateway.registry.add(registry_service_pb2, "RegistryService", server.grpc)
    gateway.registry.add(artifact_service_pb2, "ArtifactService", server.grpc)
    server.serve("helios.api.registry.v1.RegistryService", "helios.api.registry.v1.ArtifactService")
    async with server:
        yield server
