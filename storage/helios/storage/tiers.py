"""What a tier is, and where a revision goes. Pure.

Tiers are ordered from the fastest to the slowest. A fetch goes to the fastest disk that can take it: what it displaces
there was moved down before, at the high mark. Memory is filled by promotion alone, for a copy there is one more copy
and lives no longer than the machine.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from helios.mesh.errors import DiskFull
from helios.storage.eviction import Forecast, no_forecast, plan_eviction
from helios.storage.inventory import Inventory, Resident
from helios.storage.manifest import Manifest

HALF_LIFE = timedelta(hours=1)
"""Uses count half after an hour: long enough for a working day's rhythm, short enough to forget yesterday's model."""

MIN_HEAT = 1.5
"""Promoted is what was used twice within some half an hour; one use proves nothing, and copying costs a read."""

ADVANTAGE = 2.0
"""What displaces others must be this many times as hot as all of them, or two models would take turns copying."""


class TierKind(StrEnum):
    """What a tier is made of, the fastest first."""

    MEMORY = "memory"
    NVME = "nvme"
    SSD = "ssd"


@dataclass(frozen=True, slots=True)
class TierOptions:
    """A tier as it is configured.

    Attributes:
        capacity_bytes: Bytes of blobs that it may hold; 0: as much as its file system.
        high_ratio: Above this share in use, room is made ahead of need.
        low_ratio: Down to this share.
    """

    name: str = "disk"
    kind: TierKind = TierKind.SSD
    capacity_bytes: int = 0
    high_ratio: float = 0.95
    low_ratio: float = 0.85


@dataclass(frozen=True, slots=True)
class DiskRoom:
    """A file system, whoever fills it: its size, and what this user may still write."""

    total_bytes: int
    free_bytes: int


def in_speed_order(tiers: Sequence[TierOptions]) -> list[int]:
    """Returns the positions of tiers, the fastest first; tiers of one kind keep their order."""
    speeds = list(TierKind)
    return sorted(range(len(tiers)), key=lambda position: speeds.index(tiers[position].kind))


def check_fits_somewhere(manifest: Manifest, tiers: Sequence[TierOptions]) -> None:
    """Refuses a revision that no disk tier could ever hold, with the numbers.

    Raises:
        DiskFull: It is larger than each of them.
    """
    disks = [tier for tier in tiers if tier.kind is not TierKind.MEMORY]
    if any(tier.capacity_bytes == 0 or manifest.size_bytes <= tier.capacity_bytes for tier in disks):
        return
    capacities = ", ".join(f"{tier.name} {tier.capacity_bytes}" for tier in disks)
    raise DiskFull(
        f"the model has {manifest.size_bytes} bytes, more than any tier of this node may hold ({capacities}); "
        "raise a tier's capacity",
        metadata={"size_bytes": str(manifest.size_bytes)}
        | {f"capacity_bytes.{tier.name}": str(tier.capacity_bytes) for tier in disks},
    )


def excess_bytes(options: TierOptions, used_bytes: int, disk: DiskRoom, *, has_slower: bool) -> int:
    """How much to give up so that a tier is at its low mark; 0 while it is below the high one.

    The marks are shares of the file system, which others fill too. They are shares of the tier's own capacity only
    where a slower tier takes what is given up: moving takes a while and is best done ahead. Without one, room within
    the capacity is made when it is needed, by unlinking, which takes milliseconds.
    """
    excess = 0
    if disk.total_bytes - disk.free_bytes > options.high_ratio * disk.total_bytes:
        excess = disk.total_bytes - disk.free_bytes - int(options.low_ratio * disk.total_bytes)
    if has_slower and options.capacity_bytes and used_bytes > options.high_ratio * options.capacity_bytes:
        excess = max(excess, used_bytes - int(options.low_ratio * options.capacity_bytes))
    return min(excess, used_bytes)


def spare_bytes(options: TierOptions, used_bytes: int, disk: DiskRoom) -> int:
    """What a tier can take without anything being given up, now or soon: up to its low mark."""
    spare = int(options.low_ratio * disk.total_bytes) - (disk.total_bytes - disk.free_bytes)
    if options.capacity_bytes:
        spare = min(spare, int(options.low_ratio * options.capacity_bytes) - used_bytes)
    return max(0, spare)


@dataclass(frozen=True, slots=True)
class Promotion:
    """A revision to copy to a faster tier, and how much has to be given up there for it."""

    manifest: Manifest
    displaced_bytes: int


def plan_promotion(
    slower: Inventory,
    faster: Inventory,
    spare: int,
    *,
    busy: Collection[str],
    kept: Collection[str],
    now: datetime,
    forecast: Forecast = no_forecast,
) -> Promotion | None:
    """Chooses what to copy up next, the hottest first; None when nothing is worth it.

    Args:
        slower: Where it is.
        faster: Where it may go.
        spare: Bytes that the faster tier can take without giving anything up.
        busy: Revisions that are lent: a second copy in memory beside the pages that their holders map is waste.
        kept: Revisions that the faster tier must keep.
        now: The time.
        forecast: Uses that are expected.
    """
    heats = {resident.revision: heat(resident, now, forecast) for resident in slower.revisions()}
    candidates = [r for r in slower.revisions() if r.revision not in busy and heats[r.revision] >= MIN_HEAT]
    for resident in sorted(candidates, key=lambda r: (-heats[r.revision], r.revision)):
        if faster.find(resident.revision) is not None:
            continue
        missing_bytes = sum(blob.size_bytes for blob in faster.missing(resident.manifest))
        if missing_bytes <= spare:
            return Promotion(resident.manifest, 0)
        needed_bytes = missing_bytes - spare
        plan = plan_eviction(faster, needed_bytes, held=kept, keep=resident.manifest.blobs, forecast=forecast)
        displaced = [r for revision in plan.revisions if (r := faster.find(revision)) is not None]
        displaced_heat = sum(heat(r, now, forecast) for r in displaced)
        if plan.freed_bytes >= needed_bytes and heats[resident.revision] >= ADVANTAGE * displaced_heat:
            return Promotion(resident.manifest, needed_bytes)
    return None


def heat(resident: Resident, now: datetime, forecast: Forecast = no_forecast) -> float:
    """How much a revision is used: its uses, halved with each half-life since the last, and those expected."""
    age = max(timedelta(0), now - resident.last_used_at)
    return float(resident.use_count * 0.5 ** (age / HALF_LIFE)) + max(0.0, forecast(resident.revision))
