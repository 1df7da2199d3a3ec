"""Materialising revisions: who wants what, what is held, what must go, and the leases.

One fetch serves everybody who wants a revision, and one fetch of a blob serves all revisions that have it. From the
moment a revision is wanted until its lease is granted it is *held*: as good as leased, so that nothing can be evicted
between the end of a fetch and the grant. This module decides with the inventory and the lease table, both in memory;
the tier carries out.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog

from helios.mesh.errors import DiskFull, HeliosError, PreconditionFailed
from helios.storage import metrics
from helios.storage.clock import Clock, steady_clock
from helios.storage.disk_tier import DiskTier
from helios.storage.eviction import EvictionPlan, plan_evict_one, plan_eviction
from helios.storage.fetch import BlobSource, is_leftover_unwanted, source_from_url
from helios.storage.leases import Lease, LeaseTable, check_ttl, restore
from helios.storage.manifest import Digest, Manifest, revision_hash
from helios.storage.threads import Flights

log = structlog.get_logger()

_EXPIRY_SECONDS = 1.0
"""How late an ended lease may be collected; until then it counts for nothing anyway."""


class ManifestSource(Protocol):
    """Where manifests come from."""

    async def get_manifest(self, revision: str) -> tuple[Manifest, str]:
        """Returns a checked manifest and the URL of the store that has its blobs.

        Raises:
            HeliosError: RevisionNotFound, InvalidRequest (INVALID_MANIFEST), Unavailable (SOURCE_UNAVAILABLE).
        """
        ...


@dataclass(frozen=True, slots=True)
class Loan:
    """A revision that is lent: the lease, where its files are, and what had to be fetched for it."""

    lease: Lease
    path: Path
    fetched_bytes: int


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far the fetch of a revision is."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class RevisionResidency:
    """A revision on the node."""

    revision: str
    size_bytes: int
    lease_count: int


class Materializer:
    """Lends revisions of one disk tier. Made by `open_materializer`; used on one event loop."""

    def __init__(
        self,
        tier: DiskTier,
        manifests: ManifestSource,
        revisions: Flights[int],
        blobs: Flights[None],
        *,
        capacity_bytes: int,
        clock: Clock,
    ) -> None:
        self._tier = tier
        self._manifests = manifests
        self._revision_flights = revisions
        self._blob_flights = blobs
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._leases = LeaseTable(restore(tier.persisted_leases, clock()))
        self._held: Counter[str] = Counter()
        self._wanted: Counter[Digest] = Counter()
        self._fetching: dict[str, Manifest] = {}
        self._making_room = asyncio.Lock()
        self._counts = _ByteCounts()
        self._show()

    async def materialize(self, revision: str, *, holder: str, ttl: timedelta | None, lease_id: str) -> Loan:
        """Brings a revision to the node and grants a lease, or resumes one.

        A caller that is cancelled leaves no lease behind, and ends no fetch that somebody else waits for.

        Raises:
            InvalidRequest: INVALID_REVISION, INVALID_TTL, INVALID_MANIFEST.
            NotFound: LEASE_NOT_FOUND, REVISION_NOT_FOUND.
            DigestMismatch, DiskFull, Unavailable: The fetch failed.
        """
        revision_hash(revision)
        check_ttl(ttl)
        if lease_id:
            lease = self._leases.resume(lease_id, revision, ttl=ttl, now=self._clock())
            await self._tier.put_lease(lease)
            return Loan(lease, self._tier.view_path(revision), 0)
        with self._hold(revision):
            fetched_bytes = 0
            if self._tier.inventory.find(revision) is None:
                fetched_bytes = await self._revision_flights.join(revision, partial(self._bring, revision))
            lease = await self._grant(revision, holder, ttl)
        return Loan(lease, self._tier.view_path(revision), fetched_bytes)

    def progress(self, revision: str) -> FetchProgress | None:
        """How far the fetch of a revision is; None while there is none, or its manifest is not known yet."""
        manifest = self._fetching.get(revision)
        if manifest is None:
            return None
        here = self._tier.inventory
        done = sum(b.size_bytes if here.has_blob(b) else self._counts.get(b) for b in manifest.blobs)
        return FetchProgress(done, manifest.size_bytes)

    async def renew(self, lease_id: str) -> Lease:
        """Renews a lease.

        Raises:
            NotFound: LEASE_NOT_FOUND.
        """
        lease = self._leases.renew(lease_id, self._clock())
        await self._tier.put_lease(lease)
        return lease

    async def release(self, lease_id: str) -> None:
        """Ends a lease. Idempotent."""
        lease = self._leases.release(lease_id, self._clock())
        if lease is not None:
            await self._forget([lease])

    async def evict(self, revision: str) -> int:
        """Drops a revision and the blobs that only it uses; returns the bytes that were freed. Idempotent.

        Raises:
            PreconditionFailed: REVISION_LEASED.
        """
        revision_hash(revision)

        def plan() -> EvictionPlan:
            if revision in self._kept_revisions():
                raise PreconditionFailed(
                    "the revision is in use; stop its replicas first",
                    reason="REVISION_LEASED",
                    metadata={"revision": revision},
                )
            return plan_evict_one(self._tier.inventory, revision, keep=self._wanted_blobs())

        freed_bytes = (await self._tier.drop(plan)).freed_bytes
        self._show()
        return freed_bytes

    def residency(self) -> list[RevisionResidency]:
        """The revisions on the node, by digest."""
        counts = self._leases.count_by_revision(self._clock())
        return [
            RevisionResidency(r.revision, r.manifest.size_bytes, counts.get(r.revision, 0))
            for r in sorted(self._tier.inventory.revisions(), key=lambda resident: resident.revision)
        ]

    def used_bytes(self) -> int:
        """Bytes of blobs in the tier."""
        return self._tier.inventory.used_bytes

    @property
    def capacity_bytes(self) -> int:
        """What the tier may hold; 0: as much as the disk."""
        return self._capacity_bytes

    async def expire_leases(self) -> None:
        """Collects ended leases, for ever."""
        while True:
            ended = self._leases.expire(self._clock())
            if ended:
                log.info("leases expired", count=len(ended), holders=sorted({lease.holder for lease in ended}))
                await self._forget(ended)
            await asyncio.sleep(_EXPIRY_SECONDS)

    async def _grant(self, revision: str, holder: str, ttl: timedelta | None) -> Lease:
        now = self._clock()
        lease = self._leases.grant(revision, holder=holder, ttl=ttl, now=now)
        try:
            await self._tier.put_lease(lease, self._tier.inventory.touch(revision, now))
        except BaseException:
            # Whoever asked never learns of the lease.
            await self.release(lease.id)
            raise
        self._show()
        return lease

    async def _forget(self, ended: list[Lease]) -> None:
        now = self._clock()
        touched = [self._tier.inventory.touch(lease.revision, min(now, lease.ends_at)) for lease in ended]
        self._show()
        await self._tier.delete_leases(ended, [resident for resident in touched if resident is not None])

    async def _bring(self, revision: str) -> int:
        """Fetches what is missing and makes the revision resident; returns the bytes that were fetched."""
        manifest, url = await self._manifests.get_manifest(revision)
        source = source_from_url(url)
        try:
            with ExitStack() as wanted:
                # One at a time: two that make room at once would each see the other's wish and both give up.
                async with self._making_room:
                    wanted.enter_context(self._want(manifest))
                    missing = self._tier.inventory.missing(manifest)
                    await self._make_room()
                try:
                    await self._fetch_all(source, missing)
                except DiskFull:
                    if not await self._evict_for(sum(blob.size_bytes for blob in missing)):
                        raise
                    await self._fetch_all(source, self._tier.inventory.missing(manifest))
                await self._tier.add_revision(manifest, self._clock())
        except HeliosError as error:
            log.warning("revision not materialised", revision=revision, reason=error.reason, error=error.message)
            if is_leftover_unwanted(error):
                await self._tier.drop(partial(self._plan_leftovers, manifest))
            raise
        finally:
            self._show()
        fetched_bytes = sum(blob.size_bytes for blob in missing)
        log.info("revision materialised", revision=revision, fetched_bytes=fetched_bytes)
        return fetched_bytes

    async def _fetch_all(self, source: BlobSource, missing: list[Digest]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for blob in missing:
                    work = self._blob_flights.join(blob.hash, partial(self._fetch_one, source, blob))
                    group.create_task(work, name=f"want blob {blob.hash}")
        except BaseExceptionGroup as errors:
            # The group's siblings are cancelled and cleaned up by now; one error says why.
            expected, _ = errors.split(HeliosError)
            if expected is None:
                raise
            raise _first(expected) from errors

    async def _fetch_one(self, source: BlobSource, blob: Digest) -> None:
        # Another flight may have brought it between the look and the turn.
        if self._tier.inventory.has_blob(blob):
            return
        with self._counts.counting(blob):
            await self._tier.fetch(source, blob, partial(self._counts.add, blob))
        metrics.FETCHED_BYTES.inc(blob.size_bytes)

    async def _make_room(self) -> None:
        """Evicts until everything that is wanted fits into the capacity.

        Raises:
            DiskFull: What is held and wanted is more than the capacity.
        """
        if self._excess_bytes() > 0:
            await self._evict_for(self._excess_bytes())
        if self._excess_bytes() > 0:
            raise DiskFull(
                "the storage agent's capacity is used by models that are in use; scale one down or raise the capacity",
                metadata={"capacity_bytes": str(self._capacity_bytes), "excess_bytes": str(self._excess_bytes())},
            )

    def _excess_bytes(self) -> int:
        if self._capacity_bytes == 0:
            return 0
        here = self._tier.inventory
        coming = sum(blob.size_bytes for blob in self._wanted_blobs() if not here.has_blob(blob))
        return here.used_bytes + coming - self._capacity_bytes

    async def _evict_for(self, needed_bytes: int) -> int:
        plan = await self._tier.drop(
            lambda: plan_eviction(
                self._tier.inventory, needed_bytes, held=self._kept_revisions(), keep=self._wanted_blobs()
            )
        )
        return plan.freed_bytes

    def _plan_leftovers(self, manifest: Manifest) -> EvictionPlan:
        unwanted = manifest.blobs - self._wanted_blobs()
        return EvictionPlan(blobs=tuple(blob for blob in self._tier.inventory.strays() if blob in unwanted))

    def _kept_revisions(self) -> set[str]:
        return {*self._leases.count_by_revision(self._clock()), *(+self._held)}

    def _wanted_blobs(self) -> set[Digest]:
        return set(+self._wanted)

    @contextmanager
    def _hold(self, revision: str) -> Iterator[None]:
        self._held[revision] += 1
        try:
            yield
        finally:
            self._held[revision] -= 1
            self._held = +self._held

    @contextmanager
    def _want(self, manifest: Manifest) -> Iterator[None]:
        self._wanted.update(manifest.blobs)
        self._fetching[manifest.revision] = manifest
        try:
            yield
        finally:
            del self._fetching[manifest.revision]
            self._wanted.subtract(manifest.blobs)
            self._wanted = +self._wanted

    def _show(self) -> None:
        metrics.LEASE_COUNT.set(len(self._leases.alive(self._clock())))
        metrics.TIER_USED_BYTES.labels(tier="disk").set(self._tier.inventory.used_bytes)


@asynccontextmanager
async def open_materializer(
    tier: DiskTier, manifests: ManifestSource, *, capacity_bytes: int = 0, clock: Clock | None = None
) -> AsyncIterator[Materializer]:
    """Opens the tier and lends from it; leaving cancels fetches and closes the tier.

    Raises:
        PreconditionFailed: ROOT_IN_USE.
    """
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(tier)
        blobs = await stack.enter_async_context(Flights[None]("fetch blob"))
        revisions = await stack.enter_async_context(Flights[int]("materialise"))
        yield Materializer(
            tier, manifests, revisions, blobs, capacity_bytes=capacity_bytes, clock=clock or steady_clock()
        )


class _ByteCounts:
    """Bytes that came for each blob; added by threads, read by the loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[Digest, int] = {}

    def add(self, blob: Digest, count: int) -> None:
        with self._lock:
            self._counts[blob] = self._counts.get(blob, 0) + count

    def get(self, blob: Digest) -> int:
        return self._counts.get(blob, 0)

    @contextmanager
    def counting(self, blob: Digest) -> Iterator[None]:
        try:
            yield
        finally:
            self._counts.pop(blob, None)


def _first(group: BaseExceptionGroup[HeliosError]) -> HeliosError:
    error = group.exceptions[0]
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
