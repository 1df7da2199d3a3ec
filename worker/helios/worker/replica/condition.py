"""Where a replica is in its life, and how long each phase of its start took."""

import asyncio
from dataclasses import dataclass, field
from enum import Enum

from helios.worker.replica.phases import UNEXPLAINED, Timeline


class State(Enum):
    """loading → warming → ready → draining, and ready → asleep → waking → ready; failed from any.
    (fetching and stopped are the supervisor's to know.)
    """

    LOADING = "loading"
    WARMING = "warming"
    READY = "ready"
    DRAINING = "draining"
    ASLEEP = "asleep"
    WAKING = "waking"
    FAILED = "failed"


@dataclass(slots=True)
class Condition:
    """What the replica tells of itself. One event loop writes and reads it.

    ``phases`` are (name, seconds) in order; with the last, `unexplained`, they add up to the time from the request for
    the start to ready. ``left_bytes`` is what a sleeping replica left on
    its device, 0: not measured. ``ready_count`` grows when READY is to be told again.
    """

    pid: int
    start_ticks: int
    requested_at: float
    state: State = State.LOADING
    address: str = ""
    max_context_tokens: int = 0
    phases: list[tuple[str, float]] = field(default_factory=list)
    failure_reason: str = ""
    failure_message: str = ""
    can_sleep: bool = False
    wake_count: int = 0
    left_bytes: int = 0
    ready_count: int = 0
    failure_told: asyncio.Event = field(default_factory=asyncio.Event)
    _timeline: Timeline = field(init=False)

    def __post_init__(self) -> None:
        self._timeline = Timeline(self.requested_at)

    def add_phase(self, name: str, began_at: float, ended_at: float) -> None:
        """Takes a phase that was measured; what others covered already is left out of it."""
        seconds = self._timeline.add(began_at, ended_at)
        if seconds:
            self.phases.append((name, seconds))

    def end_phases(self, ended_at: float) -> None:
        """Ends the start."""
        self.phases.append((UNEXPLAINED, self._timeline.close(ended_at)))

    def fail(self, reason: str, message: str) -> None:
        """It can't go on."""
        self.state = State.FAILED
        self.failure_reason, self.failure_message = reason, message
