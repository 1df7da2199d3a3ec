"""What a tier did: counted where it happens, read by RPCs and metrics. Pure.

Counts are since the start of the agent; bandwidths are carried over restarts in the tier's index, for they are what
starts are estimated with.
"""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

_SMOOTHING = 0.2
"""Weight of the newest measurement: five of them outweigh the past, one busy moment does not."""

_MIN_SAMPLE_BYTES = 1 << 20
"""Smaller transfers measure system calls and the cost of fsync, not bandwidth."""


class EvictionReason(StrEnum):
    """Why a revision left a tier."""

    ROOM = "room"
    """A fetch needed its bytes."""
    WATER_MARK = "water_mark"
    """The tier, or the disk that others fill too, was above its high mark."""
    DISPLACED = "displaced"
    """A hotter revision took its place in a faster tier."""
    ASKED = "asked"
    """Somebody called Evict."""
    CORRUPT = "corrupt"
    """A blob was not what its name says."""
    LEFTOVER = "leftover"
    """Blobs of a fetch that failed."""


@dataclass(slots=True)
class Bandwidth:
    """A moving average; 0 while nothing was measured."""

    bytes_per_second: float = 0.0

    def add(self, size_bytes: int, seconds: float) -> None:
        """Takes one transfer; one that is too small to tell anything is left out."""
        if size_bytes < _MIN_SAMPLE_BYTES or seconds <= 0:
            return
        sample = size_bytes / seconds
        known = self.bytes_per_second
        self.bytes_per_second = sample if known == 0 else known + _SMOOTHING * (sample - known)


@dataclass(slots=True)
class TierStatistics:
    """Counts of one tier.

    Attributes:
        hit_count: Revisions that were lent from here without a fetch.
        hit_bytes: Their bytes.
        written_bytes: Bytes of blobs that were committed here, by where they came from.
        queue_seconds: How long fetches waited for a thread, summed.
        queued_count: How many fetches that sums.
        promoted_count: Revisions that were copied here from a slower tier.
        demoted_count: Revisions that were copied here from a faster tier.
        evicted_count: Revisions that left, by reason.
        evicted_bytes: Bytes that were freed, by reason.
        scrubbed_bytes: Bytes that were read and compared.
        corrupt_count: Blobs that were not what their name says.
        shared_bytes: Bytes of blobs that take no room of their own, because they share blocks with others.
    """

    hit_count: int = 0
    hit_bytes: int = 0
    written_bytes: Counter[str] = field(default_factory=Counter)
    queue_seconds: float = 0.0
    queued_count: int = 0
    promoted_count: int = 0
    demoted_count: int = 0
    evicted_count: Counter[str] = field(default_factory=Counter)
    evicted_bytes: Counter[str] = field(default_factory=Counter)
    scrubbed_bytes: int = 0
    corrupt_count: int = 0
    shared_bytes: int = 0
    read: Bandwidth = field(default_factory=Bandwidth)
    write: Bandwidth = field(default_factory=Bandwidth)

    def evicted(self, reason: EvictionReason, revision_count: int, freed_bytes: int) -> None:
        """Counts what left."""
        self.evicted_count[reason] += revision_count
        self.evicted_bytes[reason] += freed_bytes

    def shared(self, count: int) -> None:
        """Counts bytes that share blocks with other blobs."""
        self.shared_bytes += count

    def waited(self, seconds: float) -> None:
        """Counts a fetch that got its thread."""
        self.queue_seconds += seconds
        self.queued_count += 1
