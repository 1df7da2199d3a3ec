"""One tier for the event loop: files and index on one side, the inventory that decisions read on the other.

Every tier that has paths is one of these: NVMe, SSD, and memory as a tmpfs, whose files are a stable path for the stock
loaders and outlive this process, as its index beside them does. A copy from tier to tier is a fetch whose source is the
other tier's directory: verified again, cancellable, and nothing or all of it.

All file and index work runs in pools of threads. Changes to the layout (index, views, unlinking) run one after the
other in one thread; fetches run beside them. The inventory changes on the loop only: it gains a blob or a revision
after the disk has it, and loses it before the disk does.
"""

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import structlog

from helios.mesh.errors import HeliosError
from helios.mesh.file_system import FileSystem
from helios.mesh.transfer.engine import Downloader
from helios.mesh.transfer.gate import Priority
from helios.storage.blob_store import BlobStore, write_error
from helios.storage.eviction import EvictionPlan
from helios.storage.fetch import BlobFetcher, BlobSource, DirectorySource, FetchToken
from helios.storage.index import CLOCK, Index
from helios.storage.inventory import Inventory, Resident
from helios.storage.leases import Lease
from helios.storage.manifest import Digest, Manifest
from helios.storage.prefetch.state import Account
from helios.storage.scrub import ReadResult, read_blob
from helios.storage.statistics import EvictionReason, TierStatistics
from helios.storage.threads import BlockingPool
from helios.storage.tiers import DiskRoom, TierKind, TierOptions

log = structlog.get_logger()

_READ, _WRITE = "read_bytes_per_second", "write_bytes_per_second"


