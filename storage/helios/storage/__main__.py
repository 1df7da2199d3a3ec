"""Composition root of the storage agent: `python -m helios.storage`."""

from contextlib import AsyncExitStack

from helios.api.storage.v1.storage_service_pb2_grpc import add_StorageServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.process import Lifetime, run
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.tasks import keep_running
from helios.storage.clock import steady_clock
from helios.storage.disk_tier import DiskTier
from helios.storage.manifest_source import RegistryManifests
from helios.storage.materializer import open_materializer
from helios.storage.servicer import SERVICE_NAME, StorageServicer
from helios.storage.settings import StorageSettings

HOLDERS = frozenset({"worker"})
"""Who may materialise and evict."""

POLICY = {SERVICE_NAME: HOLDERS | {"admin-edge"}}
"""The admin edge may look at the residency; the servicer refuses it the rest."""

OPTIONS = ServerOptions(drain_seconds=1.0)
"""Evict ends within a second; Materialize streams never end by themselves, and their holders resume them."""


async def main(settings: StorageSettings, lifetime: Lifetime) -> None:
    """Serves until the process is asked to stop. Leases live on across a restart."""
    identity = settings.mesh.identity
    clock = steady_clock()
    async with AsyncExitStack() as stack:
        dialer = await stack.enter_async_context(Dialer(settings.registry_target, identity=identity, peer="registry"))
        tier = DiskTier(
            settings.state_directory.absolute(),
            fetch_thread_count=settings.fetch.thread_count,
            is_link_allowed=settings.tier.links == "auto",
        )
        materializer = await stack.enter_async_context(
            open_materializer(tier, RegistryManifests(dialer), capacity_bytes=settings.tier.capacity_bytes, clock=clock)
        )
        lifetime.group.create_task(keep_running("expire leases", materializer.expire_leases), name="expire leases")
        addresses = []
        for listen in filter(None, (settings.listen, settings.second_listen)):
            server = MeshServer(listen=listen, identity=identity, policy=POLICY, options=OPTIONS)
            servicer = StorageServicer(materializer, holders=HOLDERS if identity else None, clock=clock)
            add_StorageServiceServicer_to_server(servicer, server.grpc)
            server.serve(SERVICE_NAME)
            await stack.enter_async_context(server)
            addresses.append(server.address)
        lifetime.mark_ready(address=addresses[0], addresses=addresses)
        await lifetime.wait_stop()


if __name__ == "__main__":
    run("storage", StorageSettings, main)
