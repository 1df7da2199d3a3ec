"""Where a replica is in its life, and how long each phase of its start took."""

import asyncio
from dataclasses import dataclass, field
from enum import Enum


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

    ``phases`` are (name, seconds) in order, without gaps: each begins where the one before ended, so they add up to
    the time from the request for the start to the end of the last. ``left_bytes`` is what a sleeping replica left on
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
    _phase_began_at: float = 0.0

    def __post_init__(self) -> None:
        self._phase_began_at = self.requested_at

    def end_phase(self, name: str, ended_at: float) -> None:
        """Ends a phase at a monotonic time; the next begins there."""
        seconds = max(0.0, ended_at - self._phase_began_at)
        self._phase_began_at = max(self._phase_began_at, ended_at)
        self.phases.append((name, seconds))

    def fail(self, reason: str, message: str) -> None:
        """It can't go on."""
        self.state = State.FAILED
        self.failure_reason, self.failure_message = reason, message
