"""Composition root of the storage agent: `python -m helios.storage`."""

import os
import resource
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path

from helios.api.storage.v1.storage_service_pb2_grpc import add_StorageServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.process import Lifetime, run
from helios.mesh.sealed import DescriptorListener
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.tasks import keep_running, task_scope
from helios.storage.blob_servicer import SERVICE_NAME as BLOB_SERVICE
from helios.storage.blob_servicer import BlobServicer
from helios.storage.chunk_source import RegistryChunks
from helios.storage.clock import steady_clock
from helios.storage.disk_tier import DiskTier
from helios.storage.manifest import Digest
from helios.storage.manifest_source import RegistryManifests
from helios.storage.materializer import Upkeep, open_materializer
from helios.storage.memory.descriptor_server import DescriptorServer
from helios.storage.memory.memory_tier import MemoryTier
from helios.storage.prefetch.prefetcher import Prefetcher
from helios.storage.prefetch.state import Ahead
from helios.storage.servicer import SERVICE_NAME, StorageServicer
from helios.storage.settings import StorageSettings, TierSettings
from helios.storage.sources import Sources
from helios.storage.sync.holdings import Holdings
from helios.storage.sync.partial import PartialBlobs
from helios.storage.sync.session import SyncSession
from helios.storage.sync.swarms import Swarms
from helios.storage.tiers import in_speed_order

HOLDERS = frozenset({"worker"})
"""Who may materialise."""

OPERATORS = HOLDERS | {"admin-edge"}
"""Who may evict, pin and scrub, none of which takes anything from a holder."""

POLICY = {SERVICE_NAME: OPERATORS, BLOB_SERVICE: frozenset({"storage"})}
"""The servicer refuses the admin edge what is only for holders."""

OPTIONS = ServerOptions(drain_seconds=1.0)
"""Evict ends within a second; Materialize streams never end by themselves, and their holders resume them."""


async def main(settings: StorageSettings, lifetime: Lifetime) -> None:
    """Serves until the process is asked to stop. Leases live on across a restart."""
    raise_file_limit()
    identity = settings.mesh.identity
    clock = steady_clock()
    async with AsyncExitStack() as stack:
        dialer = await stack.enter_async_context(Dialer(settings.registry_target, identity=identity, peer="registry"))
        prefetcher = Prefetcher(Ahead(settings.prefetch.bytes_per_hour), clock)
        upkeep = Upkeep(
            forecast=prefetcher.expected_uses,
            make_way=prefetcher.make_way,
            scrub_bytes_per_second=settings.scrub.bytes_per_second,
            scrub_period=timedelta(seconds=settings.scrub.period_seconds),
        )
        tiers = make_tiers(settings)
        # What is in sealed memory has no path to be read by.
        disks = [tier for tier in tiers if not tier.store.is_sealed]
        chunks = RegistryChunks(dialer, partial(local_blobs, disks))
        partials = PartialBlobs()
        session = SyncSession(dialer, node=settings.node, holdings=partial(holdings, disks), prefetch=prefetcher)
        swarms = await stack.enter_async_context(
            Swarms(
                session,
                partials,
                identity=identity,
                targets=settings.peers.targets,
                parallel=settings.fetch.in_flight,
            )
        )
        manifests = RegistryManifests(dialer, Sources(settings.fetch.stores.reveal()), chunks, swarms)
        fastest_first = [disks[position] for position in in_speed_order([tier.options for tier in disks])]
        blobs = await stack.enter_async_context(
            BlobServicer(partial(blob_places, fastest_first), max_reads=settings.peers.max_reads, partials=partials)
        )
        sealed = {tier.name: tier for tier in tiers if isinstance(tier, MemoryTier)}
        materializer = await stack.enter_async_context(open_materializer(tiers, manifests, clock=clock, upkeep=upkeep))
        prefetcher.recall(materializer.account)
        listener = stack.enter_context(DescriptorListener(settings.descriptor_socket)) if sealed else None
        if listener is not None and settings.descriptors.users:
            listener.allow_everyone()
        # Ends before the tiers close: a scrub of a large blob, or a move, is cancelled rather than waited for.
        background = await stack.enter_async_context(task_scope())
        for name, work in (
            ("expire leases", materializer.expire_leases),
            ("move revisions", materializer.mover.run),
            ("scrub blobs", materializer.scrubber.run),
            ("fetch ahead", partial(prefetcher.run, materializer)),
        ):
            background.create_task(keep_running(name, work), name=name)
        if listener is not None:
            users = {os.geteuid(), *settings.descriptors.users}
            descriptors = DescriptorServer(
                listener, sealed, find_lease=materializer.find_lease, renew=materializer.renew, users=users
            )
            background.create_task(keep_running("hand over descriptors", descriptors.run), name="hand over descriptors")
            grace_seconds = settings.descriptors.grace_seconds
            background.create_task(materializer.settle(grace_seconds), name="settle tiers in memory")
        addresses = []
        for listen in filter(None, (settings.listen, settings.second_listen)):
            server = MeshServer(listen=listen, identity=identity, policy=POLICY, options=OPTIONS)
            servicer = StorageServicer(
                materializer,
                holders=HOLDERS if identity else None,
                operators=OPERATORS if identity else None,
                clock=clock,
                descriptor_socket=str(listener.path) if listener is not None else "",
                partials=partials,
            )
            add_StorageServiceServicer_to_server(servicer, server.grpc)
            blobs.add_to(server.grpc)
            server.serve(SERVICE_NAME, BLOB_SERVICE)
            await stack.enter_async_context(server)
            addresses.append(server.address)
        address = settings.address_for_peers(addresses)
        background.create_task(session.run(address), name="sync session")
        lifetime.mark_ready(address=addresses[0], addresses=addresses)
        await lifetime.wait_stop()


def raise_file_limit() -> None:
    """Lets this process have as many files open as it may: each one in memory is a descriptor, each one that is handed
    over another for a moment, and the usual soft limit is 1024.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def local_blobs(tiers: list[DiskTier]) -> dict[Digest, Path]:
    """Where the blobs of this node are; of one that several tiers have, the first tier's."""
    return {blob: tier.store.blob_path(blob.hash) for tier in reversed(tiers) for blob in tier.inventory.blobs()}


def holdings(tiers: list[DiskTier]) -> Holdings:
    """What this node holds, whole."""
    return Holdings(
        frozenset(blob.hash for tier in tiers for blob in tier.inventory.blobs()),
        frozenset(resident.revision for tier in tiers for resident in tier.inventory.revisions()),
    )


def blob_places(tiers: list[DiskTier], hash_: str) -> list[Path]:
    """Where a blob may be on this node, in the order of the tiers."""
    return [tier.store.blob_path(hash_) for tier in tiers]


def make_tiers(settings: StorageSettings) -> list[DiskTier]:
    """Makes the tiers that are configured, the one in the state directory first."""
    downloader = settings.fetch.make_downloader()
    state_directory = settings.state_directory.absolute()

    def make(root: Path | None, tier: TierSettings) -> DiskTier:
        if root is None:
            return MemoryTier(state_directory / "memory" / tier.name, options=tier.options)
        return DiskTier(
            root.absolute(),
            fetch_thread_count=settings.fetch.thread_count,
            is_link_allowed=tier.links == "auto",
            options=tier.options,
            downloader=downloader,
        )

    return [make(state_directory, settings.tier), *(make(tier.path, tier) for tier in settings.tiers)]


if __name__ == "__main__":
    run("storage", StorageSettings, main)
