"""How fast a transfer is, when it will be done, and whether it stands still. Pure: time is passed in."""

from collections import deque
from dataclasses import dataclass

_WINDOW_SECONDS = 5.0
"""Long enough that the ends of single chunks don't show, short enough that a change of speed does."""

_SAMPLE_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class TransferProgress:
    """How far a transfer is."""

    done_bytes: int
    """Bytes that are here, those of an earlier try included. May shrink when a chunk has to be fetched again."""
    total_bytes: int
    bytes_per_second: float
    """Over the last seconds; 0 before anything can be said."""
    remaining_seconds: float | None
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
        started, first_bytes = self._samples[0]
        rate = max(0.0, (done_bytes - first_bytes) / (now - started)) if now > started else 0.0
        remaining = (total_bytes - done_bytes) / rate if rate > 0 else None
        return TransferProgress(done_bytes, total_bytes, rate, remaining)


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
