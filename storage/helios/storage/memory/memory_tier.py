"""The tier of sealed memory files for the event loop: as a disk tier, and what a restart of the agent means to it.

The files of revisions that are lent live on with their holders. After a restart the tier knows from its index what it
lent, takes back what holders hand it (seals, size and sha256 checked before anything counts), and until all of that is
back or the grace is over, it takes nothing new and gives nothing up: the memory is in use, though not by it.
"""

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

import structlog

from helios.mesh.errors import DiskFull, InvalidRequest, Unavailable
from helios.mesh.sealed import check_sealed
from helios.storage.blob_store import check_digest
from helios.storage.disk_tier import DiskTier
from helios.storage.fetch import BlobSource, FetchToken, FileReader, RangedBlob
from helios.storage.inventory import Resident
from helios.storage.manifest import Digest
from helios.storage.memory.sealed_store import SealedStore
from helios.storage.scrub import ReadResult, read_memory
from helios.storage.tiers import TierOptions

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Awaited:
    resident: Resident
    is_decided: asyncio.Event = field(default_factory=asyncio.Event)


class SealedSource:
    """The blobs of a store in memory, for another tier."""

    def __init__(self, store: SealedStore) -> None:
        self._store = store

    def open(self, digest: Digest) -> FileReader:
        return FileReader(self._store.duplicate(digest))

    def linkable_path(self, digest: Digest) -> Path | None:
        """None: there is no name to link to."""
        del digest
        return None

    def ranged(self, digest: Digest) -> RangedBlob | None:
        """None: memory is read by one reader."""
        del digest
        return None


class MemoryTier(DiskTier):
    """Sealed memory files; the root is a directory on a disk for the index and views."""

    def __init__(self, root: Path, *, options: TierOptions) -> None:
        self._sealed = SealedStore(root)
        super().__init__(root, fetch_thread_count=1, is_link_allowed=False, options=options, store=self._sealed)
        self._awaited: dict[str, _Awaited] = {}
        self._taking = asyncio.Lock()

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._awaited = {resident.revision: _Awaited(resident) for resident in self.lent_before}
        return self

    @property
    def is_settled(self) -> bool:
        """Whether nothing is expected back any more."""
        return not self._awaited

    def source(self) -> BlobSource:
        """The blobs of this tier, for another one."""
        return SealedSource(self._sealed)

    def duplicate(self, digest: Digest) -> int:
        """A descriptor of a blob, which the caller owns. Raises BlobNotFound."""
        return self._sealed.duplicate(digest)

    async def wait_returned(self, revision: str) -> None:
        """Waits until a revision that is expected is back, or given up; returns at once where none is expected."""
        if (awaited := self._awaited.get(revision)) is not None:
            await awaited.is_decided.wait()

    async def take_back(self, revision: str, files: Mapping[Digest, int]) -> None:
        """Takes what a holder hands back of a revision; the descriptors stay the caller's. Idempotent.

        Raises:
            Corrupted: NOT_SEALED; DigestMismatch. Nothing of that file is kept.
            InvalidRequest: FILES_MISSING.
        """
        async with self._taking:
            if (awaited := self._awaited.get(revision)) is None:
                return
            manifest = awaited.resident.manifest
            missing = self.inventory.missing(manifest)
            if not files.keys() >= set(missing):
                raise InvalidRequest("not all files of the revision were handed back", reason="FILES_MISSING")
            for blob in missing:
                await self._take_one(blob, files[blob])
            await self.add_revision(manifest, awaited.resident.last_used_at, like=awaited.resident)
            self._decide(revision)
        log.info("revision handed back", tier=self.name, revision=revision, size_bytes=manifest.size_bytes)

    async def settle(self, grace_seconds: float) -> set[str]:
        """Waits until all is back, for the grace at most; returns the revisions that are given up then.

        What is being checked when the grace ends is still taken.
        """
        try:
            async with asyncio.timeout(grace_seconds):
                for awaited in list(self._awaited.values()):
                    await awaited.is_decided.wait()
        except TimeoutError:
            log.warning("files in memory were not handed back", tier=self.name, revisions=sorted(self._awaited))
        async with self._taking:
            lost = set(self._awaited)
            try:
                if lost:
                    await self.forget_revisions(lost)
            except (DiskFull, Unavailable) as error:
                # The next start drops the rows: their leases have ended by then.
                log.warning("index is behind until the next start", tier=self.name, error=error.message)
            for revision in lost:
                self._decide(revision)
        return lost

    async def read(self, digest: Digest, token: FetchToken, *, bytes_per_second: float) -> ReadResult:
        """Hashes a blob as memory has it, no faster than the limit (0: none)."""
        result = await self._scrubbing.run_cancellable(
            lambda: read_memory(self._sealed.duplicate(digest), token, bytes_per_second=bytes_per_second),
            cancel=token.cancel,
        )
        self.statistics.scrubbed_bytes += result.size_bytes
        self.statistics.read.add(result.size_bytes, result.read_seconds)
        return result

    async def _take_one(self, blob: Digest, descriptor: int) -> None:
        check_sealed(descriptor, blob.size_bytes)
        token = FetchToken()
        owned = os.dup(descriptor)
        result = await self._scrubbing.run_cancellable(lambda: read_memory(owned, token), cancel=token.cancel)
        check_digest(blob, actual_hash=result.hash, actual_bytes=result.size_bytes)
        self._sealed.keep(blob, os.dup(descriptor))
        await self.note_blob(blob, datetime.now(UTC).timestamp())

    def _decide(self, revision: str) -> None:
        self._awaited.pop(revision).is_decided.set()
