"""The room of one tier: what is wanted there, and making place for it before a byte is fetched.

From the moment a revision is wanted here until it is resident, its bytes count as used and its blobs are kept.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager

from helios.mesh.errors import DiskFull
from helios.storage.disk_tier import DiskTier
from helios.storage.eviction import EvictionPlan, Forecast, no_forecast, plan_eviction
from helios.storage.fetch import BlobSource
from helios.storage.manifest import Digest, Manifest
from helios.storage.statistics import EvictionReason
from helios.storage.tiers import spare_bytes

Kept = Callable[[DiskTier], set[str]]
"""Which revisions a tier must not give up now: those that are lent from it, held, or pinned to it."""


class Room:
    """One tier's room; used on one event loop."""

    def __init__(self, tier: DiskTier, kept: Kept, *, forecast: Forecast = no_forecast) -> None:
        self.tier = tier
        self._kept = kept
        self._forecast = forecast
        self._wanted: Counter[Digest] = Counter()
        self._making = asyncio.Lock()

    @property
    def name(self) -> str:
        """The tier's."""
        return self.tier.name

    def kept(self) -> set[str]:
        """Revisions that must stay here."""
        return self._kept(self.tier)

    def wanted(self) -> set[Digest]:
        """Blobs that something is about to use here."""
        return set(+self._wanted)

    @asynccontextmanager
    async def want(
        self, manifest: Manifest, source: BlobSource, *, reason: EvictionReason | None = EvictionReason.ROOM
    ) -> AsyncIterator[list[Digest]]:
        """Makes room for what is missing of a revision and keeps it for the block, which is given what is missing.

        `reason` None: nothing is given up for it.

        Raises:
            DiskFull: What is kept and wanted is more than the capacity, or others fill the disk.
        """
        with ExitStack() as wanted:
            # One at a time: two that make room at once would each see the other's wish and both give up.
            async with self._making:
                wanted.enter_context(self.keep(manifest.blobs))
                missing = self.tier.inventory.missing(manifest)
                await self._make(source, missing, reason)
            yield missing

    @contextmanager
    def keep(self, blobs: Iterable[Digest]) -> Iterator[None]:
        """Has blobs stay for the block: something is about to use them."""
        listed = list(blobs)
        self._wanted.update(listed)
        try:
            yield
        finally:
            self._wanted.subtract(listed)
            self._wanted = +self._wanted

    async def evict_for(self, needed_bytes: int, reason: EvictionReason) -> int:
        """Gives up what is worth least; returns how many bytes that freed, which may be less than needed."""
        plan = await self.tier.drop(lambda: self.plan(needed_bytes), reason)
        return plan.freed_bytes

    def plan(self, needed_bytes: int, *, spared: Collection[str] = ()) -> EvictionPlan:
        """Plans to give up what is worth least, and none of the revisions that are spared."""
        held = self.kept().union(spared)
        return plan_eviction(self.tier.inventory, needed_bytes, held=held, keep=self.wanted(), forecast=self._forecast)

    async def spare_bytes(self) -> int:
        """What it can take without anything being given up, now or soon.

        Raises:
            Unavailable: TIER_FAILED.
        """
        disk = await self.tier.disk_room()
        return spare_bytes(self.tier.options, self.tier.inventory.used_bytes + self._coming_bytes(), disk)

    async def check_spare(self, manifest: Manifest) -> None:
        """Checks that what is missing of a revision goes into what is to spare.

        Raises:
            DiskFull: It does not.
            Unavailable: TIER_FAILED.
        """
        spare = await self.spare_bytes()
        needed = sum(blob.size_bytes for blob in self.tier.inventory.missing(manifest))
        if needed > spare:
            raise DiskFull(
                f"the tier {self.name} has {spare} bytes to spare, {needed} are needed",
                metadata={"tier": self.name, "spare_bytes": str(spare), "needed_bytes": str(needed)},
            )

    async def drop_leftovers(self, manifest: Manifest) -> None:
        """Drops what a failed fetch brought, unless somebody else wants it."""

        def plan() -> EvictionPlan:
            unwanted = manifest.blobs - self.wanted()
            strays = tuple(blob for blob in self.tier.inventory.strays() if blob in unwanted)
            return EvictionPlan(blobs=strays, clock=self.tier.inventory.clock)

        await self.tier.drop(plan, EvictionReason.LEFTOVER)

    async def _make(self, source: BlobSource, missing: list[Digest], reason: EvictionReason | None) -> None:
        if reason is not None and self._excess_bytes() > 0:
            await self.evict_for(self._excess_bytes(), reason)
        if (excess_bytes := self._excess_bytes()) > 0:
            raise DiskFull(
                f"the tier {self.name} is full of models that are in use; scale one down or raise its capacity",
                metadata={
                    "tier": self.name,
                    "capacity_bytes": str(self.tier.options.capacity_bytes),
                    "excess_bytes": str(excess_bytes),
                },
            )
        copied_bytes = await self.tier.copied_bytes(source, missing)
        if reason is not None and copied_bytes > (await self.tier.disk_room()).free_bytes:
            # The beginnings of others are worth less than what is whole.
            await self.tier.drop_unfinished(missing)
        if copied_bytes > (free_bytes := (await self.tier.disk_room()).free_bytes) and reason is not None:
            await self.evict_for(copied_bytes - free_bytes, reason)
            free_bytes = (await self.tier.disk_room()).free_bytes
        if copied_bytes > free_bytes:
            raise DiskFull(
                f"the disk of tier {self.name} has {free_bytes} bytes left, {copied_bytes} are needed, and no other "
                "unused model can go; free some of it",
                metadata={
                    "errno": "ENOSPC",
                    "tier": self.name,
                    "free_bytes": str(free_bytes),
                    "needed_bytes": str(copied_bytes),
                },
            )

    def _excess_bytes(self) -> int:
        """How far what is here and what is coming is above the capacity."""
        if self.tier.options.capacity_bytes == 0:
            return 0
        return self.tier.inventory.used_bytes + self._coming_bytes() - self.tier.options.capacity_bytes

    def _coming_bytes(self) -> int:
        return sum(blob.size_bytes for blob in self.wanted() if not self.tier.inventory.has_blob(blob))
