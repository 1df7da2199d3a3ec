"""A materializer without a mesh: manifests from a shelf, tiers in directories, a clock that tests set."""

import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from helios.mesh.errors import RevisionNotFound
from helios.mesh.file_system import FileSystem
from helios.storage.disk_tier import DiskTier
from helios.storage.fetch import BlobSource, DirectorySource
from helios.storage.manifest import Manifest
from helios.storage.manifest_source import manifest_from_proto
from helios.storage.materializer import Loan, Materializer, Upkeep, open_materializer
from helios.storage.tiers import TierOptions
from tests.storage.harness import Shelf

START = datetime(2030, 1, 1, tzinfo=UTC)
TTL = timedelta(seconds=60)


class SetClock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


class ShelfManifests:
    """A `ManifestSource` on a shelf in this process."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    async def get_manifest(self, revision: str) -> tuple[Manifest, BlobSource]:
        if revision not in self._shelf.manifests:
            raise RevisionNotFound("no such revision")
        return manifest_from_proto(revision, self._shelf.manifests[revision]), DirectorySource(self._shelf.base)


@asynccontextmanager
async def local_agent(
    directory: Path,
    shelf: Shelf,
    *tiers: TierOptions,
    clock: SetClock | None = None,
    files: FileSystem | None = None,
    upkeep: Upkeep | None = None,
    is_link_allowed: bool = False,
) -> AsyncIterator[Materializer]:
    """Opens tiers in directories that are named for them; the first one keeps the pins."""
    opened = [
        DiskTier(
            directory / options.name,
            fetch_thread_count=1,
            is_link_allowed=is_link_allowed,
            options=options,
            files=files,
        )
        for options in tiers or (TierOptions(),)
    ]
    async with open_materializer(opened, ShelfManifests(shelf), clock=clock or SetClock(), upkeep=upkeep) as agent:
        yield agent


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory in memory where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="helios-", dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


async def lend(agent: Materializer, revision: str) -> Loan:
    return await agent.materialize(revision, holder="test", ttl=TTL, lease_id="")


async def use(agent: Materializer, revision: str, times: int = 1) -> None:
    """Borrows a revision and gives it back."""
    for _ in range(times):
        await agent.release((await lend(agent, revision)).lease.id)


def tiers_of(agent: Materializer, revision: str) -> Sequence[str]:
    return next((found.tiers for found in agent.residency() if found.revision == revision), ())


def check_consistent(agent: Materializer) -> None:
    """What decisions read is what the disk has, byte for byte, and nothing else is there."""
    for room in agent.rooms:
        store, inventory = room.tier.store, room.tier.inventory
        files = {path.name: path for path in (store.root / "blobs").rglob("*") if path.is_file()}
        assert set(files) == {blob.hash for blob in inventory.blobs()}
        for blob in inventory.blobs():
            assert files[blob.hash].stat().st_size == blob.size_bytes
        assert inventory.used_bytes == sum(blob.size_bytes for blob in inventory.blobs())
        views = {path.name for path in (store.root / "views").iterdir()}
        assert views == {resident.revision.removeprefix("sha256:") for resident in inventory.revisions()}
        assert not list((store.root / "tmp").iterdir())
