"""``python -m helios.registry``: the composition root of the registry process."""

import asyncio
import os
import secrets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import structlog

from helios.api.registry.v1.artifact_service_pb2_grpc import add_ArtifactServiceServicer_to_server
from helios.api.registry.v1.chunk_service_pb2_grpc import add_ChunkServiceServicer_to_server
from helios.api.registry.v1.cordon_service_pb2_grpc import add_CordonServiceServicer_to_server
from helios.api.registry.v1.follow_service_pb2_grpc import add_FollowServiceServicer_to_server
from helios.api.registry.v1.key_service_pb2_grpc import add_KeyServiceServicer_to_server
from helios.api.registry.v1.lease_service_pb2_grpc import add_LeaseServiceServicer_to_server
from helios.api.registry.v1.prefetch_service_pb2_grpc import add_PrefetchServiceServicer_to_server
from helios.api.registry.v1.profile_service_pb2_grpc import add_ProfileServiceServicer_to_server
from helios.api.registry.v1.push_service_pb2_grpc import add_PushServiceServicer_to_server
from helios.api.registry.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from helios.api.registry.v1.rollout_service_pb2_grpc import add_RolloutServiceServicer_to_server
from helios.api.registry.v1.sync_service_pb2_grpc import add_SyncServiceServicer_to_server
from helios.api.registry.v1.usage_service_pb2_grpc import add_UsageServiceServicer_to_server
from helios.api.registry.v1.version_service_pb2_grpc import add_VersionServiceServicer_to_server
from helios.mesh.addresses import dialable
from helios.mesh.process import Lifetime, run
from helios.mesh.server import MeshServer, ServerOptions
from helios.mesh.tasks import keep_running
from helios.registry import access, metrics, offload
from helios.registry.artifact_servicer import ArtifactServicer
from helios.registry.artifact_store import ArtifactStore
from helios.registry.blob_rows import BlobRows
from helios.registry.blob_stores import open_store
from helios.registry.blobs import Blobs
from helios.registry.catalog import Catalog
from helios.registry.chunk_indexer import ChunkIndexer
from helios.registry.chunk_servicer import ChunkServicer
from helios.registry.chunk_store import ChunkStore
from helios.registry.collection import prefixes
from helios.registry.collector import Collector
from helios.registry.coordination.relay import Relay
from helios.registry.coordination.seats import Seats
from helios.registry.cordons.cordons import Cordons
from helios.registry.cordons.servicer import CordonServicer
from helios.registry.cordons.store import CordonStore
from helios.registry.database import Database
from helios.registry.directory_store import DirectoryStore
from helios.registry.downloads import open_downloads
from helios.registry.follow.follower import Follower
from helios.registry.follow.servicer import FollowServicer
from helios.registry.follow.store import FollowStore
from helios.registry.ingest import Ingester
from helios.registry.keys.keys import Keys
from helios.registry.keys.servicer import KeyServicer
from helios.registry.keys.store import KeyStore
from helios.registry.leases.servicer import LeaseServicer
from helios.registry.leases.store import LeaseStore
from helios.registry.ownership import Claim
from helios.registry.profiles.measures import MeasureStore
from helios.registry.profiles.planner import Planner
from helios.registry.profiles.profiles import Profiles
from helios.registry.profiles.servicer import ProfileServicer
from helios.registry.push.journal import PushJournal
from helios.registry.push.pusher import Pusher
from helios.registry.push.servicer import PushServicer
from helios.registry.rollout.servicer import RolloutServicer
from helios.registry.rollout.store import RolloutStore
from helios.registry.servicer import RegistryServicer
from helios.registry.settings import RegistrySettings
from helios.registry.sources.conversion import Converter
from helios.registry.sources.remote_sources import Sources
from helios.registry.sources.settings import OciSettings
from helios.registry.sources.web import Web
from helios.registry.state import StateDirectory
from helios.registry.store import Store
from helios.registry.sync.servicer import SyncServicer
from helios.registry.tag_store import TagStore
from helios.registry.uploads import Uploads
from helios.registry.usage.prefetch_servicer import PrefetchServicer
from helios.registry.usage.prefetches import Prefetches
from helios.registry.usage.servicer import UsageServicer
from helios.registry.usage.store import UsageStore
from helios.registry.usage.usage import Usage
from helios.registry.version_servicer import VersionServicer
from helios.registry.versions import Versions
from helios.registry.watch import WatchHub

if TYPE_CHECKING:
    from helios.registry.object_store import ObjectStore

log = structlog.get_logger()


