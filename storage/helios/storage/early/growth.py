"""What is here of a revision that is being fetched, as the agent tells loaders."""

from collections.abc import AsyncGenerator, Callable
from typing import Final

from helios.storage.disk_tier import DiskTier
from helios.storage.early.watching import GrowingFile, Growth
from helios.storage.manifest import Manifest
from helios.storage.sync.partial import PartialBlobs

_LOOK_SECONDS: Final = 0.5
"""How late the beginning of a fetch may be noticed; what comes of it is told at once."""


async def watch_growth(
    find: Callable[[], tuple[Manifest, DiskTier] | None], partials: PartialBlobs
) -> AsyncGenerator[Growth, None]:
    """Yields what is here of a revision whenever that changes, for ever; `find` says what is fetched, and where to."""
    told: Growth | None = None
    while True:
        fetching = find()
        if fetching is not None and (now := _growth(*fetching, partials)) != told:
            told = now
            yield now
        await partials.wait(_LOOK_SECONDS)


def _growth(manifest: Manifest, tier: DiskTier, partials: PartialBlobs) -> Growth:
    found: list[GrowingFile] = []
    awaited: list[str] = []
    for entry in manifest.entries:
        hash_, size_bytes = entry.digest.hash, entry.digest.size_bytes
        if tier.inventory.has_blob(entry.digest):
            place = str(tier.store.blob_path(hash_))
            found.append(GrowingFile(entry.path, place, size_bytes, ((0, size_bytes),) if size_bytes else ()))
        # The file in this tier, which is to be lent: another fetch may bring the blob to another one meanwhile.
        elif (growing := partials.growing(hash_, tier.store.root)) is not None and growing[2]:
            file, generation, spans = growing
            found.append(GrowingFile(entry.path, str(file), size_bytes, tuple(spans), generation))
        else:
            awaited.append(entry.path)
    return Growth(tuple(found), tuple(awaited))
