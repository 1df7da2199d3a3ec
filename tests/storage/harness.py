"""Models, a registry that is a real gRPC server, and storage agents in this process and in processes of their own."""

import asyncio
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio

from helios.api.registry.v1 import registry_service_pb2 as registry_pb
from helios.api.registry.v1.chunk_service_pb2_grpc import ChunkServiceServicer, add_ChunkServiceServicer_to_server
from helios.api.registry.v1.registry_service_pb2_grpc import (
    RegistryServiceServicer,
    add_RegistryServiceServicer_to_server,
)
from helios.api.registry.v1.sync_service_pb2_grpc import SyncServiceServicer, add_SyncServiceServicer_to_server
from helios.api.storage.v1 import storage_service_pb2 as pb
from helios.api.storage.v1.storage_service_pb2_grpc import StorageServiceStub, add_StorageServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.errors import HeliosError, RevisionNotFound
from helios.mesh.identity import CertificateAuthority, IdentityFiles
from helios.mesh.server import MeshServer
from helios.mesh.status import error_from_rpc
from helios.mesh.tasks import task_scope
from helios.mesh.transfer.engine import Downloader
from helios.storage.__main__ import HOLDERS, OPERATORS, OPTIONS, POLICY, blob_places, holdings, local_blobs
from helios.storage.blob_servicer import SERVICE_NAME as BLOB_SERVICE
from helios.storage.blob_servicer import BlobServicer
from helios.storage.chunk_source import RegistryChunks
from helios.storage.client import StorageClient
from helios.storage.clock import Clock
from helios.storage.disk_tier import DiskTier
from helios.storage.manifest import Digest, ManifestEntry, manifest_digest
from helios.storage.manifest_source import RegistryManifests
from helios.storage.materializer import Materializer, Upkeep, open_materializer
from helios.storage.servicer import SERVICE_NAME, StorageServicer
from helios.storage.sources import Sources
from helios.storage.sync.partial import PartialBlobs
from helios.storage.sync.session import SyncSession
from helios.storage.sync.swarms import Swarms
from helios.storage.tiers import TierOptions

ROOT = Path(__file__).resolve().parents[2]
REGISTRY_SERVICE = "helios.api.registry.v1.RegistryService"
CHUNK_SERVICE = "helios.api.registry.v1.ChunkService"
SYNC_SERVICE = "helios.api.registry.v1.SyncService"
MEDIA_TYPE = "application/vnd.cncf.model.weight.v1.raw"
START_SECONDS = 90.0


def digest_of(content: bytes) -> Digest:
    return Digest(hashlib.sha256(content).hexdigest(), len(content))


def entry_of(path: str, content: bytes) -> ManifestEntry:
    return ManifestEntry(path, digest_of(content), MEDIA_TYPE)


@dataclass
class Shelf(RegistryServiceServicer):
    """A registry that knows manifests and has a blob store; only GetManifest answers."""

    base: Path
    manifests: dict[str, registry_pb.Manifest] = field(default_factory=dict)
    call_count: int = 0
    url: str = ""
    """Where it says that its blobs are; empty: in its directory."""
    locations: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    """Where else, with options."""

    def add(self, files: Mapping[str, bytes]) -> str:
        """Stores files as a revision."""
        return self.add_entries([entry_of(path, content) for path, content in files.items()], files.values())

    def add_entries(self, entries: list[ManifestEntry], contents: Any = ()) -> str:
        """Stores a manifest as it is, harmful or not."""
        for content in contents:
            self.put(content)
        entries = sorted(entries, key=lambda entry: entry.path)
        revision = manifest_digest(entries)
        manifest = registry_pb.Manifest()
        for entry in entries:
            added = manifest.entries.add(path=entry.path, media_type=entry.media_type)
            added.digest.algorithm = "sha256"
            added.digest.hash, added.digest.size_bytes = entry.digest.hash, entry.digest.size_bytes
        self.manifests[revision] = manifest
        return revision

    def put(self, content: bytes) -> Path:
        path = self.blob_path(digest_of(content))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_bytes(content)
            path.chmod(0o444)
        return path

    def blob_path(self, digest: Digest) -> Path:
        return self.base / "sha256" / digest.hash[:2] / digest.hash

    async def GetManifest(
        self, request: registry_pb.GetManifestRequest, context: Any
    ) -> registry_pb.GetManifestResponse:
        self.call_count += 1
        if request.revision not in self.manifests:
            raise RevisionNotFound("no such revision")
        return registry_pb.GetManifestResponse(
            manifest=self.manifests[request.revision],
            blob_store_url=self.url or self.base.as_uri(),
            locations=[registry_pb.BlobLocation(url=url, options=options) for url, options in self.locations],
        )