async def main(settings: RegistrySettings, lifetime: Lifetime) -> None:
    """Opens the state, brings it into order, serves until asked to stop.

    Closing runs backwards: watches end, ingests are cancelled and clean up, the server drains, the database closes, and
    only then another registry may have the directory.
    """
    # Credentials of clouds, by the names that their own tools have; obstore reads them there, too.
    environment = dict(os.environ)  # noqa: TID251
    # Downloads hold threads for hours; what a start asks for must not wait for them.
    threads = ThreadPoolExecutor(
        16 + settings.ingest.max_concurrent * settings.sources.downloads.files, thread_name_prefix="work"
    )
    asyncio.get_running_loop().set_default_executor(threads)
    async with AsyncExitStack() as stack:
        core = await _open_core(settings, environment, stack)
        state, database, store, blobs, catalog = core.state, core.database, core.store, core.blobs, core.catalog
        converter = Converter(
            timeout_seconds=settings.ingest.convert_timeout_seconds, require_space=blobs.require_space
        )
        server = MeshServer(
            listen=settings.listen,
            identity=settings.mesh.identity,
            policy=access.POLICY,
            options=ServerOptions(drain_seconds=settings.drain_seconds),
        )
        web = await stack.enter_async_context(Web())
        places = settings.sources.with_environment(environment)
        sources = Sources(converter, web, places)
        downloads = open_downloads(state.downloads, blobs, settings.sources.downloads)
        ingester = Ingester(catalog, state, sources, downloads, max_concurrent=settings.ingest.max_concurrent)
        pusher = _serve_pushes(settings, places.oci, core, web, server)
        collector = Collector(store.blobs, blobs, settings.collection)
        add_RegistryServiceServicer_to_server(RegistryServicer(catalog, ingester, collector), server.grpc)
        uploads = Uploads(catalog, core.artifacts, state, settings.artifacts)
        _serve_records(core, settings, server, uploads)
        cordons = _serve_proxies(core, settings, server)
        rollouts = RolloutStore(database, store.changes)
        add_RolloutServiceServicer_to_server(RolloutServicer(catalog, rollouts), server.grpc)
        followed = FollowStore(database, store.changes)
        follower = Follower(followed, catalog, rollouts, sources, ingester, settings=settings.follow)
        add_FollowServiceServicer_to_server(FollowServicer(catalog, followed, follower), server.grpc)
        keys = Keys(KeyStore(database), poll_seconds=settings.watch_poll_seconds if database.is_shared else 0.0)
        add_KeyServiceServicer_to_server(KeyServicer(keys), server.grpc)
        chunks = ChunkStore(database)
        add_ChunkServiceServicer_to_server(ChunkServicer(chunks), server.grpc)
        sync = SyncServicer(settings.sync)
        add_SyncServiceServicer_to_server(sync, server.grpc)
        usage, prefetches = _usage(settings, environment, core, sync, server)
        server.serve(*access.POLICY)
        for part in (server, ingester, pusher):
            await stack.enter_async_context(part)
        for watched in (catalog.hub, sync, keys, cordons, usage):
            stack.callback(watched.close)
        metrics.MODELS.set(await store.count_models())
        await uploads.measure()
        await stack.enter_async_context(collector.running())
        chores: dict[str, Callable[[], Awaitable[None]]] = {
            "index chunks": ChunkIndexer(chunks, blobs.store.open, store.changes.version).run,
            "tidy downloads": downloads.keep_tidy,
            "tidy pushes": pusher.keep_tidy,
            "follow sources": follower.run,
            "forecast usage": usage.run,
            "order prefetches": prefetches.run,
        }
        if database.is_shared:
            chores |= _beside_others(settings, core, sync, server.address, stack)
        _start(chores, lifetime, stack)
        lifetime.mark_ready(address=server.address)
        await lifetime.wait_stop()
        await server.set_serving(is_serving=False)


def _serve_pushes(settings: RegistrySettings, oci: OciSettings, core: "_Core", web: Web, server: MeshServer) -> Pusher:
    directory = StateDirectory(settings.state_directory).pushes
    journal = PushJournal(directory, keep_seconds=settings.push.keep_seconds)
    pusher = Pusher(core.store, core.blobs, web, journal, settings=settings.push, oci=oci)
    add_PushServiceServicer_to_server(PushServicer(pusher), server.grpc)
    return pusher


def _usage(
    settings: RegistrySettings,
    environment: Mapping[str, str],
    core: "_Core",
    sync: SyncServicer,
    server: MeshServer,
) -> tuple[Usage, Prefetches]:
    rows = UsageStore(core.database)
    place = settings.database_url.get_secret_value() or str(StateDirectory(settings.state_directory).database)
    usage = Usage(rows, settings.usage, database=place, environment=environment)
    prefetches = Prefetches(usage, rows, sync, bytes_per_hour=settings.usage.prefetch_bytes_per_hour)
    sync.on_prefetch_report = prefetches.take_report
    add_UsageServiceServicer_to_server(UsageServicer(usage, core.store), server.grpc)
    add_PrefetchServiceServicer_to_server(PrefetchServicer(prefetches, core.store, sync), server.grpc)
    return usage, prefetches


