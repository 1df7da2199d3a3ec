"""What is here of a revision that is being fetched, as the agent tells loaders."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from helios.storage.disk_tier import DiskTier
from helios.storage.manifest import Manifest
from helios.storage.sync.partial import PartialBlobs

_LOOK_SECONDS: Final = 0.5
"""How late the beginning of a fetch may be noticed; what comes of it is told at once."""


@dataclass(frozen=True, slots=True)
class GrowingFile:
    """A file of a revision: its path there, where its bytes are now, its size when whole, what is here and verified."""

    path: str
    file: Path
    size_bytes: int
    spans: tuple[tuple[int, int], ...]


async def watch_growth(
    find: Callable[[], tuple[Manifest, DiskTier] | None], partials: PartialBlobs
) -> AsyncGenerator[list[GrowingFile], None]:
    """Yields what is here of a revision whenever that changes, for ever; `find` says what is fetched, and where to."""
    told: list[GrowingFile] = []
    while True:
        fetching = find()
        if fetching is not None and (now := list(_files(*fetching, partials))) != told:
            told = now
            yield now
        await partials.wait(_LOOK_SECONDS)


def _files(manifest: Manifest, tier: DiskTier, partials: PartialBlobs) -> list[GrowingFile]:
    found: list[GrowingFile] = []
    for entry in manifest.entries:
        hash_, size_bytes = entry.digest.hash, entry.digest.size_bytes
        if tier.inventory.has_blob(entry.digest):
            found.append(GrowingFile(entry.path, tier.store.blob_path(hash_), size_bytes, ((0, size_bytes),)))
        # The file in this tier, which is to be lent: another fetch may bring the blob to another one meanwhile.
        elif (growing := partials.growing(hash_, tier.store.root)) is not None and growing[1]:
            file, spans = growing
            found.append(GrowingFile(entry.path, file, size_bytes, tuple(spans)))
    return found
