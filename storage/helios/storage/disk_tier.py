"""The disk tier for the event loop: files and index on one side, the inventory that decisions read on the other.

All file and index work runs in pools of threads. Changes to the layout (index, views, unlinking) run one after the
other in one thread; fetches run beside them. The inventory changes on the loop only: it gains a blob or a revision
after the disk has it, and loses it before the disk does.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Self

import structlog

from helios.mesh.errors import HeliosError
from helios.storage.blob_store import BlobStore
from helios.storage.eviction import EvictionPlan
from helios.storage.fetch import BlobFetcher, BlobSource, FetchToken
from helios.storage.index import Index
from helios.storage.inventory import Inventory, Resident
from helios.storage.leases import Lease
from helios.storage.manifest import Digest, Manifest
from helios.storage.threads import BlockingPool

log = structlog.get_logger()


class DiskTier:
    """One root directory. An async context manager: entering repairs what a crash left, leaving waits for its
    threads.
    """

    def __init__(self, root: Path, *, fetch_thread_count: int, is_link_allowed: bool = True) -> None:
        self._store = BlobStore(root)
        self._disk = BlockingPool("disk", 1)
        self._fetching = BlockingPool("fetch", fetch_thread_count)
        self._hashing = BlockingPool("hash", fetch_thread_count)
        self._fetcher = BlobFetcher(self._store, hashing=self._hashing.executor, is_link_allowed=is_link_allowed)
        self._index: Index | None = None
        # Held from the decision to drop a blob until it is unlinked, so that a fetch of it can't finish in between.
        self._dropping = asyncio.Lock()
        self.inventory = Inventory()
        self.persisted_leases: list[Lease] = []

    async def __aenter__(self) -> Self:
        """Takes the root and repairs it.

        Raises:
            PreconditionFailed: ROOT_IN_USE.
        """
        try:
            await self._disk.run(self._start)
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for pool in (self._fetching, self._hashing, self._disk):
            await pool.close()
        if self._index is not None:
            self._index.close()
        self._store.close()

    def view_path(self, revision: str) -> Path:
        return self._store.view_path(revision)

    async def fetch(self, source: BlobSource, digest: Digest, on_bytes: Callable[[int], None]) -> None:
        """Fetches a blob; when this is cancelled the blob is there, or nothing of it.

        Args:
            source: Where it comes from.
            digest: Which one.
            on_bytes: Called in a thread with the count of bytes that came.

        Raises:
            HeliosError: As `BlobFetcher.fetch`.
        """
        async with self._dropping:
            pass
        token = FetchToken(on_bytes)
        is_committed = False

        def work() -> None:
            nonlocal is_committed
            self._fetcher.fetch(source, digest, token)
            is_committed = True

        try:
            await self._fetching.run_cancellable(work, cancel=token.cancel)
        finally:
            if is_committed:
                self.inventory.add_blob(digest)
                await self._disk.run(self._opened.put_blob, digest)

    async def add_revision(self, manifest: Manifest, now: datetime) -> None:
        """Makes the view of a revision whose blobs are all here, and notes that it is resident."""
        resident = Resident(manifest, now)

        def work() -> None:
            self._store.make_view(manifest)
            self._opened.put_revision(resident)

        await self._disk.run(work)
        self.inventory.add_revision(resident)

    async def drop(self, make_plan: Callable[[], EvictionPlan]) -> EvictionPlan:
        """Makes a plan of the inventory as it stands, carries it out and returns it."""
        async with self._dropping:
            plan = make_plan()
            for revision in plan.revisions:
                self.inventory.remove_revision(revision)
            for blob in plan.blobs:
                self.inventory.remove_blob(blob)
            if plan.revisions or plan.blobs:
                await self._disk.run(self._delete, plan)
                log.info("revisions evicted", count=len(plan.revisions), freed_bytes=plan.freed_bytes)
            return plan

    async def put_lease(self, lease: Lease, used: Resident | None = None) -> None:
        """Persists a lease."""
        await self._disk.run(self._opened.put_lease, lease, used)

    async def delete_leases(self, leases: Collection[Lease], used: Iterable[Resident] = ()) -> None:
        """Deletes ended leases, and notes when their revisions were used last."""
        await self._disk.run(self._opened.delete_leases, leases, used)

    @property
    def _opened(self) -> Index:
        assert self._index is not None, "the tier is open"
        return self._index

    def _start(self) -> None:
        self._store.open()
        self._index = index = Index(self._store.root / "index.db")
        known = {blob.hash: blob for blob in index.load_blobs()}
        repair = self._store.repair(known)
        present = {blob.hash: blob for blob in repair.blobs}
        for blob in repair.blobs:
            if blob.hash not in known:
                index.put_blob(blob)
        revisions = index.load_revisions()
        whole = [resident for resident in revisions if all(present.get(b.hash) == b for b in resident.manifest.blobs)]
        damaged = [resident.revision for resident in revisions if resident not in whole]
        gone = [blob for blob in known.values() if present.get(blob.hash) != blob]
        index.delete(revisions=damaged, blobs=gone)
        self._store.repair_views([resident.manifest for resident in whole])
        names = {resident.revision for resident in whole}
        leases = index.load_leases()
        index.delete_leases([lease for lease in leases if lease.revision not in names])
        self.persisted_leases = [lease for lease in leases if lease.revision in names]
        self.inventory = Inventory(repair.blobs, whole)
        log.info(
            "disk tier repaired",
            blobs=len(repair.blobs),
            revisions=len(whole),
            adopted=repair.adopted_count,
            dropped=repair.dropped_count,
            damaged_revisions=len(damaged),
            swept=repair.swept_count,
        )

    def _delete(self, plan: EvictionPlan) -> None:
        # Files first: on a full disk the index may have no room before they are gone, and a crash in between leaves
        # rows without files, which the next start drops.
        for revision in plan.revisions:
            self._store.remove_view(revision)
        for blob in plan.blobs:
            self._store.remove_blob(blob.hash)
        try:
            self._opened.delete(revisions=plan.revisions, blobs=plan.blobs)
        except HeliosError as error:
            log.warning("index is behind the disk until the next start", error=error.message)
