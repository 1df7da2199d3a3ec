"""Which revisions to give up for room. Pure: the caller deletes.

Strays go first (nothing on the node needs them), then revisions by their last use, the longest unused first. What is
held (by a lease, or because it is being materialised) is never in a plan, and neither is a blob that a kept revision
uses. Size-aware policies replace the order, not the shape.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from helios.storage.inventory import Inventory, Resident
from helios.storage.manifest import Digest


@dataclass(frozen=True, slots=True)
class EvictionPlan:
    """What to delete: revisions first, then the blobs, which no remaining revision uses."""

    revisions: tuple[str, ...] = ()
    blobs: tuple[Digest, ...] = ()

    @property
    def freed_bytes(self) -> int:
        """What the plan frees; the caller compares it with what is needed."""
        return sum(blob.size_bytes for blob in self.blobs)


def plan_eviction(
    inventory: Inventory, needed_bytes: int, *, held: Collection[str], keep: Collection[Digest] = ()
) -> EvictionPlan:
    """Plans to free at least `needed_bytes`, or as much as can be freed when that is less.

    Args:
        inventory: What is there.
        needed_bytes: How much to free; 0 or less plans nothing.
        held: Revisions that must stay.
        keep: Blobs that must stay although no resident revision may use them: those that a fetch is about to use.
    """
    if needed_bytes <= 0:
        return EvictionPlan()
    candidates = sorted(
        (resident for resident in inventory.revisions() if resident.revision not in held),
        key=lambda resident: (resident.last_used_at, resident.revision),
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
    # Give back, the most recently used first, what is not needed: a small one chosen before a large one that suffices.
    floor = min(needed_bytes, freed_by_strays + release.freed_bytes)
    for resident in reversed(list(chosen)):
        release.take_back(resident)
        if freed_by_strays + release.freed_bytes >= floor:
            chosen.remove(resident)
        else:
            release.give_up(resident)
    return EvictionPlan(tuple(resident.revision for resident in chosen), (*strays, *release.freed()))


def plan_evict_one(inventory: Inventory, revision: str, *, keep: Collection[Digest] = ()) -> EvictionPlan:
    """Plans to drop one revision with the blobs that only it uses."""
    blobs = tuple(blob for blob in inventory.only_of(revision) if blob not in set(keep))
    return EvictionPlan(revisions=(revision,) if inventory.find(revision) else (), blobs=blobs)


class _Release:
    """Counts the users of each blob while revisions are given up and taken back: a blob without users is freed."""

    def __init__(self, inventory: Inventory, keep: Collection[Digest]) -> None:
        self._users = Counter(blob for resident in inventory.revisions() for blob in resident.manifest.blobs)
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
