"""Nodes that share artifacts: each with a storage agent, a shelf and a keeper of its own; one registry for all."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from helios.mesh.channel import Dialer
from helios.mesh.identity import CertificateAuthority
from helios.registry.client import ArtifactClient
from helios.worker.artifacts.door import ArtifactDoor
from helios.worker.artifacts.keeper import ArtifactKeeper
from helios.worker.artifacts.packed_shelf import PackedShelf
from helios.worker.artifacts.requests import COMPILE_CACHE, PACKED_WEIGHTS, ArtifactRequest
from helios.worker.artifacts.shelf import CompileShelf
from helios.worker.settings import ArtifactSettings
from tests.registry.support import Parts, open_parts, serve
from tests.storage.harness import Agent, Mesh, make_shelf

INPUTS = json.dumps({"flags": {"dtype": "bfloat16"}, "torch_version": "2"})
QUIET_SECONDS = 0.02


@dataclass(frozen=True)
class Cluster:
    """A registry, and what nodes need to reach it. ``revision`` is of a model in it."""

    parts: Parts
    mesh: Mesh
    revision: str

    def request(self, replica_id: str = "r1", inputs: str = INPUTS) -> ArtifactRequest:
        return ArtifactRequest(COMPILE_CACHE, inputs, self.revision, replica_id)

    @asynccontextmanager
    async def node(
        self,
        name: str,
        settings: ArtifactSettings | None = None,
        *,
        packed: Path | None = None,
        offered_bytes: int = 2 << 30,
        can_link: bool = True,
    ) -> AsyncIterator["Node"]:
        """Opens a node; leaving it waits for nothing. ``packed`` is where it has packed weights, if not in its own."""
        directory = self.mesh.directory / name
        scratch = directory / "scratch"
        scratch.mkdir(parents=True)
        registry = Dialer(self.mesh.registry_address, identity=self.mesh.identity("worker"), peer="registry")
        agent_of = self.mesh.agent(name=f"{name}/storage", is_link_allowed=can_link)
        async with agent_of as agent, registry, asyncio.TaskGroup() as group:
            shelf = CompileShelf(directory / "compiled")
            packed = packed or directory / "packed"
            client = ArtifactClient(registry)
            keeper = ArtifactKeeper(
                settings or ArtifactSettings(take_seconds=5.0, take_weights_seconds=20.0),
                group=group,
                registry=client,
                lender=agent.client,
                shelves={COMPILE_CACHE: shelf, PACKED_WEIGHTS: PackedShelf(packed, offered_bytes=offered_bytes)},
                producer=name,
                scratch=scratch,
                quiet_seconds=QUIET_SECONDS,
            )
            async with ArtifactDoor(directory / "door", keeper):
                yield Node(directory, agent, keeper, client, shelf, packed)


@dataclass(frozen=True)
class Node:
    """One node."""

    directory: Path
    agent: Agent
    keeper: ArtifactKeeper
    client: ArtifactClient
    shelf: CompileShelf
    packed: Path

    @property
    def door(self) -> str:
        return str(self.directory / "door")

    def path(self, request: ArtifactRequest) -> Path:
        """Where the node has an artifact."""
        return self.directory / "compiled" / request.key

    def compile(self, request: ArtifactRequest, files: dict[str, bytes]) -> None:
        """Does what a compiler does."""
        for name, data in files.items():
            path = self.path(request) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    def found(self, request: ArtifactRequest) -> dict[str, bytes]:
        """Returns what the node has."""
        root = self.path(request)
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    async def wait_published(self, request: ArtifactRequest, *, other_than: str = "") -> str:
        """Waits until the registry has the artifact, and returns its digest."""
        async with asyncio.timeout(10):
            while True:
                artifact = await self.client.find(request.kind, request.key)
                if artifact is not None and artifact.digest != other_than:
                    return artifact.digest
                await asyncio.sleep(0.02)

    async def wait_withdrawn(self, request: ArtifactRequest) -> None:
        """Waits until the registry has it no more."""
        async with asyncio.timeout(10):
            while await self.client.find(request.kind, request.key) is not None:
                await asyncio.sleep(0.02)


@asynccontextmanager
async def open_cluster(directory: Path, model: Path) -> AsyncIterator[Cluster]:
    """Opens a real registry over mTLS with a model in it."""
    authority = CertificateAuthority.open(directory / "pki")
    mesh = Mesh(directory, authority, make_shelf(directory), "")
    async with open_parts(directory / "registry") as parts, serve(parts, mesh) as address:  # type: ignore[arg-type]
        revision = (await parts.ingest("m", model)).model.revision.digest
        yield Cluster(parts, Mesh(directory, authority, mesh.shelf, address), revision)


def blob_of(cluster: Cluster, data: bytes) -> Path:
    """Returns where the registry has these bytes."""
    return cluster.parts.directory.path(hashlib.sha256(data).hexdigest())
