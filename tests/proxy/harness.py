"""A whole proxy in this process: the real composition root, real servers, real mTLS; fakes around it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helios.api.registry.v1.key_service_pb2_grpc import add_KeyServiceServicer_to_server
from helios.api.registry.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from helios.api.registry.v1.usage_service_pb2_grpc import add_UsageServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.process import Lifetime
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.settings import MeshSettings
from helios.proxy.__main__ import main
from helios.proxy.client import AdminClient, ModelsClient
from helios.proxy.settings import FleetSettings, HoldSettings, ProxySettings, ReplicaSettings
from helios.registry.keys.keys import Keys
from helios.registry.keys.servicer import KeyServicer
from tests.proxy.fakes import FakeEnvoy, FakeRegistry, FakeUsage, FakeWorker, until

REGISTRY_SERVICE = "helios.api.registry.v1.RegistryService"
KEY_SERVICE = "helios.api.registry.v1.KeyService"
USAGE_SERVICE = "helios.api.registry.v1.UsageService"


class _Lifetime(Lifetime):
    """Remembers the addresses that the proxy took."""

    facts: dict[str, Any] | None = None

    def mark_ready(self, **facts: Any) -> None:
        super().mark_ready(**facts)
        self.facts = facts


class _End(Exception):
    """Ends the proxy's background tasks."""


@dataclass
class Proxy:
    """A running proxy."""

    picker_address: str
    control_address: str


@dataclass
class World:
    """A directory with identities, and everything that may run in it."""

    directory: Path
    authority: CertificateAuthority
    registry: FakeRegistry = field(default_factory=FakeRegistry)
    registry_target: str = ""
    keys: Keys | None = None
    usage: FakeUsage = field(default_factory=FakeUsage)

    def identity(self, component: str) -> IdentityFiles:
        """The leaf of a component."""
        directory = self.directory / "pki" / component
        if not directory.exists():
            return self.authority.issue(component, directory)
        return IdentityFiles(directory)

    @asynccontextmanager
    async def running_registry(self) -> AsyncIterator[FakeRegistry]:
        """Serves the registry for the block."""
        server = MeshServer(
            listen=f"unix:{self.directory}/registry.sock",
            identity=self.identity("registry"),
            policy={name: frozenset({"proxy"}) for name in (REGISTRY_SERVICE, KEY_SERVICE, USAGE_SERVICE)},
            options=ServerOptions(drain_seconds=0.1),
        )
        add_RegistryServiceServicer_to_server(self.registry, server.grpc)
        add_UsageServiceServicer_to_server(self.usage, server.grpc)
        if self.keys is not None:
            add_KeyServiceServicer_to_server(KeyServicer(self.keys), server.grpc)
        async with server:
            self.registry_target = server.address
            yield self.registry

    @asynccontextmanager
    async def running_proxy(self, **overrides: Any) -> AsyncIterator[Proxy]:
        """Runs a proxy for the block; a second one in the same world starts from what the first left on disk."""
        values: dict[str, Any] = {
            "mesh": MeshSettings(identity_directory=self.identity("proxy").directory),
            "state_directory": self.directory / "proxy",
            "registry_target": self.registry_target,
            "picker_listen": f"unix:{self.directory}/picker.sock",
            "control_listen": f"unix:{self.directory}/control.sock",
            "drain_seconds": 0,
            "hold": HoldSettings(limit_seconds=10),
            "fleet": FleetSettings(report_interval_seconds=0.3, resync_seconds=2, worker_grace_seconds=3),
            "replica": ReplicaSettings(start_base_seconds=2, residency_seconds=0, wait_seconds=5),
        }
        settings = ProxySettings(**(values | overrides))
        try:
            async with asyncio.TaskGroup() as group:
                lifetime = _Lifetime(group, None, lambda: "")
                running = group.create_task(main(settings, lifetime), name="proxy")
                await until(lambda: lifetime.facts is not None or running.done())
                assert lifetime.facts is not None
                try:
                    yield Proxy(lifetime.facts["picker_address"], lifetime.facts["control_address"])
                finally:
                    lifetime.stopping.set()
                    await running
                raise _End  # noqa: TRY301 (how a task group's tasks are cancelled from inside)
        except* _End:
            pass

    @asynccontextmanager
    async def envoy(self, proxy: Proxy) -> AsyncIterator[FakeEnvoy]:
        """An Envoy that is connected for the block."""
        async with FakeEnvoy.connected(proxy.picker_address, self.identity("edge")) as envoy:
            yield envoy

    @asynccontextmanager
    async def worker(self, proxy: Proxy, worker: FakeWorker | None = None) -> AsyncIterator[FakeWorker]:
        """A worker that is connected for the block."""
        worker = worker or FakeWorker()
        async with worker.connected(proxy.control_address, self.identity("worker")):
            yield worker

    @asynccontextmanager
    async def admin(
        self, proxy: Proxy, component: str = "admin-edge"
    ) -> AsyncIterator[tuple[AdminClient, ModelsClient]]:
        """Clients that come through one of the edges."""
        async with Dialer(proxy.control_address, identity=self.identity(component), peer="proxy") as dialer:
            yield AdminClient(dialer), ModelsClient(dialer)


@asynccontextmanager
async def small_world(
    world: World, *, worker: FakeWorker | None = None, **overrides: Any
) -> AsyncIterator[tuple[Proxy, FakeEnvoy, FakeWorker]]:
    """Registry, proxy, Envoy and one worker."""
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(world.running_registry())
        proxy = await stack.enter_async_context(world.running_proxy(**overrides))
        envoy = await stack.enter_async_context(world.envoy(proxy))
        connected = await stack.enter_async_context(world.worker(proxy, worker))
        yield proxy, envoy, connected
