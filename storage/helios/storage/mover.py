"""Moving revisions between tiers in the background: down ahead of need, up when they are hot.

One move at a time. A move is a fetch from another tier, so it is verified, leaves nothing half done, and is cancelled
by whoever wants the bytes gone or the disk for a request. What moves down is copied before it is given up where a
slower tier has room to spare; what has none is given up, for the registry has it.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

import structlog

from helios.mesh.errors import Corrupted, HeliosError
from helios.storage.clock import Clock
from helios.storage.eviction import EvictionPlan, Forecast, no_forecast, plan_evict_one
from helios.storage.inventory import Resident
from helios.storage.manifest import Digest
from helios.storage.room import Room
from helios.storage.statistics import EvictionReason
from helios.storage.tiers import TierKind, excess_bytes, plan_promotion, spare_bytes

log = structlog.get_logger()

_PATIENCE = timedelta(minutes=10)
"""How long a revision that could not be moved is left alone: whatever was in the way, trying wears the disk."""

_LOOK_SECONDS = 5.0
"""How often marks and heat are looked at: a disk of 1 GB/s moves 0.25 % of 2 TB meanwhile."""


@dataclass(frozen=True, slots=True)
class Move:
    """A revision on its way to another tier."""

    revision: str
    source: str
    target: str


class Mover:
    """Looks after the tiers of a node, the fastest first; used on one event loop."""

    def __init__(
        self,
        rooms: Sequence[Room],
        *,
        hold: Callable[[str], AbstractContextManager[None]],
        busy: Callable[[], set[str]],
        suspect: Callable[[Room, Digest], Awaitable[object]],
        is_fetching: Callable[[], bool],
        clock: Clock,
        forecast: Forecast = no_forecast,
    ) -> None:
        """Takes what keeps a revision in all tiers for a block, which ones are lent or wanted, who looks at a blob
        that a move found bad, and whether somebody waits for bytes, who has the disks then.
        """
        self._is_fetching = is_fetching
        self._rooms = rooms
        self._suspect = suspect
        # Revisions that could not be moved, and until when they are left alone.
        self._refused: dict[str, datetime] = {}
        self._hold = hold
        self._busy = busy
        self._clock = clock
        self._forecast = forecast
        self._task: asyncio.Task[bool] | None = None
        self._found: Digest | None = None
        self.move: Move | None = None

    async def run(self) -> None:
        """Looks again and again, for ever."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        """Brings tiers below their marks, then promotes what is hot, until there is nothing to do.

        Raises:
            HeliosError: Unavailable (TIER_FAILED).
        """
        for room in self._rooms:
            await self._relieve(room)
        while not self._is_fetching() and await self._promote_one():
            pass

    async def cancel(self, revision: str | None = None) -> None:
        """Ends the move that goes on, if it is one of this revision (None: of any); nothing of it is left."""
        if self._task is not None and (revision is None or (self.move and self.move.revision == revision)):
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _relieve(self, room: Room) -> None:
        slower = self._slower_than(room)
        tier = room.tier
        if not tier.is_settled:
            return
        excess = excess_bytes(tier.options, tier.inventory.used_bytes, await tier.disk_room(), has_slower=bool(slower))
        if excess <= 0:
            return
        # What only borrows its bytes frees nothing.
        borrowed = await tier.borrowed_revisions()
        plan = room.plan(excess, spared=borrowed)
        await tier.drop(partial(self._plan_strays, room, plan), EvictionReason.WATER_MARK)
        for revision in plan.revisions:
            resident = tier.inventory.find(revision)
            if resident is None:
                continue
            is_lower = any(other.tier.inventory.find(revision) for other in slower)
            if not is_lower and not await self._demote(resident, room, slower):
                return
            await tier.drop(partial(self._plan_one, room, revision, plan), EvictionReason.WATER_MARK)

    @staticmethod
    def _plan_strays(room: Room, plan: EvictionPlan) -> EvictionPlan:
        unused = set(room.tier.inventory.strays()) - room.wanted()
        return EvictionPlan(blobs=tuple(blob for blob in plan.blobs if blob in unused), clock=room.tier.inventory.clock)

    @staticmethod
    def _plan_one(room: Room, revision: str, plan: EvictionPlan) -> EvictionPlan:
        if revision in room.kept():
            return EvictionPlan(clock=room.tier.inventory.clock)
        return replace(plan_evict_one(room.tier.inventory, revision, keep=room.wanted()), clock=plan.clock)

    async def _demote(self, resident: Resident, room: Room, slower: Sequence[Room]) -> bool:
        """Copies a revision down where there is room to spare; returns whether it may be given up now."""
        for target in slower:
            inventory = target.tier.inventory
            missing_bytes = sum(blob.size_bytes for blob in inventory.missing(resident.manifest))
            disk = await target.tier.disk_room()
            if missing_bytes <= spare_bytes(target.tier.options, inventory.used_bytes, disk):
                is_done = await self._copy(resident, room, target)
                target.tier.statistics.demoted_count += is_done
                return is_done
        return True

    async def _promote_one(self) -> bool:
        """Promotes the hottest revision that is worth it; returns whether there was one."""
        now = self._clock()
        self._refused = {revision: until for revision, until in self._refused.items() if until > now}
        for index, target in enumerate(self._rooms):
            if not target.tier.is_settled:
                continue
            disk = await target.tier.disk_room()
            spare = spare_bytes(target.tier.options, target.tier.inventory.used_bytes, disk)
            for source in self._rooms[index + 1 :]:
                if source.tier.options.kind is target.tier.options.kind:
                    continue
                plan = plan_promotion(
                    source.tier.inventory,
                    target.tier.inventory,
                    spare,
                    busy=self._busy() | self._refused.keys(),
                    kept=target.kept(),
                    now=self._clock(),
                    forecast=self._forecast,
                )
                resident = source.tier.inventory.find(plan.manifest.revision) if plan is not None else None
                if plan is None or resident is None:
                    continue
                await target.evict_for(plan.displaced_bytes, EvictionReason.DISPLACED)
                if not await self._copy(resident, source, target):
                    return False
                target.tier.statistics.promoted_count += 1
                return True
        return False

    async def _copy(self, resident: Resident, source: Room, target: Room) -> bool:
        """Copies a revision; returns whether it is there now. A move that is cancelled, or that fails, is none."""
        self.move = Move(resident.revision, source.name, target.name)
        try:
            async with asyncio.TaskGroup() as group:
                self._task = group.create_task(self._transfer(resident, source, target), name=f"move {self.move}")
            is_done = not self._task.cancelled() and self._task.result()
        finally:
            self.move = self._task = None
        if self._found is not None:
            bad, self._found = self._found, None
            await self._suspect(source, bad)
        if is_done:
            log.info("revision moved", revision=resident.revision, source=source.name, target=target.name)
        return is_done

    async def _transfer(self, resident: Resident, source: Room, target: Room) -> bool:
        reading: Digest | None = None
        try:
            with self._hold(resident.revision):
                blobs = source.tier.source()
                async with target.want(resident.manifest, blobs, reason=EvictionReason.DISPLACED) as missing:
                    for reading in missing:
                        await target.tier.fetch(blobs, reading, lambda _: None, label=source.name)
                    await target.tier.add_revision(resident.manifest, self._clock(), like=resident)
                    if target.tier.options.kind is TierKind.MEMORY:
                        # Reading it has left a second copy in memory.
                        await source.tier.drop_pages(resident.manifest)
        except HeliosError as error:
            log.warning("revision not moved", revision=resident.revision, target=target.name, reason=error.reason)
            self._refused[resident.revision] = self._clock() + _PATIENCE
            if isinstance(error, Corrupted):
                self._found = reading
            return False
        return True

    def _slower_than(self, room: Room) -> list[Room]:
        """Disk tiers of a slower kind, the fastest first."""
        position = self._rooms.index(room)
        kind = room.tier.options.kind
        return [
            other for other in self._rooms[position + 1 :] if other.tier.options.kind not in (kind, TierKind.MEMORY)
        ]
