"""Garbage collection of the blob store: by reachability, beside running ingests, each few hours or when asked.

    list the store → read the rows → plan (``collection``) → doom, read the rows again, delete (``Blobs.collect``)

Listing and deleting take as long as the store takes and hold no lock. Between them nothing can be lost: what an ingest
uses is held, and what it has committed is seen by the second reading.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

import structlog

from helios.mesh.errors import Conflict, HeliosError
from helios.registry import metrics, offload
from helios.registry.blobs import Blobs, BlobStore
from helios.registry.collection import CollectionReport, StoredBlob, plan_collection
from helios.registry.settings import CollectionSettings
from helios.registry.store import Store

log = structlog.get_logger()


class Collector:
    """Collects one registry's blobs; one collection at a time."""

    def __init__(self, store: Store, blobs: Blobs, settings: CollectionSettings) -> None:
        self._store = store
        self._blobs = blobs
        self._settings = settings
        self._running = asyncio.Lock()
        # Of a shared store: since when a blob was seen without a reference.
        self._free_since: dict[str, datetime] = {}

    async def collect(self, *, is_dry_run: bool = False, grace: timedelta | None = None) -> CollectionReport:
        """Removes what nothing refers to and is older than the grace period; None: the settings'.

        Raises:
            Conflict: COLLECTION_RUNNING.
            Unavailable: BLOB_STORE_UNAVAILABLE, BLOB_STORE_DENIED; the next collection goes on.
        """
        if self._running.locked():
            raise Conflict("a collection is running; its result is in the log", reason="COLLECTION_RUNNING")
        async with self._running:
            return await self._collect(is_dry_run, self._grace if grace is None else grace)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Collects each few hours for the length of the block; what runs at its end is cancelled and awaited."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._run(), name="collect blobs")
            try:
                yield
            finally:
                task.cancel()

    async def _run(self) -> None:
        while self._settings.interval_seconds:
            await asyncio.sleep(self._settings.interval_seconds)
            try:
                await self.collect()
            except (HeliosError, OSError) as error:
                # The next time finds what this one left.
                log.warning("collection failed", reason=getattr(error, "reason", "DISK"), error=str(error))

    @property
    def _grace(self) -> timedelta:
        return timedelta(seconds=self._settings.grace_seconds)

    async def _collect(self, is_dry_run: bool, grace: timedelta) -> CollectionReport:
        now = datetime.now(UTC)
        store = self._blobs.store
        stored = await offload.run(partial(_scan, store))
        reachable = await self._store.referenced_blobs()
        free = {blob.hash: self._free_since.get(blob.hash, now) for blob in stored if blob.hash not in reachable}
        self._free_since = free if self._blobs.is_shared else {}
        free_since = self._free_since if self._blobs.is_shared else None
        plan = plan_collection(stored, reachable, now=now, grace=grace, free_since=free_since)
        sizes = {blob.hash: blob.size_bytes for blob in plan.doomed}
        if is_dry_run:
            removed = frozenset(sizes) - self._blobs.held(sizes)
        else:
            removed = await self._blobs.collect(sizes, self._store.referenced_blobs)
        unfinished = await offload.run(lambda _: store.sweep(before=now - grace, is_dry_run=is_dry_run))
        spared = [*plan.young, *(blob for blob in plan.doomed if blob.hash not in removed)]
        report = CollectionReport(
            removed_count=len(removed),
            removed_bytes=sum(sizes[value] for value in removed),
            spared_count=len(spared),
            spared_bytes=sum(blob.size_bytes for blob in spared),
            reachable_count=plan.reachable_count,
            reachable_bytes=plan.reachable_bytes,
            unfinished_count=unfinished,
            missing=plan.missing,
        )
        if not is_dry_run:
            _record(report)
        return report


def _scan(store: BlobStore, stop: offload.Stop) -> list[StoredBlob]:
    found = []
    for blob in store.scan():
        stop.check()
        found.append(blob)
    return found


def _record(report: CollectionReport) -> None:
    metrics.COLLECTED_BYTES.inc(report.removed_bytes)
    if report.removed_count or report.unfinished_count:
        log.info(
            "blobs collected",
            count=report.removed_count,
            freed_bytes=report.removed_bytes,
            unfinished_count=report.unfinished_count,
        )
    if report.missing:
        log.error("blobs are missing; ingest their models again", blobs=report.missing[:20], count=len(report.missing))