def make_shelf(base: Path) -> Shelf:
    return Shelf(base)  # type: ignore[abstract]  # the other calls are not made


@asynccontextmanager
async def serve_registry(
    shelf: Shelf,
    identity: IdentityFiles,
    chunks: ChunkServiceServicer | None = None,
    sync: SyncServiceServicer | None = None,
) -> AsyncIterator[str]:
    callers = frozenset({"storage"})
    policy = {REGISTRY_SERVICE: callers, CHUNK_SERVICE: callers, SYNC_SERVICE: callers}
    server = MeshServer(listen="127.0.0.1:0", identity=identity, policy=policy)
    add_RegistryServiceServicer_to_server(shelf, server.grpc)
    if chunks is not None:
        add_ChunkServiceServicer_to_server(chunks, server.grpc)
    if sync is not None:
        add_SyncServiceServicer_to_server(sync, server.grpc)
    server.serve(REGISTRY_SERVICE)
    async with server:
        yield server.address


@dataclass(frozen=True)
class Agent:
    """An agent in this process, and a worker's client of it."""

    address: str
    root: Path
    materializer: Materializer
    client: StorageClient
    dialer: Dialer


@dataclass(frozen=True)
class Mesh:
    """Identities, and a registry with its shelf."""

    directory: Path
    authority: CertificateAuthority
    shelf: Shelf
    registry_address: str

    def identity(self, component: str) -> IdentityFiles:
        directory = self.directory / "pki" / component
        return IdentityFiles(directory) if directory.exists() else self.authority.issue(component, directory)

    @asynccontextmanager
    async def agent(
        self,
        *,
        name: str = "storage",
        capacity_bytes: int = 0,
        is_link_allowed: bool = True,
        clock: Clock | None = None,
        listen: str = "127.0.0.1:0",
        more: Sequence[TierOptions] = (),
        upkeep: Upkeep | None = None,
        peers: Sequence[str] = (),
        max_reads: int = 16,
        is_synced: bool = False,
        downloader: Downloader | None = None,
        credentials: Mapping[str, Mapping[str, str]] | None = None,
    ) -> AsyncIterator[Agent]:
        """Serves an agent with a tier `disk`, and more tiers whose roots are directories named for them beside it.

        One that is synced has a session with the registry; `peers` it knows besides.
        """
        identity = self.identity("storage")
        root = self.directory / name
        roots = [(root, TierOptions(capacity_bytes=capacity_bytes))]
        roots += [(self.directory / f"{name}-{options.name}", options) for options in more]
        tiers = [
            DiskTier(
                path, fetch_thread_count=2, is_link_allowed=is_link_allowed, options=options, downloader=downloader
            )
            for path, options in roots
        ]
        async with (
            Dialer(self.registry_address, identity=identity, peer="registry") as registry,
            task_scope() as background,
            Swarms(
                session := SyncSession(registry, node=name, holdings=partial(holdings, tiers)) if is_synced else None,
                partials := PartialBlobs(),
                identity=identity,
                targets=peers,
            ) as swarms,
            BlobServicer(partial(blob_places, tiers), max_reads=max_reads, partials=partials) as blobs,
            open_materializer(
                tiers,
                RegistryManifests(
                    registry,
                    Sources(credentials),
                    chunks=RegistryChunks(registry, partial(local_blobs, tiers)),
                    swarms=swarms,
                ),
                clock=clock,
                upkeep=upkeep,
            ) as materializer,
        ):
            server = MeshServer(listen=listen, identity=identity, policy=POLICY, options=OPTIONS)
            servicer = StorageServicer(
                materializer, holders=HOLDERS, operators=OPERATORS, clock=clock, partials=partials
            )
            add_StorageServiceServicer_to_server(servicer, server.grpc)
            blobs.add_to(server.grpc)
            server.serve(SERVICE_NAME, BLOB_SERVICE)
            async with server, self.dial(server.address) as dialer:
                if session is not None:
                    background.create_task(session.run(server.address), name=f"sync session {name}")
                yield Agent(server.address, root, materializer, StorageClient(dialer), dialer)

    def dial(self, address: str, component: str = "worker") -> Dialer:
        return Dialer(address, identity=self.identity(component), peer="storage")


