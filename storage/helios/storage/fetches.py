"""Bringing revisions to the node: which tier takes one, room for it, and its blobs.

One fetch serves everybody who wants a revision, and one fetch of a blob serves all revisions that have it.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog

from helios.mesh.errors import Corrupted, DiskFull, HeliosError
from helios.mesh.transfer.gate import Priority
from helios.mesh.transfer.progress import RateMeter, TransferProgress
from helios.storage import metrics
from helios.storage.clock import Clock
from helios.storage.disk_tier import DiskTier
from helios.storage.early.order import in_reading_order
from helios.storage.fetch import BlobSource, is_leftover_unwanted
from helios.storage.manifest import Digest, Manifest
from helios.storage.room import Room
from helios.storage.statistics import EvictionReason
from helios.storage.threads import Flights
from helios.storage.tiers import TierKind, check_fits_somewhere

log = structlog.get_logger()


class ManifestSource(Protocol):
    """Where manifests come from."""

    async def get_manifest(self, revision: str) -> tuple[Manifest, BlobSource]:
        """Returns a checked manifest and the source that has its blobs.

        Raises:
            HeliosError: RevisionNotFound, InvalidRequest (INVALID_MANIFEST), Unavailable (SOURCE_UNAVAILABLE).
        """
        ...


@dataclass(frozen=True, slots=True)
class _Fetching:
    """A revision on its way, and how fast it comes."""

    manifest: Manifest
    room: Room
    meter: RateMeter


class Fetches:
    """Fetches of revisions into a node's tiers, the fastest first; used on one event loop."""

    def __init__(
        self,
        rooms: Sequence[Room],
        manifests: ManifestSource,
        *,
        revisions: Flights[int],
        blobs: Flights[None],
        clock: Clock,
        make_way: Callable[[str], Awaitable[None]],
    ) -> None:
        """Takes what ends work that can wait, which is called with each revision that somebody waits for."""
        self._rooms = rooms
        self._manifests = manifests
        self._revision_flights = revisions
        self._blob_flights = blobs
        self._clock = clock
        self._make_way = make_way
        self._fetching: dict[str, _Fetching] = {}
        # Revisions that somebody waits for, and those whose fetch ahead has chosen among the room that is to spare.
        self._wanted: Counter[str] = Counter()
        self._sparing: set[str] = set()
        self._counts = _ByteCounts()

    @property
    def is_fetching(self) -> bool:
        """Whether somebody waits for bytes, from the moment when a revision is wanted, or some are fetched ahead."""
        return bool(self._wanted or self._fetching)

    async def bring(self, revision: str) -> int:
        """Has a revision be resident in a disk tier; returns the bytes that were fetched for it.

        Joins a fetch that goes on; ends it when the last who wants it has left.

        Raises:
            HeliosError: RevisionNotFound, InvalidRequest (INVALID_MANIFEST), DigestMismatch, DiskFull, Unavailable.
        """
        self._wanted[revision] += 1
        try:
            await self._make_way(revision)
            is_sparing = revision in self._sparing
            try:
                return await self._join(revision, may_evict=True)
            except DiskFull:
                if not is_sparing:
                    raise
                # The fetch that was joined was one ahead, for which nothing is given up.
                return await self._join(revision, may_evict=True)
        finally:
            self._wanted[revision] -= 1
            self._wanted = +self._wanted

    async def bring_ahead(self, revision: str, *, may_evict: bool) -> int:
        """As `bring`, for nobody yet: what goes on meanwhile goes on, and without `may_evict` the revision comes to a
        disk that has room to spare, or to none.

        Raises:
            HeliosError: As `bring`.
        """
        return await self._join(revision, may_evict=may_evict)

    async def _join(self, revision: str, *, may_evict: bool) -> int:
        return await self._revision_flights.join(revision, partial(self._bring, revision, may_evict=may_evict))

    def progress(self, revision: str) -> TransferProgress | None:
        """How far the fetch of a revision is; None while there is none, or its manifest is not known yet.

        Its rate is measured when it is asked for: whoever wants it asks some times a second.
        """
        fetching = self._fetching.get(revision)
        if fetching is None:
            return None
        now = self._clock().timestamp()
        done_bytes = self._done_bytes(fetching.manifest, fetching.room)
        fetching.meter.observe(now, done_bytes)
        return fetching.meter.progress(now, done_bytes, fetching.manifest.size_bytes)

    def _done_bytes(self, manifest: Manifest, room: Room) -> int:
        here = room.tier.inventory
        return sum(blob.size_bytes if here.has_blob(blob) else self._counts.get(blob) for blob in manifest.blobs)

    def fetching(self, revision: str) -> tuple[Manifest, DiskTier] | None:
        """What is being fetched of a revision, and where to; None while nothing is."""
        fetching = self._fetching.get(revision)
        return (fetching.manifest, fetching.room.tier) if fetching is not None else None

    async def _bring(self, revision: str, *, may_evict: bool) -> int:
        """Fetches what is missing and makes the revision resident; returns the bytes that were fetched."""
        manifest, source = await self._manifests.get_manifest(revision)
        check_fits_somewhere(manifest, [room.tier.options for room in self._rooms])
        if may_evict or revision in self._wanted:
            return await self._bring_somewhere(manifest, source, EvictionReason.ROOM)
        self._sparing.add(revision)
        try:
            return await self._bring_somewhere(manifest, source, None)
        finally:
            self._sparing.discard(revision)

    async def _bring_somewhere(self, manifest: Manifest, source: BlobSource, reason: EvictionReason | None) -> int:
        """Tries the disks, the fastest first; `reason` None: those with room to spare, and nothing is given up."""
        revision = manifest.revision
        disks = [room for room in self._rooms if room.tier.options.kind is not TierKind.MEMORY]
        refusals: list[HeliosError] = []
        for room in disks:
            try:
                if reason is None:
                    await room.check_spare(manifest)
                fetched_bytes = await self._bring_to(room, manifest, source, reason)
            except HeliosError as error:
                # Another tier may have what this one lacks: room, or a disk that works.
                if isinstance(error, DiskFull) or error.reason == "TIER_FAILED":
                    refusals.append(error)
                    continue
                log.warning("revision not materialised", revision=revision, reason=error.reason, error=error.message)
                raise
            log.info("revision materialised", revision=revision, tier=room.name, fetched_bytes=fetched_bytes)
            return fetched_bytes
        log.warning("no tier takes the revision", revision=revision, errors=[error.message for error in refusals])
        raise refusals[0]

    async def _bring_to(self, room: Room, manifest: Manifest, source: BlobSource, reason: EvictionReason | None) -> int:
        tier = room.tier
        # What is here already is no part of the rate.
        meter = RateMeter(self._clock().timestamp(), self._done_bytes(manifest, room))
        self._fetching[manifest.revision] = _Fetching(manifest, room, meter)
        try:
            async with room.want(manifest, source, reason=reason) as missing:
                fetch_all = partial(self._fetch_all, room, source, manifest)
                try:
                    await fetch_all(missing)
                except DiskFull:
                    # The disk said so, whatever it had told before: somebody else fills it as well.
                    missing_bytes = sum(blob.size_bytes for blob in missing)
                    if reason is None or not await room.evict_for(missing_bytes, reason):
                        raise
                    await fetch_all(tier.inventory.missing(manifest))
                if lost := tier.inventory.missing(manifest):
                    raise Corrupted(f"{len(lost)} blob(s) of the model were found corrupt meanwhile; try again")
                await tier.add_revision(manifest, self._clock())
        except HeliosError as error:
            if is_leftover_unwanted(error):
                await room.drop_leftovers(manifest)
            raise
        finally:
            del self._fetching[manifest.revision]
        return sum(blob.size_bytes for blob in missing)

    def _priority(self, revision: str) -> Priority:
        """How urgent a revision's blobs are now; called by threads."""
        return Priority.START if revision in self._wanted else Priority.PREFETCH

    async def _fetch_all(self, room: Room, source: BlobSource, manifest: Manifest, missing: list[Digest]) -> None:
        priority = partial(self._priority, manifest.revision)
        try:
            async with asyncio.TaskGroup() as group:
                # Threads take them in this order.
                for blob in in_reading_order(manifest, missing):
                    key = f"{room.name}/{blob.hash}"
                    work = self._blob_flights.join(key, partial(self._fetch_one, room, source, blob, priority))
                    group.create_task(work, name=f"want blob {blob.hash}")
        except BaseExceptionGroup as errors:
            # The group's siblings are cancelled and cleaned up by now; one error says why.
            expected, _ = errors.split(HeliosError)
            if expected is None:
                raise
            raise _first(expected) from errors

    async def _fetch_one(self, room: Room, source: BlobSource, blob: Digest, priority: Callable[[], Priority]) -> None:
        # Another flight may have brought it between the look and the turn.
        if room.tier.inventory.has_blob(blob):
            return
        with self._counts.counting(blob):
            on_bytes = partial(self._counts.add, blob)
            await room.tier.fetch(source, blob, on_bytes, label="registry", priority=priority)
        metrics.FETCHED_BYTES.inc(blob.size_bytes)


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
