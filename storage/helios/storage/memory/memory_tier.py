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
from types import TracebackType
from typing import Final, Self

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
from helios.storage.threads import BlockingPool
from helios.storage.tiers import TierOptions

log = structlog.get_logger()


_MAX_CHECK_THREADS: Final = 8
"""That hash what is handed back, no more than there are cores: each brings 1 to 2 GB/s, and with so many memory has no
more to give. They hold a replica's lease up, and nothing else runs that early."""


@dataclass(frozen=True, slots=True)
class _Awaited:
    resident: Resident
    is_decided: asyncio.Event = field(default_factory=asyncio.Event)
    # Two holders may hand one revision back at once.
    taking: asyncio.Lock = field(default_factory=asyncio.Lock)


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
        self._checking = BlockingPool("check", min(_MAX_CHECK_THREADS, os.cpu_count() or 1))
        self._awaited: dict[str, _Awaited] = {}
        # Blobs that are being checked: two revisions may have one, and it is hashed once.
        self._checks: dict[Digest, asyncio.Lock] = {}
        self._taking_count = 0
        self._has_taken = asyncio.Event()
        self._is_grace_over = False

    async def __aenter__(self) -> Self:
        await super().__aenter__()
        self._awaited = {resident.revision: _Awaited(resident) for resident in self.lent_before}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._checking.close()
        await super().__aexit__(kind, error, trace)

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
        if (awaited := self._awaited.get(revision)) is None or self._is_grace_over:
            return
        self._taking_count += 1
        try:
            async with awaited.taking:
                if awaited.is_decided.is_set():
                    return
                await self._take(awaited.resident, files)
                self._decide(revision)
        finally:
            self._taking_count -= 1
            self._has_taken.set()
        manifest = awaited.resident.manifest
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
        self._is_grace_over = True
        while self._taking_count:
            self._has_taken.clear()
            await self._has_taken.wait()
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

    async def _take(self, resident: Resident, files: Mapping[Digest, int]) -> None:
        missing = self.inventory.missing(resident.manifest)
        if not files.keys() >= set(missing):
            raise InvalidRequest("not all files of the revision were handed back", reason="FILES_MISSING")
        try:
            async with asyncio.TaskGroup() as group:
                for blob in missing:
                    group.create_task(self._take_one(blob, files[blob]), name=f"check {blob.hash}")
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        await self.add_revision(resident.manifest, resident.last_used_at, like=resident)

    async def _take_one(self, blob: Digest, descriptor: int) -> None:
        check_sealed(descriptor, blob.size_bytes)
        async with self._checks.setdefault(blob, asyncio.Lock()):
            if self.inventory.has_blob(blob):
                return
            token = FetchToken()
            result = await self._checking.run_cancellable(
                lambda: read_memory(os.dup(descriptor), token), cancel=token.cancel
            )
            check_digest(blob, actual_hash=result.hash, actual_bytes=result.size_bytes)
            self._sealed.keep(blob, os.dup(descriptor))
            await self.note_blob(blob, datetime.now(UTC).timestamp())

    def _decide(self, revision: str) -> None:
        self._awaited.pop(revision).is_decided.set()
        if not self._awaited:
            self._checks.clear()
