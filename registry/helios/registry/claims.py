"""Who has a claim on a blob: ingests that hold it, or the collector that is deleting it; never both. Pure.

    free ──hold──▶ held (n times) ──release──▶ free
    free ──doom──▶ doomed ──settle──▶ free

An ingest holds a blob before it looks whether the store has it, and until its rows are committed. The collector dooms
what no row refers to and nobody holds, *then* looks at the rows once more, and deletes the rest. So a row that was
committed by an ingest which has let go is seen by that second look, and one that is committed later belongs to a blob
that is held and can't be doomed. No lock is needed around either side's network calls; an ingest that meets a doomed
blob waits until it is settled and finds it gone.

Claims are this process's: of several registries on one store each knows its own, which is what the collector's grace
period is for.
"""

from collections import Counter
from collections.abc import Collection, Iterable


class Claims:
    """The claims of one process. Not thread-safe: it belongs to the event loop."""

    def __init__(self) -> None:
        self._held: Counter[str] = Counter()
        self._doomed: set[str] = set()

    def hold(self, hash_: str) -> bool:
        """Takes hold of a blob once more; returns False, and takes none, while it is doomed."""
        if hash_ in self._doomed:
            return False
        self._held[hash_] += 1
        return True

    def release(self, hashes: Iterable[str]) -> None:
        """Lets go of what was held, each as often as it is named."""
        self._held.subtract(hashes)
        assert all(count >= 0 for count in self._held.values()), "a blob was let go more often than it was held"
        self._held += Counter()

    def doom(self, hashes: Iterable[str]) -> frozenset[str]:
        """Dooms those of the blobs that are free; returns them. Each has to be settled."""
        taken = frozenset(value for value in hashes if value not in self._held and value not in self._doomed)
        self._doomed |= taken
        return taken

    def settle(self, hashes: Iterable[str]) -> None:
        """Frees doomed blobs: they were deleted, or spared."""
        self._doomed.difference_update(hashes)

    def is_held(self, hash_: str) -> bool:
        """Returns whether an ingest holds the blob."""
        return hash_ in self._held

    @property
    def doomed(self) -> Collection[str]:
        """The blobs that are being deleted."""
        return frozenset(self._doomed)
