"""How fast a transfer is, when it will be done, and whether it stands still. Pure: time is passed in."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

_WINDOW_SECONDS = 5.0
"""Long enough that the ends of single chunks don't show, short enough that a change of speed does."""

_SAMPLE_SECONDS = 0.1
_TELL_SECONDS = 0.25

_NEVER_SECONDS = 1e9
"""Thirty years: what takes longer has no end, and would not fit into a Duration."""


@dataclass(frozen=True, slots=True)
class TransferProgress:
    """How far a transfer is: one's own, or one that another component tells of."""

    done_bytes: int
    """Bytes that are here, those of an earlier try included. May shrink when a chunk has to be fetched again."""
    total_bytes: int
    bytes_per_second: float = 0.0
    """Over the last seconds; 0 before anything can be said."""
    remaining_seconds: float | None = None
    """At that rate; None where there is none."""


class RateMeter:
    """Bytes per second over a sliding window."""

    def __init__(self, now: float, done_bytes: int = 0) -> None:
        self._samples: deque[tuple[float, int]] = deque([(now, done_bytes)])

    def observe(self, now: float, done_bytes: int) -> None:
        """Notes how many bytes are here."""
        if now - self._samples[-1][0] < _SAMPLE_SECONDS:
            return
        self._samples.append((now, done_bytes))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _WINDOW_SECONDS:
            self._samples.popleft()

    def progress(self, now: float, done_bytes: int, total_bytes: int) -> TransferProgress:
        """Asked at any time, also while no byte comes: a transfer that stands still gets slower, and has no end when
        nothing came during the whole window.
        """
        started, first_bytes = self._base(now)
        rate = max(0.0, (done_bytes - first_bytes) / (now - started)) if now > started else 0.0
        remaining = (total_bytes - done_bytes) / rate if rate > 0 else None
        if remaining is not None and remaining > _NEVER_SECONDS:
            remaining = None
        return TransferProgress(done_bytes, total_bytes, rate, remaining)

    def _base(self, now: float) -> tuple[float, int]:
        """The newest sample that is as old as the window, or the oldest."""
        before = [sample for sample in self._samples if sample[0] <= now - _WINDOW_SECONDS]
        return before[-1] if before else self._samples[0]


class ProgressTeller:
    """Tells somebody how far a transfer is, some times a second. Not thread-safe."""

    def __init__(self, tell: Callable[[TransferProgress], None], total_bytes: int, now: float) -> None:
        self._tell = tell
        self._total_bytes = total_bytes
        self._meter = RateMeter(now)
        self._told_at = 0.0
        self._found_bytes = 0

    def found(self, count: int) -> None:
        """Notes bytes of an earlier transfer: they are no part of the rate."""
        self._found_bytes += count

    def observe(self, now: float, done_bytes: int, *, is_told: bool = False) -> None:
        """Notes how many bytes are here; tells of them if it is time, and at once where `is_told`."""
        moved_bytes = done_bytes - self._found_bytes
        self._meter.observe(now, moved_bytes)
        if is_told or now - self._told_at >= _TELL_SECONDS:
            self._told_at = now
            progress = self._meter.progress(now, moved_bytes, self._total_bytes - self._found_bytes)
            self._tell(replace(progress, done_bytes=done_bytes, total_bytes=self._total_bytes))


class StallWatch:
    """Notices a read that drips: too few bytes in an interval. That no byte comes at all, the source's own timeout
    notices.
    """

    def __init__(self, now: float, *, interval_seconds: float, min_bytes: int) -> None:
        self._interval_seconds = interval_seconds
        self._min_bytes = min_bytes
        self._started = now
        self._bytes = 0

    def is_stalled(self, now: float, count: int) -> bool:
        """Notes bytes that came; True when the interval that ends with them had too few."""
        self._bytes += count
        if now - self._started < self._interval_seconds:
            return False
        is_stalled = self._bytes < self._min_bytes
        self._started, self._bytes = now, 0
        return is_stalled
