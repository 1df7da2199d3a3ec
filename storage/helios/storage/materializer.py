"""Materialising revisions: who wants what, what is held, where it is lent from, and the leases.

From the moment a revision is wanted until its lease is granted it is *held*: as good as leased, so that nothing can be
evicted between the end of a fetch and the grant. While a revision is lent from a tier, all who want it get it from
there: one copy in the host's memory for any number of replicas. This module decides with the inventories and the lease
table, all in memory; tiers carry out.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import structlog

from helios.mesh.errors import Corrupted, DiskFull, HeliosError, PreconditionFailed, Unavailable
from helios.mesh.transfer.progress import TransferProgress
from helios.storage import metrics
from helios.storage.clock import Clock, steady_clock
from helios.storage.disk_tier import DiskTier
from helios.storage.eviction import EvictionPlan, Forecast, no_forecast, plan_evict_one
from helios.storage.fetch import BlobSource
from helios.storage.fetches import Fetches, ManifestSource
from helios.storage.leases import Lease, LeaseTable, check_ttl, restore
from helios.storage.manifest import Digest, Manifest, revision_hash
from helios.storage.mover import Mover
from helios.storage.prefetch.state import Account
from helios.storage.room import Room
from helios.storage.scrubber import Scrubber
from helios.storage.statistics import EvictionReason
from helios.storage.threads import Flights
from helios.storage.tiers import TierKind, in_speed_order

log = structlog.get_logger()

_EXPIRY_SECONDS = 1.0
"""How late an ended lease may be collected; until then it counts for nothing anyway."""


@dataclass(frozen=True, slots=True)
class Loan:
    """A revision that is lent: the lease, where its files are, what had to be fetched for it, and whether holders take
    its files as descriptors.
    """

    lease: Lease
    path: Path
    fetched_bytes: int
    is_sealed: bool = False


@dataclass(frozen=True, slots=True)
class RevisionResidency:
    """A revision on the node; `tiers` that have it whole, the fastest first, `moving_to` empty while it is at rest."""

    revision: str
    size_bytes: int
    lease_count: int
    tiers: tuple[str, ...] = ()
    is_pinned: bool = False
    moving_to: str = ""


def no_way(_revision: str) -> None:
    """Nothing can wait."""


@dataclass(frozen=True, slots=True)
class Upkeep:
    """What the agent does by itself.

    Attributes:
        forecast: Uses that are expected.
        make_way: Told of each revision that somebody waits for: what else fetches and can wait is to end.
        scrub_bytes_per_second: How fast the background scrub reads; 0: as fast as it goes.
        scrub_period: Each blob is read once in this time; 0: never.
    """

    forecast: Forecast = no_forecast
    make_way: Callable[[str], None] = no_way
    scrub_bytes_per_second: float = 16 << 20
    scrub_period: timedelta = timedelta(days=7)


class Materializer:
    """Lends revisions of a node's tiers. Made by `open_materializer`; used on one event loop."""

    def __init__(
        self,
        tiers: Sequence[DiskTier],
        manifests: ManifestSource,
        revisions: Flights[int],
        blobs: Flights[None],
        *,
        clock: Clock,
        upkeep: Upkeep,
    ) -> None:
        self._tell_fetch = upkeep.make_way
        order = in_speed_order([tier.options for tier in tiers])
        self.rooms = [Room(tiers[i], self._kept_in, forecast=upkeep.forecast) for i in order]
        # Leases are kept where their revision is; pins, which may be of what is nowhere yet, in the first tier.
        self._home = tiers[0]
        self._manifests = manifests
        self._clock = clock
        persisted = [lease for tier in tiers for lease in tier.persisted_leases]
        self._leases = LeaseTable(restore(persisted, clock()))
        self._pins = set(self._home.persisted_pins)
        self._held: Counter[str] = Counter()
        self.miss_count = 0
        self.scrubber = Scrubber(
            self.rooms,
            clock=clock,
            find_sources=self._find_sources,
            end_leases=self._end_leases,
            bytes_per_second=upkeep.scrub_bytes_per_second,
            period=upkeep.scrub_period,
        )
        self.mover = Mover(
            self.rooms,
            hold=self._hold,
            busy=self._busy_revisions,
            suspect=self.scrubber.scrub_one,
            is_fetching=lambda: self._fetches.is_fetching,
            clock=clock,
            forecast=upkeep.forecast,
        )
        # Somebody waits for a fetch: what is only useful later gives the disk away.
        self._fetches = Fetches(
            self.rooms, manifests, revisions=revisions, blobs=blobs, clock=clock, make_way=self._make_way
        )
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
            await self._persist_renewal(lease)
            tier = self._room(lease.tier).tier
            # Files in memory whose holder does not hand them back are lost with their leases.
            await tier.wait_returned(revision)
            self._leases.find(lease_id, self._clock())
            return _loan(lease, tier, 0)
        with self._hold(revision):
            fetched_bytes = 0
            room = await self._find_good(revision)
            if room is None:
                self.miss_count += 1
                fetched_bytes = await self._fetches.bring(revision)
                room = self._find(revision)
                if room is None:
                    raise Corrupted("a blob of the model was found corrupt as soon as it was here; try again")
            else:
                self._count_hit(room, revision)
            lease = await self._grant(room.tier, revision, holder, ttl)
        return _loan(lease, room.tier, fetched_bytes)

    @property
    def is_fetching(self) -> bool:
        """Whether somebody waits for bytes, or some are fetched ahead."""
        return self._fetches.is_fetching

    async def fetch_ahead(self, revision: str, *, may_evict: bool = False) -> int:
        """Brings a revision to a disk of the node without a lease, so that it may go at any time; returns what came.

        Moves go on beside it. Without `may_evict` it goes where there is room to spare, and nothing goes for it.

        Raises:
            InvalidRequest: INVALID_REVISION, INVALID_MANIFEST.
            NotFound: REVISION_NOT_FOUND.
            DigestMismatch, DiskFull, Unavailable: The fetch failed.
        """
        revision_hash(revision)
        if self._find(revision) is not None:
            return 0
        with self._hold(revision):
            return await self._fetches.bring_ahead(revision, may_evict=may_evict)

    def use_counts(self) -> dict[str, int]:
        """How often each revision on the node was lent since it came."""
        counts: dict[str, int] = {}
        for room in self.rooms:
            for resident in room.tier.inventory.revisions():
                counts[resident.revision] = max(resident.use_count, counts.get(resident.revision, 0))
        return counts

    @property
    def account(self) -> Account:
        """What fetching ahead had cost and brought when the agent started."""
        return self._home.persisted_account

    async def keep_account(self, account: Account) -> None:
        """Persists what fetching ahead has cost and brought.

        Raises:
            DiskFull, Unavailable: The disk did not take it.
        """
        await self._home.put_account(account)

    async def spare_bytes(self) -> int:
        """The most that one disk of the node can take without anything being given up, now or soon."""
        disks = [room for room in self.rooms if room.tier.options.kind is not TierKind.MEMORY]
        return max([await room.spare_bytes() for room in disks], default=0)

    def progress(self, revision: str) -> TransferProgress | None:
        """How far the fetch of a revision is; None while there is none, or its manifest is not known yet."""
        return self._fetches.progress(revision)

    def fetching(self, revision: str) -> tuple[Manifest, DiskTier] | None:
        """What is being fetched of a revision, and where to; None while nothing is."""
        return self._fetches.fetching(revision)

    async def renew(self, lease_id: str) -> Lease:
        """Renews a lease.

        Raises:
            NotFound: LEASE_NOT_FOUND.
        """
        lease = self._leases.renew(lease_id, self._clock())
        await self._persist_renewal(lease)
        return lease

    async def release(self, lease_id: str) -> None:
        """Ends a lease. Idempotent."""
        lease = self._leases.release(lease_id, self._clock())
        if lease is not None:
            await self._forget([lease])

    def find_lease(self, lease_id: str) -> Lease:
        """A lease that lives.

        Raises:
            NotFound: LEASE_NOT_FOUND.
        """
        return self._leases.find(lease_id, self._clock())

    async def settle(self, grace_seconds: float) -> None:
        """Waits for what holders hand back after a restart, and ends the leases of what they don't."""
        async with asyncio.TaskGroup() as group:
            for room in self.rooms:
                group.create_task(self._settle(room, grace_seconds), name=f"settle {room.name}")

    async def evict(self, revision: str) -> int:
        """Drops a revision from all tiers, with the blobs that only it uses; returns the bytes that were freed.

        A move of it ends. Idempotent.

        Raises:
            PreconditionFailed: REVISION_LEASED, REVISION_PINNED.
        """
        revision_hash(revision)
        await self.mover.cancel(revision)

        def plan(room: Room) -> EvictionPlan:
            self._check_evictable(revision)
            return plan_evict_one(room.tier.inventory, revision, keep=room.wanted())

        freed_bytes = 0
        for room in self.rooms:
            freed_bytes += (await room.tier.drop(partial(plan, room), EvictionReason.ASKED)).freed_bytes
        self._show()
        return freed_bytes

    async def pin(self, revision: str) -> None:
        """Has a revision stay once it is here, whoever uses it; fetches nothing. Idempotent.

        Raises:
            InvalidRequest: INVALID_REVISION.
        """
        revision_hash(revision)
        self._pins.add(revision)
        await self._home.put_pin(revision)

    async def unpin(self, revision: str) -> None:
        """Takes a pin back. Idempotent.

        Raises:
            InvalidRequest: INVALID_REVISION.
        """
        revision_hash(revision)
        await self._home.delete_pin(revision)
        self._pins.discard(revision)

    def residency(self) -> list[RevisionResidency]:
        """The revisions on the node, by digest."""
        counts = self._leases.count_by_revision(self._clock())
        sizes = {r.revision: r.manifest.size_bytes for room in self.rooms for r in room.tier.inventory.revisions()}
        move = self.mover.move
        return [
            RevisionResidency(
                revision,
                size_bytes,
                counts.get(revision, 0),
                tuple(room.name for room in self._rooms_with(revision)),
                is_pinned=revision in self._pins,
                moving_to=move.target if move is not None and move.revision == revision else "",
            )
            for revision, size_bytes in sorted(sizes.items())
        ]

    async def expire_leases(self) -> None:
        """Collects ended leases, for ever."""
        while True:
            ended = self._leases.expire(self._clock())
            if ended:
                log.info("leases expired", count=len(ended), holders=sorted({lease.holder for lease in ended}))
                await self._forget(ended)
            self._show()
            await asyncio.sleep(_EXPIRY_SECONDS)

    async def _make_way(self, revision: str) -> None:
        self._tell_fetch(revision)
        await self.mover.cancel()

    def _room(self, name: str) -> Room:
        return next(room for room in self.rooms if room.name == name)

    def _rooms_with(self, revision: str) -> list[Room]:
        return [room for room in self.rooms if room.tier.inventory.find(revision) is not None]

    def _find(self, revision: str) -> Room | None:
        """Where to lend a revision from: where it is lent already, else the fastest tier that has it."""
        rooms = self._rooms_with(revision)
        lent_from = self._leases.tiers_of(revision, self._clock())
        return next((room for room in rooms if room.name in lent_from), rooms[0] if rooms else None)

    async def _find_good(self, revision: str) -> Room | None:
        """As `_find`, once no blob of it is being replaced, and holders have handed it back after a restart."""
        for each in self.rooms:
            await each.tier.wait_returned(revision)
        while (room := self._find(revision)) is not None:
            resident = room.tier.inventory.find(revision)
            assert resident is not None, "it was found there"
            if not self.scrubber.is_mending(resident.manifest.blobs):
                break
            await self.scrubber.wait_mended(resident.manifest.blobs)
        return room

    def _count_hit(self, room: Room, revision: str) -> None:
        resident = room.tier.inventory.find(revision)
        assert resident is not None, "it was found there"
        room.tier.statistics.hit_count += 1
        room.tier.statistics.hit_bytes += resident.manifest.size_bytes

    async def _grant(self, tier: DiskTier, revision: str, holder: str, ttl: timedelta | None) -> Lease:
        now = self._clock()
        lease = self._leases.grant(revision, holder=holder, ttl=ttl, now=now, tier=tier.name)
        try:
            await tier.put_lease(lease, tier.inventory.touch(revision, now, is_new_use=True))
        except BaseException:
            # Whoever asked never learns of the lease.
            await self.release(lease.id)
            raise
        self._show()
        return lease

    async def _persist_renewal(self, lease: Lease) -> None:
        """Writes a lease's new end; a disk that is full or read-only costs it a restart of the agent, not its life."""
        try:
            await self._room(lease.tier).tier.put_lease(lease)
        except (DiskFull, Unavailable) as error:
            log.warning("renewal not persisted", tier=lease.tier, reason=error.reason, error=error.message)

    async def _forget(self, ended: list[Lease]) -> None:
        now = self._clock()
        for room in self.rooms:
            here = [lease for lease in ended if lease.tier == room.name]
            touched = [room.tier.inventory.touch(lease.revision, min(now, lease.ends_at)) for lease in here]
            if here:
                await room.tier.delete_leases(here, [resident for resident in touched if resident is not None])
        self._show()

    async def _end_leases(self, room: Room, revisions: set[str]) -> None:
        lost = [lease for revision in revisions for lease in self._leases.forget_revision(revision, room.name)]
        if lost:
            log.error("leases of a revision that is lost ended", holders=sorted({lease.holder for lease in lost}))
            await room.tier.delete_leases(lost)

    async def _find_sources(self, blob: Digest) -> list[BlobSource]:
        """Where a good copy of a blob of the node may be had: the registry, as far as it answers."""
        for room in self.rooms:
            for resident in room.tier.inventory.revisions():
                if blob in resident.manifest.blobs:
                    try:
                        _, source = await self._manifests.get_manifest(resident.revision)
                        return [source]
                    except HeliosError as error:
                        log.warning("no source for a blob", hash=blob.hash, reason=error.reason)
        return []

    async def _settle(self, room: Room, grace_seconds: float) -> None:
        if lost := await room.tier.settle(grace_seconds):
            try:
                await self._end_leases(room, lost)
            except (DiskFull, Unavailable) as error:
                # They have ended all the same; a restart finds their rows, and waits for their revisions again.
                log.warning("ended leases not deleted", tier=room.name, reason=error.reason, error=error.message)

    def _check_evictable(self, revision: str) -> None:
        if revision in self._busy_revisions():
            reason, message = "REVISION_LEASED", "the revision is in use; stop its replicas first"
        elif revision in self._pins:
            reason, message = "REVISION_PINNED", "the revision is pinned; unpin it first"
        else:
            return
        raise PreconditionFailed(message, reason=reason, metadata={"revision": revision})

    def _busy_revisions(self) -> set[str]:
        return {*self._leases.count_by_revision(self._clock()), *(+self._held)}

    def _kept_in(self, tier: DiskTier) -> set[str]:
        """What a tier must not give up: what is lent from it, what is held, and pins that no slower disk has."""
        pinned = {pin for pin in self._pins if (rooms := self._rooms_with(pin)) and rooms[-1].tier is tier}
        return {*self._leases.revisions_in(tier.name, self._clock()), *(+self._held), *pinned}

    @contextmanager
    def _hold(self, revision: str) -> Iterator[None]:
        self._held[revision] += 1
        try:
            yield
        finally:
            self._held[revision] -= 1
            self._held = +self._held

    def _show(self) -> None:
        metrics.LEASE_COUNT.set(len(self._leases.alive(self._clock())))
        metrics.TIERS.show(
            [
                metrics.TierReading(
                    room.name,
                    room.tier.inventory.used_bytes,
                    room.tier.options.capacity_bytes,
                    room.tier.statistics,
                )
                for room in self.rooms
            ],
            miss_count=self.miss_count,
        )


