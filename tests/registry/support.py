"""The registry inside a test: its parts on a temporary directory, and whole behind mTLS."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from helios.api.registry.v1.artifact_service_pb2_grpc import add_ArtifactServiceServicer_to_server
from helios.api.registry.v1.follow_service_pb2_grpc import add_FollowServiceServicer_to_server
from helios.api.registry.v1.profile_service_pb2_grpc import add_ProfileServiceServicer_to_server
from helios.api.registry.v1.registry_service_pb2_grpc import add_RegistryServiceServicer_to_server
from helios.api.registry.v1.rollout_service_pb2_grpc import add_RolloutServiceServicer_to_server
from helios.api.registry.v1.version_service_pb2_grpc import add_VersionServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.server import MeshServer, ServerOptions
from helios.registry import access
from helios.registry.artifact_servicer import ArtifactServicer
from helios.registry.artifact_store import ArtifactStore
from helios.registry.blobs import Blobs, BlobStore
from helios.registry.catalog import Catalog
from helios.registry.client import ArtifactClient, RegistryClient, VersionClient
from helios.registry.collector import Collector
from helios.registry.database import Database
from helios.registry.directory_store import DirectoryStore
from helios.registry.downloads import open_downloads
from helios.registry.follow.follower import Follower
from helios.registry.follow.servicer import FollowServicer
from helios.registry.follow.settings import FollowSettings
from helios.registry.follow.store import FollowStore
from helios.registry.ingest import Ingester
from helios.registry.profiles.measures import MeasureStore
from helios.registry.profiles.planner import Planner
from helios.registry.profiles.profiles import Profiles
from helios.registry.profiles.servicer import ProfileServicer
from helios.registry.records import IngestDone, IngestEvent, IngestSpec
from helios.registry.rollout.servicer import RolloutServicer
from helios.registry.rollout.store import RolloutStore
from helios.registry.servicer import RegistryServicer
from helios.registry.settings import ArtifactSettings, CollectionSettings
from helios.registry.sources.conversion import Converter
from helios.registry.sources.remote_sources import Sources
from helios.registry.sources.settings import SourceSettings
from helios.registry.sources.web import Web
from helios.registry.state import StateDirectory
from helios.registry.store import Store
from helios.registry.tag_store import TagStore
from helios.registry.uploads import Uploads
from helios.registry.version_servicer import VersionServicer
from helios.registry.versions import Versions
from helios.registry.watch import WatchHub

COMPONENTS = ("registry", "admin-edge", "proxy", "storage", "worker", "edge")


@dataclass
class Parts:
    """The parts of a registry, put together as the process does."""

    state: StateDirectory
    store: Store
    blobs: Blobs
    directory: DirectoryStore
    hub: WatchHub
    catalog: Catalog
    ingester: Ingester
    uploads: Uploads
    collector: Collector
    versions: Versions
    rollouts: RolloutStore
    followed: FollowStore
    follower: Follower
    profiles: Profiles

    async def ingest(self, name: str, source: Path | str, **more: object) -> IngestDone:
        """Ingests to the end."""
        events = [event async for event in self.ingester.ingest(IngestSpec(name, str(source), **more))]  # type: ignore[arg-type]
        return done_of(events)

    def files(self) -> set[str]:
        """Returns every file of blobs, temporary files and workspaces, by its path below the root."""
        directories = (self.state.blobs, self.state.work)
        return {
            str(path.relative_to(self.state.root))
            for directory in directories
            for path in directory.rglob("*")
            if path.is_file()
        }


def done_of(events: list[IngestEvent]) -> IngestDone:
    """Returns the result that ends these events."""
    assert isinstance(events[-1], IngestDone)
    return events[-1]


@asynccontextmanager
async def open_parts(
    root: Path,
    *,
    reserve_bytes: int = 0,
    queue_size: int = 256,
    max_concurrent: int = 2,
    convert_module: str = "helios.registry.convert",
    convert_timeout_seconds: float = 120.0,
    artifacts: ArtifactSettings | None = None,
    blob_store: BlobStore | None = None,
    source_settings: SourceSettings | None = None,
    database_url: str = "",
) -> AsyncIterator[Parts]:
    """Opens a registry without its server."""
    async with AsyncExitStack() as stack:
        state = stack.enter_context(StateDirectory(root).owned())
        database = await Database.open(database_url or state.database)
        stack.push_async_callback(database.close)
        store, artifact_store = Store(database), ArtifactStore(database)
        directory = DirectoryStore(state.blobs)
        directory.prepare()
        directory.repair("", await store.blobs.read())
        blobs = Blobs(blob_store or directory, store.blobs, disk=root, reserve_bytes=reserve_bytes)
        hub = WatchHub(queue_size)
        catalog = Catalog(store, blobs, hub, artifact_store)
        converter = Converter(
            timeout_seconds=convert_timeout_seconds, require_space=blobs.require_space, module=convert_module
        )
        settings = source_settings or SourceSettings()
        web = await stack.enter_async_context(Web(attempts=4))
        downloads = open_downloads(state.downloads, blobs, settings.downloads)
        sources = Sources(converter, web, settings)
        ingester = Ingester(catalog, state, sources, downloads, max_concurrent=max_concurrent)
        await stack.enter_async_context(ingester)
        stack.callback(hub.close)
        uploads = Uploads(catalog, artifact_store, state, artifacts or ArtifactSettings())
        collector = Collector(store.blobs, blobs, CollectionSettings())
        versions = Versions(catalog, TagStore(database, store.changes))
        rollouts = RolloutStore(database, store.changes)
        followed = FollowStore(database, store.changes)
        quick = FollowSettings(poll_seconds=0.05)
        follower = Follower(followed, catalog, rollouts, sources, ingester, settings=quick)
        made = (state, store, blobs, directory, hub, catalog, ingester, uploads, collector, versions)
        profiles = Profiles(catalog, MeasureStore(database), Planner(timeout_seconds=convert_timeout_seconds))
        yield Parts(*made, rollouts, followed, follower, profiles)


class Mesh:
    """Certificates for every component, and clients that show them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        authority = CertificateAuthority.open(directory)
        for component in COMPONENTS:
            authority.issue(component, directory / component)

    def identity(self, component: str) -> IdentityFiles:
        """Returns a component's leaf."""
        return IdentityFiles(self._directory / component)

    def dialer(self, address: str, component: str) -> Dialer:
        """Returns a dialer to the registry as this component."""
        return Dialer(address, identity=self.identity(component), peer="registry")

    @asynccontextmanager
    async def client(self, address: str, component: str = "admin-edge") -> AsyncIterator[RegistryClient]:
        """Yields a client of the registry as this component."""
        async with self.dialer(address, component) as dialer:
            yield RegistryClient(dialer)

    @asynccontextmanager
    async def versions(self, address: str, component: str = "admin-edge") -> AsyncIterator[VersionClient]:
        """Yields a client of the registry's versions as this component."""
        async with self.dialer(address, component) as dialer:
            yield VersionClient(dialer)

    @asynccontextmanager
    async def artifacts(self, address: str, component: str = "worker") -> AsyncIterator[ArtifactClient]:
        """Yields a client of the registry's artifacts as this component."""
        async with self.dialer(address, component) as dialer:
            yield ArtifactClient(dialer)


@asynccontextmanager
async def serve(parts: Parts, mesh: Mesh) -> AsyncIterator[str]:
    """Serves a registry over mTLS; yields its address."""
    server = MeshServer(
        listen="127.0.0.1:0",
        identity=mesh.identity("registry"),
        policy=access.POLICY,
        options=ServerOptions(drain_seconds=1.0),
    )
    add_RegistryServiceServicer_to_server(RegistryServicer(parts.catalog, parts.ingester, parts.collector), server.grpc)
    add_ArtifactServiceServicer_to_server(ArtifactServicer(parts.uploads), server.grpc)
    add_VersionServiceServicer_to_server(VersionServicer(parts.versions, parts.store), server.grpc)
    add_RolloutServiceServicer_to_server(RolloutServicer(parts.catalog, parts.rollouts), server.grpc)
    follow = FollowServicer(parts.catalog, parts.followed, parts.follower)
    add_FollowServiceServicer_to_server(follow, server.grpc)
    add_ProfileServiceServicer_to_server(ProfileServicer(parts.profiles), server.grpc)
    server.serve(access.SERVICE, access.ARTIFACT_SERVICE, access.VERSION_SERVICE)
    async with server:
        try:
            yield server.address
        finally:
            parts.hub.close()