def _beside_others(
    settings: RegistrySettings, core: "_Core", sync: SyncServicer, listens: str, stack: AsyncExitStack
) -> dict[str, Callable[[], Awaitable[None]]]:
    """Returns what one registry of several does besides, and has one of them bring the agents of all together."""
    ttl_seconds = settings.sync.coordinator_seconds
    seats = Seats(
        LeaseStore(core.database),
        holder=secrets.token_hex(8),
        address=settings.sync.address or dialable([listens]),
        ttl_seconds=ttl_seconds,
    )
    identity = settings.mesh.identity
    sync.relay = relay = Relay(seats, identity=identity, look_seconds=ttl_seconds / 4, on_moved=sync.send_away)
    stack.push_async_callback(relay.resign)
    return {
        "follow changes": partial(core.catalog.follow, settings.watch_poll_seconds),
        "coordinate agents": relay.run,
    }


def _start(chores: Mapping[str, Callable[[], Awaitable[None]]], lifetime: Lifetime, stack: AsyncExitStack) -> None:
    """Runs what has no end, until the stack is left."""
    for name, chore in chores.items():
        task = lifetime.group.create_task(keep_running(name, chore), name=name)
        stack.callback(task.cancel)


@dataclass(frozen=True)
class _Core:
    """What all services stand on."""

    state: StateDirectory
    database: Database
    store: Store
    artifacts: ArtifactStore
    blobs: Blobs
    catalog: Catalog


async def _open_core(settings: RegistrySettings, environment: Mapping[str, str], stack: AsyncExitStack) -> _Core:
    """Opens directory, database and blob store, and brings them into order; the stack closes them."""
    state = stack.enter_context(StateDirectory(settings.state_directory).owned())
    database = await Database.open(settings.database_url.get_secret_value() or state.database)
    stack.push_async_callback(database.close)
    store, artifacts = Store(database), ArtifactStore(database)
    blob_store = stack.enter_context(open_store(settings.blob_store, state, environment))
    blobs = await _open_blobs(settings, state, blob_store, store.blobs, is_shared=database.is_shared)
    catalog = Catalog(store, blobs, WatchHub(settings.watch_queue_size), artifacts)
    return _Core(state, database, store, artifacts, blobs, catalog)


def _serve_records(core: _Core, settings: RegistrySettings, server: MeshServer, uploads: Uploads) -> None:
    """Adds the services that have nothing but rows: versions, artifacts, profiles."""
    versions = Versions(core.catalog, TagStore(core.database, core.store.changes))
    add_VersionServiceServicer_to_server(VersionServicer(versions, core.store), server.grpc)
    add_ArtifactServiceServicer_to_server(ArtifactServicer(uploads), server.grpc)
    planner = Planner(timeout_seconds=settings.profiles.plan_timeout_seconds)
    profiles = Profiles(core.catalog, MeasureStore(core.database), planner)
    add_ProfileServiceServicer_to_server(ProfileServicer(profiles), server.grpc)


def _serve_proxies(core: _Core, settings: RegistrySettings, server: MeshServer) -> Cordons:
    """Adds what several proxies agree by: leases and cordons."""
    add_LeaseServiceServicer_to_server(LeaseServicer(LeaseStore(core.database)), server.grpc)
    poll_seconds = settings.watch_poll_seconds if core.database.is_shared else None
    cordons = Cordons(CordonStore(core.database), poll_seconds=poll_seconds)
    add_CordonServiceServicer_to_server(CordonServicer(cordons), server.grpc)
    return cordons


async def _open_blobs(
    settings: RegistrySettings,
    state: StateDirectory,
    store: "DirectoryStore | ObjectStore",
    rows: BlobRows,
    *,
    is_shared: bool,
) -> Blobs:
    """Finds that the store is this database's, and brings it into order."""
    claim = Claim(store, await rows.owner())
    take_over_from = settings.blob_store.take_over_from
    await offload.run(lambda _: claim.require(datetime.now(UTC), take_over_from=take_over_from))
    blobs = Blobs(
        store,
        rows,
        disk=state.root,
        reserve_bytes=settings.ingest.reserve_bytes,
        is_shared=is_shared,
        require_ownership=lambda: claim.require(datetime.now(UTC)),
    )
    await _repair(rows, blobs)
    return blobs


async def _repair(rows: BlobRows, blobs: Blobs) -> None:
    """Clears away what a crash left, and says which blobs are gone; in a bucket that is the collector's."""
    directory = blobs.store
    if not isinstance(directory, DirectoryStore):
        return
    freed_bytes, missing = await offload.run(lambda _: directory.prepare()), list[str]()
    for prefix in prefixes(await rows.count()):
        referenced = await rows.read(prefix)
        freed, lost = await offload.run(lambda _: directory.repair(prefix, referenced))  # noqa: B023 - it is awaited
        freed_bytes += freed
        missing += lost
    if freed_bytes:
        log.info("unfinished ingests cleared away", freed_bytes=freed_bytes)
    if missing:
        log.error("blobs are missing; ingest their models again", blobs=missing[:20], count=len(missing))


if __name__ == "__main__":
    run("registry", RegistrySettings, main)