class AgentProcess:
    """`python -m helios.storage` with real mTLS."""

    def __init__(self, mesh: Mesh, root: Path, *flags: str) -> None:
        self.root = root
        self.address = "127.0.0.1:0"
        self._mesh = mesh
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Starts on the same address as before and waits until it is ready."""
        ready = self._mesh.directory / "ready.json"
        ready.unlink(missing_ok=True)
        command = [
            *(sys.executable, "-m", "helios.storage"),
            f"--ready-file={ready}",
            f"--mesh.identity-directory={self._mesh.identity('storage').directory}",
            f"--state-directory={self.root}",
            f"--listen={self.address}",
            f"--registry-target={self._mesh.registry_address}",
            *self._flags,
        ]
        self._process = subprocess.Popen(command, cwd=ROOT)  # noqa: ASYNC220 - returns at once
        async with asyncio.timeout(START_SECONDS):
            while not ready.exists():
                assert self._process.poll() is None, "the agent ended while starting"
                await asyncio.sleep(0.02)
        self.address = json.loads(ready.read_text())["addresses"][0]

    def kill(self) -> None:
        """Kills it as a power failure would, as far as the process is concerned."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def stop(self) -> int:
        """Stops it as an operator would; returns its exit status."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(10)
            raise


@asynccontextmanager
async def agent_process(mesh: Mesh, *flags: str, root: Path | None = None) -> AsyncIterator[AgentProcess]:
    agent = AgentProcess(mesh, root or mesh.directory / "storage", *flags)
    await agent.start()
    try:
        yield agent
    finally:
        agent.stop()


def files_below(directory: Path) -> set[str]:
    """Paths of all files and links, relative to the directory."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_symlink() or path.is_file()}


def is_clean(root: Path) -> bool:
    """Whether no blob, no view and nothing unfinished is left."""
    return (
        not files_below(root / "blobs") and not list((root / "views").iterdir()) and not list((root / "tmp").iterdir())
    )


class RawStream:
    """One Materialize stream, message by message."""

    def __init__(self, dialer: Dialer) -> None:
        self._queue: asyncio.Queue[pb.MaterializeRequest | None] = asyncio.Queue()
        self._call = dialer.stub(StorageServiceStub).Materialize(self._requests())

    def want(self, revision: str, **fields: Any) -> "RawStream":
        self.send(pb.MaterializeRequest(want=pb.Want(revision=revision, **fields)))
        return self

    def send(self, request: pb.MaterializeRequest) -> None:
        self._queue.put_nowait(request)

    def done_writing(self) -> None:
        self._queue.put_nowait(None)

    def break_off(self) -> None:
        self.done_writing()
        self._call.cancel()

    async def read(self) -> pb.MaterializeResponse | None:
        """The next message, None at the end."""
        async with asyncio.timeout(30):
            answer = await self._call.read()
        return answer if isinstance(answer, pb.MaterializeResponse) else None

    async def ready(self) -> pb.Ready:
        while (answer := await self.read()) is not None:
            if answer.WhichOneof("message") == "ready":
                return answer.ready
        raise AssertionError("the stream ended before the revision was lent")

    async def failure(self) -> HeliosError:
        try:
            while await self.read() is not None:
                pass
        except grpc.aio.AioRpcError as error:
            return error_from_rpc(error)
        raise AssertionError("the call did not fail")

    async def _requests(self) -> AsyncIterator[pb.MaterializeRequest]:
        while (request := await self._queue.get()) is not None:
            yield request


@contextmanager
def raw_stream(dialer: Dialer) -> Iterator[RawStream]:
    """A stream that is broken off at the end."""
    stream = RawStream(dialer)
    try:
        yield stream
    finally:
        stream.break_off()
