"""Garbage collection of the blob store: by reachability, beside running ingests, each few hours or when asked.

    read some rows → list those blobs → plan (``collection``) → doom, read their rows again, delete (``Blobs.collect``)

By the beginning of the hashes, some thousands of blobs at a time: what is in memory does not grow with the store, and
the event loop does nothing that takes long. Listing and deleting take as long as the store takes and hold no lock.
Between them nothing can be lost: what an ingest uses is held, and what it has committed is seen by the second reading.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from typing import Final

import structlog

from helios.mesh.errors import Conflict, HeliosError
from helios.registry import metrics, offload
from helios.registry.blob_rows import BlobRows
from helios.registry.blobs import Blobs
from helios.registry.collection import (
    MAX_NAMED,
    CollectionPlan,
    CollectionReport,
    StoredBlob,
    plan_collection,
    prefixes,
)
from helios.registry.manifest import Digest
from helios.registry.settings import CollectionSettings

log = structlog.get_logger()

# Blobs that are listed at a time: a hundredth of a second of a thread.
_STEP: Final = 1_000


class Collector:
    """Collects one registry's blobs; one collection at a time."""

    def __init__(self, rows: BlobRows, blobs: Blobs, settings: CollectionSettings) -> None:
        self._rows = rows
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
            PreconditionFailed: BLOB_STORE_OWNED, another database has taken the store over.
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
        found, free_since = _Found(), dict[str, datetime]()
        for prefix in prefixes(await self._rows.count()):
            await self._collect_some(prefix, _Rule(now, grace, is_dry_run), found, free_since)
        self._free_since = free_since
        unfinished = await self._blobs.sweep(before=now - grace, is_dry_run=is_dry_run)
        report = found.report(unfinished)
        if not is_dry_run:
            _record(report)
        return report

    async def _collect_some(self, prefix: str, rule: "_Rule", found: "_Found", free_since: dict[str, datetime]) -> None:
        """Collects the blobs whose hashes begin so."""
        reachable = await self._rows.read(prefix)
        whole: dict[str, int] = {}
        # Of a shared store: since when a blob was seen without a reference.
        seen = self._free_since if self._blobs.is_shared else None
        with closing(self._blobs.store.scan(prefix)) as stored:
            while True:
                plan = await offload.run(partial(_plan_next, stored, reachable, rule, seen))
                if plan is None:
                    break
                whole.update(plan.whole)
                if seen is not None:
                    free_since.update(
                        (blob.hash, seen.get(blob.hash, rule.now)) for blob in (*plan.doomed, *plan.young)
                    )
                sizes = {blob.hash: blob.size_bytes for blob in plan.doomed}
                if rule.is_dry_run:
                    removed = frozenset(sizes) - self._blobs.held(sizes)
                else:
                    removed = await self._blobs.collect(sizes, self._rows.referenced)
                found.add(plan, removed)
        found.missing(await self._still_missing(reachable, whole))

    async def _still_missing(self, reachable: Mapping[str, int], whole: Mapping[str, int]) -> list[str]:
        """Returns what is missing, without what went, or came, between the reading of rows and the listing."""
        digests = await offload.run(
            lambda _: [Digest(hash_, size) for hash_, size in reachable.items() if hash_ not in whole]
        )
        lost = [each.hash for each in await self._blobs.missing(digests)]
        return sorted(await self._rows.referenced(lost))


@dataclass(frozen=True, slots=True)
class _Rule:
    now: datetime
    grace: timedelta
    is_dry_run: bool


class _Found:
    """What a collection has found until now."""

    def __init__(self) -> None:
        self._removed: list[int] = [0, 0]
        self._spared: list[int] = [0, 0]
        self._whole: list[int] = [0, 0]
        self._missing_count = 0
        self._missing: list[str] = []

    def add(self, plan: CollectionPlan, removed: Collection[str]) -> None:
        """Adds some blobs, of which these are gone."""
        for blob in (*plan.doomed, *plan.young):
            _count(self._removed if blob.hash in removed else self._spared, 1, blob.size_bytes)
        _count(self._whole, len(plan.whole), sum(plan.whole.values()))

    def missing(self, hashes: Sequence[str]) -> None:
        """Adds blobs that are missing."""
        self._missing_count += len(hashes)
        self._missing += hashes[: MAX_NAMED - len(self._missing)]

    def report(self, unfinished_count: int) -> CollectionReport:
        """Returns all of it."""
        return CollectionReport(
            removed_count=self._removed[0],
            removed_bytes=self._removed[1],
            spared_count=self._spared[0],
            spared_bytes=self._spared[1],
            reachable_count=self._whole[0],
            reachable_bytes=self._whole[1],
            unfinished_count=unfinished_count,
            missing=tuple(self._missing),
            missing_count=self._missing_count,
        )


def _count(total: list[int], count: int, size_bytes: int) -> None:
    total[0] += count
    total[1] += size_bytes


def _plan_next(
    stored: Iterator[StoredBlob],
    reachable: Mapping[str, int],
    rule: _Rule,
    free_since: Mapping[str, datetime] | None,
    stop: offload.Stop,
) -> CollectionPlan | None:
    """Plans for the blobs that are listed next; None where there are no more."""
    blobs = list(islice(stored, _STEP))
    stop.check()
    if not blobs:
        return None
    return plan_collection(blobs, reachable, now=rule.now, grace=rule.grace, free_since=free_since)


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
        log.error("blobs are missing; ingest their models again", blobs=report.missing[:20], count=report.missing_count)
