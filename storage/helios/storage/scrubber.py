"""Looking for bad blobs, and what is done about one.

A blob that nobody holds is dropped, with the revisions that use it; the next want fetches it, and only it. One that is
lent is fetched anew at once and takes the bad one's place in all views, in one step: whoever opens a path has good
bytes, and new wants wait for that. A holder that mapped the bad file keeps its pages, which were read when they were
good or are bad by now: nobody can tell, so the log names the holders. Where no source has the bytes the leases end,
which tells the holders.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from helios.mesh.errors import BlobNotFound, HeliosError, PreconditionFailed, Unavailable
from helios.storage.clock import Clock
from helios.storage.eviction import plan_drop_blob
from helios.storage.fetch import BlobSource, FetchToken
from helios.storage.manifest import Digest
from helios.storage.room import Room
from helios.storage.statistics import EvictionReason

log = structlog.get_logger()

_MEASURED_BYTES = 16 << 20
"""A smaller read says more of the first access than of the bandwidth."""

_LOOK_SECONDS = 60.0
"""How often it is looked whether a blob is due."""


@dataclass(frozen=True, slots=True)
class Found:
    """A bad blob.

    Attributes:
        is_lent: Somebody holds a revision that uses it.
        is_healed: A good copy has taken its place.
    """

    tier: str
    blob: Digest
    is_lent: bool
    is_healed: bool


@dataclass(frozen=True, slots=True)
class ScrubProgress:
    """How far a scrub is."""

    done_bytes: int
    total_bytes: int
    found: tuple[Found, ...]


class Scrubber:
    """Compares blobs with their names, all tiers in turn; used on one event loop."""

    def __init__(
        self,
        rooms: Sequence[Room],
        *,
        clock: Clock,
        find_sources: Callable[[Digest], Awaitable[list[BlobSource]]],
        end_leases: Callable[[Room, set[str]], Awaitable[None]],
        bytes_per_second: float,
        period: timedelta,
    ) -> None:
        """Takes where good bytes may be had, and what ends the leases of revisions in a tier."""
        self._rooms = rooms
        self._clock = clock
        self._find_sources = find_sources
        self._end_leases = end_leases
        self._bytes_per_second = bytes_per_second
        self._period = period
        self._healing: dict[Digest, asyncio.Event] = {}
        self._is_scrubbing = False

    async def run(self) -> None:
        """Scrubs what is due, one blob after the other, for ever.

        Raises:
            HeliosError: Unavailable (TIER_FAILED).
        """
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self.measure()
            while self._period > timedelta(0) and (due := self.find_due()) is not None:
                await self.scrub_one(*due, bytes_per_second=self._bytes_per_second)

    async def measure(self) -> None:
        """Reads one blob of each tier whose bandwidth is not known, the smallest that is large enough, once.

        Raises:
            HeliosError: Unavailable (TIER_FAILED).
        """
        for room in self._rooms:
            large = [blob for blob in room.tier.inventory.blobs() if blob.size_bytes >= _MEASURED_BYTES]
            if large and room.tier.statistics.read.bytes_per_second == 0:
                await self.scrub_one(room, min(large, key=lambda blob: (blob.size_bytes, blob.hash)))

    async def scrub_all(self, *, bytes_per_second: float) -> AsyncGenerator[ScrubProgress, None]:
        """Scrubs every blob now, no faster than the limit (0: none); yields after each blob.

        Raises:
            HeliosError: PreconditionFailed (SCRUB_RUNS), Unavailable (TIER_FAILED).
        """
        if self._is_scrubbing:
            raise PreconditionFailed("a scrub runs already; wait for its end", reason="SCRUB_RUNS")
        self._is_scrubbing = True
        try:
            blobs = [(room, blob) for room in self._rooms for blob in room.tier.inventory.blobs()]
            progress = ScrubProgress(0, sum(blob.size_bytes for _, blob in blobs), ())
            yield progress
            for room, blob in blobs:
                found = await self.scrub_one(room, blob, bytes_per_second=bytes_per_second)
                bad = (*progress.found, found) if found is not None else progress.found
                progress = ScrubProgress(progress.done_bytes + blob.size_bytes, progress.total_bytes, bad)
                yield progress
        finally:
            self._is_scrubbing = False

    async def scrub_one(self, room: Room, blob: Digest, *, bytes_per_second: float = 0.0) -> Found | None:
        """Compares one blob with its name; mends or drops it where it is bad, and says so.

        Raises:
            HeliosError: Unavailable (TIER_FAILED).
        """
        try:
            result = await room.tier.read(blob, FetchToken(), bytes_per_second=bytes_per_second)
            is_good = result.hash == blob.hash
        except Unavailable as error:
            # A file that is gone, and a sector that can't be read, are bad blobs; other errors are the disk's.
            if error.metadata.get("errno") not in ("EIO", "ENOENT", "ELOOP"):
                raise
            is_good = False
        except BlobNotFound:
            # As a file that is gone, of a tier in memory.
            is_good = False
        if self.is_mending(frozenset((blob,))):
            # Another scrub found it before: two that fetch it at once would write to one file.
            await self.wait_mended(frozenset((blob,)))
            return None
        if not room.tier.inventory.has_blob(blob):
            return None
        if is_good:
            await room.tier.note_scrubbed(blob, self._clock())
            return None
        return await self._mend(room, blob)

    def is_mending(self, blobs: frozenset[Digest]) -> bool:
        """Whether one of these blobs is being replaced."""
        return not self._healing.keys().isdisjoint(blobs)

    async def wait_mended(self, blobs: frozenset[Digest]) -> None:
        """Waits while one of these blobs is being replaced: its file may not be lent meanwhile."""
        while suspects := blobs & self._healing.keys():
            await self._healing[next(iter(suspects))].wait()

    def find_due(self) -> tuple[Room, Digest] | None:
        """The blob that was verified longest ago, if that is longer ago than the period."""
        due_before = (self._clock() - self._period).timestamp()
        oldest = [
            (room.tier.scrub_times.get(blob.hash, 0.0), room, blob)
            for room in self._rooms
            for blob in room.tier.inventory.blobs()
        ]
        at, room, blob = min(oldest, key=lambda entry: (entry[0], entry[2]), default=(due_before, None, None))
        return (room, blob) if room is not None and blob is not None and at < due_before else None

    async def _mend(self, room: Room, blob: Digest) -> Found:
        tier = room.tier
        tier.statistics.corrupt_count += 1
        self._healing[blob] = asyncio.Event()
        try:
            users = {r.revision for r in tier.inventory.revisions() if blob in r.manifest.blobs}
            is_lent = not users.isdisjoint(room.kept()) or blob in room.wanted()
            with room.keep([blob]):
                # Its last lease may end meanwhile; an eviction would take the file that is about to come.
                is_healed = is_lent and await self._replace(room, blob)
            if not is_healed:
                await self._end_leases(room, users)
                with contextlib.suppress(Unavailable):
                    # What can't be removed is not lent either: it is out of the inventory.
                    await tier.drop(lambda: plan_drop_blob(tier.inventory, blob), EvictionReason.CORRUPT)
        finally:
            self._healing.pop(blob).set()
        log.error(
            "blob was corrupt", tier=tier.name, hash=blob.hash, revisions=sorted(users), lent=is_lent, healed=is_healed
        )
        return Found(tier.name, blob, is_lent, is_healed)

    async def _replace(self, room: Room, blob: Digest) -> bool:
        for source in await self._find_sources(blob):
            with contextlib.suppress(HeliosError):
                await room.tier.fetch(source, blob, lambda _: None, label="repair")
                await room.tier.relink(blob)
                return True
        return False
