"""Which revisions to give up for room. Pure: the caller deletes.

GreedyDual-Size-Frequency: a revision is worth

    rank = clock + (uses + expected uses) * seconds to bring it back / bytes that it frees

where the clock is that of the tier when the revision was last used, and moves up to the rank of what was evicted last:
what is used often, is small or is slow to fetch stays longer, and what was used often but long ago is overtaken by the
clock. Blobs are shared, so the bytes of a revision are its share: a fine-tune of a base that is here frees little and
goes late. `expected uses` is where forecasts come in.

Strays go first: nothing on the node needs them. What is held (leased, pinned, or being materialised) is never in a
plan, and neither is a blob that a kept revision uses.

Source: L. Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy, HPL-98-69R1.
"""

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass

from helios.storage.inventory import Inventory, Resident
from helios.storage.manifest import Digest

_MIN_SHARE_BYTES = 1 << 20
"""1 MiB: what frees less is worth the same. Without it one eviction of some kilobytes would move the clock past all."""

Forecast = Callable[[str], float]
"""How many uses of a revision are expected soon; 0 where nothing is known."""


def no_forecast(_revision: str) -> float:
    """Expects nothing."""
    return 0.0


@dataclass(frozen=True, slots=True)
class Refetch:
    """What it costs to bring bytes back: the default is an object store that is not far away."""

    latency_seconds: float = 0.5
    bytes_per_second: float = 500e6

    def seconds(self, size_bytes: float) -> float:
        """How long a fetch of so many bytes takes."""
        return self.latency_seconds + size_bytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """What to delete: revisions first, then the blobs, which no remaining revision uses.

    Attributes:
        clock: Where the tier's clock stands once the plan is carried out.
    """

    revisions: tuple[str, ...] = ()
    blobs: tuple[Digest, ...] = ()
    clock: float = 0.0

    @property
    def freed_bytes(self) -> int:
        """What the plan frees; the caller compares it with what is needed."""
        return sum(blob.size_bytes for blob in self.blobs)


def rank_revisions(
    inventory: Inventory,
    *,
    held: Collection[str] = (),
    forecast: Forecast = no_forecast,
    refetch: Refetch | None = None,
) -> dict[str, float]:
    """Returns what each revision that is not held is worth; the least goes first."""
    cost = refetch or Refetch()
    users = _count_users(inventory)
    staying = {blob for r in inventory.revisions() if r.revision in held for blob in r.manifest.blobs}
    ranks: dict[str, float] = {}
    for resident in inventory.revisions():
        if resident.revision in held:
            continue
        freed = resident.manifest.blobs - staying
        share_bytes = max(_MIN_SHARE_BYTES, sum(blob.size_bytes / users[blob] for blob in freed))
        uses = resident.use_count + max(0.0, forecast(resident.revision))
        ranks[resident.revision] = resident.clock + uses * cost.seconds(share_bytes) / share_bytes
    return ranks


def plan_eviction(
    inventory: Inventory,
    needed_bytes: int,
    *,
    held: Collection[str],
    keep: Collection[Digest] = (),
    forecast: Forecast = no_forecast,
    refetch: Refetch | None = None,
) -> EvictionPlan:
    """Plans to free at least `needed_bytes`, or as much as can be freed when that is less.

    Args:
        inventory: What is there.
        needed_bytes: How much to free; 0 or less plans nothing.
        held: Revisions that must stay.
        keep: Blobs that must stay although no resident revision may use them: those that a fetch is about to use.
        forecast: Uses that are expected.
        refetch: What it costs to bring bytes back.
    """
    if needed_bytes <= 0:
        return EvictionPlan(clock=inventory.clock)
    ranks = rank_revisions(inventory, held=held, forecast=forecast, refetch=refetch)
    candidates = sorted(
        (resident for resident in inventory.revisions() if resident.revision in ranks),
        key=lambda resident: (ranks[resident.revision], resident.last_used_at, resident.revision),
    )
    strays = tuple(blob for blob in inventory.strays() if blob not in set(keep))
    freed_by_strays = sum(blob.size_bytes for blob in strays)
    release = _Release(inventory, keep)
    chosen: list[Resident] = []
    for resident in candidates:
        if freed_by_strays + release.freed_bytes >= needed_bytes:
            break
        release.give_up(resident)
        chosen.append(resident)
    # Give back, the most valuable first, what is not needed: a small one chosen before a large one that suffices.
    floor = min(needed_bytes, freed_by_strays + release.freed_bytes)
    for resident in reversed(list(chosen)):
        release.take_back(resident)
        if freed_by_strays + release.freed_bytes >= floor:
            chosen.remove(resident)
        else:
            release.give_up(resident)
    revisions = tuple(resident.revision for resident in chosen)
    clock = max([inventory.clock, *(ranks[revision] for revision in revisions)])
    return EvictionPlan(revisions, (*strays, *release.freed()), clock)


def plan_evict_one(inventory: Inventory, revision: str, *, keep: Collection[Digest] = ()) -> EvictionPlan:
    """Plans to drop one revision with the blobs that only it uses."""
    blobs = tuple(blob for blob in inventory.only_of(revision) if blob not in set(keep))
    revisions = (revision,) if inventory.find(revision) else ()
    return EvictionPlan(revisions=revisions, blobs=blobs, clock=inventory.clock)


def plan_drop_blob(inventory: Inventory, blob: Digest) -> EvictionPlan:
    """Plans to drop one blob, because it is bad, with the revisions that use it; their other blobs stay as strays."""
    revisions = tuple(r.revision for r in inventory.revisions() if blob in r.manifest.blobs)
    return EvictionPlan(revisions, (blob,) if inventory.has_blob(blob) else (), inventory.clock)


def _count_users(inventory: Inventory) -> Counter[Digest]:
    return Counter(blob for resident in inventory.revisions() for blob in resident.manifest.blobs)


class _Release:
    """Counts the users of each blob while revisions are given up and taken back: a blob without users is freed."""

    def __init__(self, inventory: Inventory, keep: Collection[Digest]) -> None:
        self._users = _count_users(inventory)
        self._keep = frozenset(keep)
        self._freed: set[Digest] = set()
        self.freed_bytes = 0

    def give_up(self, resident: Resident) -> None:
        for blob in resident.manifest.blobs:
            self._users[blob] -= 1
            if self._users[blob] == 0 and blob not in self._keep:
                self._freed.add(blob)
                self.freed_bytes += blob.size_bytes

    def take_back(self, resident: Resident) -> None:
        for blob in resident.manifest.blobs:
            self._users[blob] += 1
            if blob in self._freed:
                self._freed.remove(blob)
                self.freed_bytes -= blob.size_bytes

    def freed(self) -> list[Digest]:
        return sorted(self._freed)
