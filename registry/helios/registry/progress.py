"""Where an ingest stands, written by its threads and read by any number of followers.

Only the latest state of each phase is kept: a slow follower sees fewer steps, never a queue that grows.
"""

import threading

from helios.registry.records import IngestPhase, IngestProgress


class ProgressLog:
    """The phases of one ingest. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._phases: list[IngestProgress] = []

    def begin(self, phase: IngestPhase, total_bytes: int = 0) -> None:
        """Begins a phase, or sets the total of the one that runs."""
        with self._lock:
            if self._phases and self._phases[-1].phase is phase:
                self._phases[-1] = IngestProgress(phase, self._phases[-1].done_bytes, total_bytes)
            else:
                self._phases.append(IngestProgress(phase, 0, total_bytes))

    def advance(self, count: int) -> None:
        """Adds bytes to the phase that runs."""
        with self._lock:
            last = self._phases[-1]
            self._phases[-1] = IngestProgress(last.phase, last.done_bytes + count, last.total_bytes)

    def snapshot(self) -> tuple[IngestProgress, ...]:
        """Returns the phases as they stand; ``news`` compares two snapshots."""
        with self._lock:
            return tuple(self._phases)


def news(seen: tuple[IngestProgress, ...], now: tuple[IngestProgress, ...]) -> list[IngestProgress]:
    """Returns what a follower that has seen one state must be told to know a later one, in order."""
    return [entry for index, entry in enumerate(now) if index >= len(seen) or seen[index] != entry]
