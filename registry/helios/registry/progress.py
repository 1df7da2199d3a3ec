"""Where an ingest, or a push, stands, written by its threads and read by any number of followers.

Only the latest state of each phase is kept: a slow follower sees fewer steps, never a queue that grows.
"""

import threading
import time
from dataclasses import replace
from typing import Final

from helios.mesh.transfer.progress import RateMeter
from helios.registry.records import IngestPhase, IngestProgress, PushPhase

# Beyond three years nothing is said that anybody would plan with.
_MAX_REMAINING_SECONDS: Final = 1e8


class ProgressLog:
    """The phases of one of them. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: list[IngestProgress] = []
        self._meter = RateMeter(time.monotonic())

    def begin(self, phase: IngestPhase | PushPhase, total_bytes: int = 0) -> None:
        """Begins a phase, or sets the total of the one that runs."""
        with self._lock:
            if self._phases and self._phases[-1].phase is phase:
                self._phases[-1] = replace(self._phases[-1], total_bytes=total_bytes)
            else:
                self._phases.append(IngestProgress(phase, 0, total_bytes))
                self._meter = RateMeter(time.monotonic())

    def advance(self, count: int) -> None:
        """Adds bytes to the phase that runs."""
        with self._lock:
            last = self._phases[-1]
            self._phases[-1] = replace(last, done_bytes=last.done_bytes + count)

    def snapshot(self) -> tuple[IngestProgress, ...]:
        """Returns the phases as they stand, the one that runs with its rate; ``news`` compares two snapshots."""
        with self._lock:
            if not self._phases:
                return ()
            *before, last = self._phases
            now = time.monotonic()
            self._meter.observe(now, last.done_bytes)
            rate = self._meter.progress(now, last.done_bytes, last.total_bytes)
            remaining = rate.remaining_seconds if last.total_bytes else None
            if remaining is not None and not 0 <= remaining <= _MAX_REMAINING_SECONDS:
                remaining = None
            shown = replace(last, bytes_per_second=rate.bytes_per_second, remaining_seconds=remaining)
            return (*before, shown)


def news(seen: tuple[IngestProgress, ...], now: tuple[IngestProgress, ...]) -> list[IngestProgress]:
    """Returns what a follower that has seen one state must be told to know a later one, in order."""
    return [entry for index, entry in enumerate(now) if index >= len(seen) or seen[index] != entry]