def _loan(lease: Lease, tier: DiskTier, fetched_bytes: int) -> Loan:
    is_sealed = tier.store.is_sealed
    return Loan(lease, tier.view_path(lease.revision), fetched_bytes, is_sealed=is_sealed)


@asynccontextmanager
async def open_materializer(
    tiers: Iterable[DiskTier], manifests: ManifestSource, *, clock: Clock | None = None, upkeep: Upkeep | None = None
) -> AsyncIterator[Materializer]:
    """Opens the tiers and lends from them; leaving cancels fetches and closes the tiers.

    Args:
        tiers: Of this node, with distinct names; the first one keeps the pins.
        manifests: Where manifests come from.
        clock: The time.
        upkeep: What the agent does by itself.

    Raises:
        PreconditionFailed: ROOT_IN_USE.
        HeliosError: DiskFull, Unavailable (TIER_FAILED), when the first tier can't be opened; others are left out.
    """
    async with AsyncExitStack() as stack:
        opened: list[DiskTier] = []
        for tier in tiers:
            try:
                opened.append(await stack.enter_async_context(tier))
            except (DiskFull, Unavailable) as error:
                # A disk that died takes its tier along, not the node. The first one has what the node is told to keep.
                if not opened:
                    raise
                log.warning("tier left out", tier=tier.name, reason=error.reason, error=error.message)
        blobs = await stack.enter_async_context(Flights[None]("fetch blob"))
        revisions = await stack.enter_async_context(Flights[int]("materialise"))
        yield Materializer(
            opened, manifests, revisions, blobs, clock=clock or steady_clock(), upkeep=upkeep or Upkeep()
        )