class DiskTier:
    """One root directory. An async context manager: entering repairs what a crash left, leaving waits for its
    threads.
    """

    def __init__(
        self,
        root: Path,
        *,
        fetch_thread_count: int,
        is_link_allowed: bool = True,
        options: TierOptions | None = None,
        files: FileSystem | None = None,
        downloader: Downloader | None = None,
        store: BlobStore | None = None,
    ) -> None:
        self.options = options or TierOptions()
        self.statistics = TierStatistics()
        self.store = store or BlobStore(root, files)
        self._is_link_allowed = is_link_allowed
        self._disk = BlockingPool("disk", 1)
        self._fetching = BlockingPool("fetch", fetch_thread_count)
        self._hashing = BlockingPool("hash", fetch_thread_count)
        self._scrubbing = BlockingPool("scrub", 1)
        self._fetcher = BlobFetcher(
            self.store,
            hashing=self._hashing.executor,
            is_link_allowed=is_link_allowed,
            downloader=downloader,
            on_shared=self.statistics.shared,
        )
        self._index: Index | None = None
        # Held from the decision to drop a blob until it is unlinked, so that a fetch of it can't finish in between.
        self._dropping = asyncio.Lock()
        self.inventory = Inventory()
        self.persisted_leases: list[Lease] = []
        self.persisted_pins: list[str] = []
        self.persisted_account = Account()
        self.lent_before: list[Resident] = []
        self.scrub_times: dict[str, float] = {}

    @property
    def name(self) -> str:
        """Unique on the node."""
        return self.options.name

    async def __aenter__(self) -> Self:
        """Takes the root and repairs it.

        Raises:
            PreconditionFailed: ROOT_IN_USE.
            HeliosError: DiskFull, Unavailable (TIER_FAILED), when the disk does not let it.
        """
        try:
            await self._disk.run(self._start)
        except OSError as error:
            await self.__aexit__(None, None, None)
            raise write_error(error, self.store.root) from error
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        for pool in (self._fetching, self._hashing, self._scrubbing):
            await pool.close()
        if self._index is not None:
            await self._disk.run(self._save_facts)
        await self._disk.close()
        if self._index is not None:
            self._index.close()
        self.store.close()

    @property
    def is_settled(self) -> bool:
        """Whether the inventory says all that the tier has; False while holders may hand files back after a restart."""
        return True

    async def wait_returned(self, revision: str) -> None:
        """Waits while a revision that was lent may be handed back; on a disk nothing is."""

    async def settle(self, grace_seconds: float) -> set[str]:
        """Waits until what was lent is back, for the grace at most; returns the revisions that are given up then."""
        del grace_seconds
        return set()

    def view_path(self, revision: str) -> Path:
        """Where the view of a revision is, or would be."""
        return self.store.view_path(revision)

    def source(self) -> BlobSource:
        """The blobs of this tier, for another one."""
        return DirectorySource(self.store.root / "blobs")

    async def disk_room(self) -> DiskRoom:
        """What the file system has left, whoever fills it; for a tier in memory also what the machine has.

        Raises:
            Unavailable: TIER_FAILED.
        """
        disk = await self._disk.run(self.store.disk_room)
        if self.options.kind is not TierKind.MEMORY:
            return disk
        # A tmpfs promises memory that others may have taken meanwhile.
        free_bytes = min(disk.free_bytes, psutil.virtual_memory().available)
        return DiskRoom(disk.total_bytes - disk.free_bytes + free_bytes, free_bytes)

    async def drop_pages(self, manifest: Manifest) -> None:
        """Has the kernel forget the pages of a revision that is in a faster memory now."""

        def work() -> None:
            for blob in manifest.blobs:
                self.store.drop_pages(blob.hash)

        await self._disk.run(work)

    async def borrowed_revisions(self) -> set[str]:
        """Revisions that share every byte with files outside of this tier: giving them up frees nothing on the disk."""
        return await self._disk.run(self._find_borrowed, self.inventory.revisions())

    async def copied_bytes(self, source: BlobSource, blobs: Iterable[Digest]) -> int:
        """How much more room a fetch of these blobs takes: none for what can be linked, or was begun before."""
        return await self._disk.run(self._count_copied, source, list(blobs))

    async def drop_unfinished(self, keep: Iterable[Digest]) -> None:
        """Removes what earlier fetches of other blobs have left.

        Raises:
            Unavailable: TIER_FAILED.
        """
        try:
            await self._disk.run(self._fetcher.drop_unfinished, list(keep))
        except OSError as error:
            raise write_error(error, self.store.root) from error

    async def fetch(
        self,
        source: BlobSource,
        digest: Digest,
        on_bytes: Callable[[int], None],
        *,
        label: str = "source",
        priority: Callable[[], Priority] = lambda: Priority.START,
    ) -> None:
        """Fetches a blob; when this is cancelled the blob is there, or nothing of it.

        A blob that is here is replaced in one step: whoever has the old file open keeps it.

        Args:
            source: Where it comes from.
            digest: Which one.
            on_bytes: Called in a thread with the count of bytes that came.
            label: What a local source is called in statistics; others are counted by what they are.
            priority: Asked in threads, as chunks are read: how urgent the fetch is among those over a network.

        Raises:
            HeliosError: As `BlobFetcher.fetch`.
        """
        async with self._dropping:
            pass
        token = FetchToken(on_bytes, priority)
        asked_at = time.monotonic()
        is_committed = False
        counts: dict[str, int] = {}

        def work() -> None:
            nonlocal is_committed
            started_at = time.monotonic()
            self.statistics.waited(started_at - asked_at)
            counts.update(self._fetcher.fetch(source, digest, token))
            is_committed = True
            if self._is_copy(digest):
                self.statistics.write.add(digest.size_bytes, time.monotonic() - started_at)

        try:
            await self._fetching.run_cancellable(work, cancel=token.cancel)
        finally:
            if is_committed:
                self.statistics.written_bytes.update(counts or {label: digest.size_bytes})
                await self.note_blob(digest, datetime.now(UTC).timestamp())

    async def note_blob(self, digest: Digest, verified_at_seconds: float) -> None:
        """Notes a blob that the store has, and when it was verified, in seconds of the epoch."""
        self.inventory.add_blob(digest)
        self.scrub_times[digest.hash] = verified_at_seconds
        await self._disk.run(self._opened.put_blob, digest, verified_at_seconds)

    async def forget_revisions(self, revisions: Collection[str]) -> None:
        """Drops rows of revisions that are not here any more."""
        await self._disk.run(partial(self._opened.delete, revisions=revisions))

    async def add_revision(self, manifest: Manifest, now: datetime, *, like: Resident | None = None) -> None:
        """Makes the view of a revision whose blobs are all here, and notes that it is resident.

        Args:
            manifest: The revision.
            now: When that is.
            like: The same revision in another tier, whose uses are counted on.
        """
        count = like.use_count if like is not None else 0
        resident = Resident(manifest, now if like is None else like.last_used_at, count, self.inventory.clock)

        def work() -> None:
            self.store.make_view(manifest)
            self._opened.put_revision(resident)

        await self._disk.run(work)
        self.inventory.add_revision(resident)

    async def relink(self, digest: Digest) -> None:
        """Has all views link to the file that a blob is now, after it was fetched anew."""
        manifests = [r.manifest for r in self.inventory.revisions() if digest in r.manifest.blobs]

        def work() -> None:
            for manifest in manifests:
                self.store.relink(manifest, digest)

        await self._disk.run(work)

    async def drop(self, make_plan: Callable[[], EvictionPlan], reason: EvictionReason) -> EvictionPlan:
        """Makes a plan of the inventory as it stands, carries it out and returns it.

        Raises:
            Unavailable: TIER_FAILED, when files could not be removed. They count for nothing any more: the next start
                hashes those that are still there.
        """
        async with self._dropping:
            plan = make_plan()
            self.inventory.clock = max(self.inventory.clock, plan.clock)
            for revision in plan.revisions:
                self.inventory.remove_revision(revision)
            for blob in plan.blobs:
                self.inventory.remove_blob(blob)
                self.scrub_times.pop(blob.hash, None)
            if plan.revisions or plan.blobs:
                self.statistics.evicted(reason, len(plan.revisions), plan.freed_bytes)
                await self._disk.run(self._delete, plan)
                log.info(
                    "revisions evicted",
                    tier=self.name,
                    reason=reason,
                    revisions=plan.revisions,
                    freed_bytes=plan.freed_bytes,
                )
            return plan

    async def read(self, digest: Digest, token: FetchToken, *, bytes_per_second: float) -> ReadResult:
        """Reads a blob from the disk and hashes it, no faster than the limit (0: none).

        Raises:
            Unavailable: TIER_FAILED; FetchCancelled when this is cancelled.
        """
        path = self.store.blob_path(digest.hash)
        result = await self._scrubbing.run_cancellable(
            lambda: read_blob(path, token, bytes_per_second=bytes_per_second), cancel=token.cancel
        )
        self.statistics.scrubbed_bytes += result.size_bytes
        if result.is_direct:
            self.statistics.read.add(result.size_bytes, result.read_seconds)
        return result

    async def note_scrubbed(self, digest: Digest, now: datetime) -> None:
        """Remembers that a blob was found good."""
        self.scrub_times[digest.hash] = now.timestamp()
        await self._disk.run(self._opened.put_scrub_time, digest.hash, now.timestamp())

    async def put_pin(self, revision: str) -> None:
        """Persists a pin."""
        await self._disk.run(self._opened.put_pin, revision)

    async def delete_pin(self, revision: str) -> None:
        """Deletes a pin."""
        await self._disk.run(self._opened.delete_pin, revision)

    async def put_account(self, account: Account) -> None:
        """Persists what fetching ahead has cost and brought."""
        await self._disk.run(self._opened.put_account, account)

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
        self.store.open()
        self._index = index = Index(self.store.root / "index.db")
        known = {blob.hash: blob for blob in index.load_blobs()}
        repair = self.store.repair(known)
        present = {blob.hash: blob for blob in repair.blobs}
        for blob in repair.blobs:
            if blob.hash not in known:
                index.put_blob(blob, datetime.now(UTC).timestamp())
        revisions = index.load_revisions()
        whole = [resident for resident in revisions if all(present.get(b.hash) == b for b in resident.manifest.blobs)]
        leases = index.load_leases()
        if self.store.is_sealed:
            leased = {lease.revision for lease in leases}
            self.lent_before = [r for r in revisions if r not in whole and r.revision in leased]
        damaged = [r.revision for r in revisions if r not in whole and r not in self.lent_before]
        gone = [blob for blob in known.values() if present.get(blob.hash) != blob]
        index.delete(revisions=damaged, blobs=gone)
        self.store.repair_views([resident.manifest for resident in whole])
        names = {resident.revision for resident in (*whole, *self.lent_before)}
        index.delete_leases([lease for lease in leases if lease.revision not in names])
        self.persisted_leases = [replace(lease, tier=self.name) for lease in leases if lease.revision in names]
        self.persisted_pins = index.load_pins()
        self.persisted_account = index.load_account()
        self.scrub_times = index.load_scrub_times()
        facts = index.load_facts()
        self.statistics.read.bytes_per_second = facts.get(_READ, 0.0)
        self.statistics.write.bytes_per_second = facts.get(_WRITE, 0.0)
        self.inventory = Inventory(repair.blobs, whole, clock=facts.get(CLOCK, 0.0))
        log.info(
            "tier repaired",
            tier=self.name,
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
        failures: list[OSError] = []
        for remove, name in (
            *((self.store.remove_view, revision) for revision in plan.revisions),
            *((self.store.remove_blob, blob.hash) for blob in plan.blobs),
        ):
            try:
                remove(name)
            except OSError as error:
                failures.append(error)
        try:
            self._opened.delete(revisions=plan.revisions, blobs=plan.blobs, clock=plan.clock)
        except HeliosError as error:
            log.warning("index is behind the disk until the next start", error=error.message)
        if failures:
            raise write_error(failures[0], self.store.root) from failures[0]

    def _save_facts(self) -> None:
        facts = {
            _READ: self.statistics.read.bytes_per_second,
            _WRITE: self.statistics.write.bytes_per_second,
            CLOCK: self.inventory.clock,
        }
        try:
            self._opened.put_facts(facts)
        except HeliosError as error:
            log.warning("what was measured is forgotten", tier=self.name, error=error.message)

    def _is_copy(self, digest: Digest) -> bool:
        """Whether a blob's bytes were written here, in contrast to a link to a file of the source."""
        return self.store.link_count(digest.hash) == 1

    def _find_borrowed(self, residents: list[Resident]) -> set[str]:
        own_links = Counter(entry.digest for resident in residents for entry in resident.manifest.entries)
        borrowed = {blob for blob, count in own_links.items() if self.store.link_count(blob.hash) > count + 1}
        return {resident.revision for resident in residents if resident.manifest.blobs <= borrowed}

    def _count_copied(self, source: BlobSource, blobs: list[Digest]) -> int:
        if not self._is_link_allowed:
            return sum(blob.size_bytes - self._fetcher.held_bytes(blob) for blob in blobs)
        device = self.store.root.stat().st_dev
        count = 0
        for blob in blobs:
            try:
                path = source.linkable_path(blob)
                is_linked = path is not None and os.lstat(path).st_dev == device
            except (HeliosError, OSError):
                # Whatever is wrong with the source, the fetch says it.
                is_linked = False
            count += 0 if is_linked else blob.size_bytes - self._fetcher.held_bytes(blob)
        return count
