"""Where a replica is for its supervisor, how long it may be there, and what it is called when that was too long."""

import enum
import math
from dataclasses import dataclass
from typing import Final

from helios.worker.supervisor.records import ReplicaState

START_TIMEOUT: Final = "START_TIMEOUT"
FETCH_TIMEOUT: Final = "FETCH_TIMEOUT"
READY_UNLENT: Final = "READY_UNLENT"
REPLICA_DIED: Final = "REPLICA_DIED"
REPLICA_LOST: Final = "REPLICA_LOST"
REPLICA_HUNG: Final = "REPLICA_HUNG"
SLEEP_TIMEOUT: Final = "SLEEP_TIMEOUT"
WAKE_TIMEOUT: Final = "WAKE_TIMEOUT"


class Stage(enum.Enum):
    """Where a replica is for the supervisor: the contract's states, FALLING_ASLEEP, and ENDING while it is killed."""

    PENDING = enum.auto()
    FETCHING = enum.auto()
    LOADING = enum.auto()
    WARMING = enum.auto()
    READY = enum.auto()
    DRAINING = enum.auto()
    FALLING_ASLEEP = enum.auto()
    ASLEEP = enum.auto()
    WAKING = enum.auto()
    ENDING = enum.auto()
    STOPPED = enum.auto()
    FAILED = enum.auto()

    @property
    def shown(self) -> ReplicaState:
        """The state that others see."""
        return _SHOWN_AS.get(self.name) or ReplicaState[self.name]


_SHOWN_AS: Final = {"ENDING": ReplicaState.DRAINING, "FALLING_ASLEEP": ReplicaState.ASLEEP}


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a stage may last, in seconds.

    Attributes:
        fetch_seconds: While weights come to the node, from one byte to the next.
        start_seconds: From the fork to ready, beside the time that its bytes take.
        background_start_seconds: The same, of a replica that computes with what others leave, or may have to compile.
        drain_seconds: For a replica that drains on its own account.
        drain_grace_seconds: Given to a replica on top of its drain timeout, to cut off what is left and to exit by
            itself.
        sleep_seconds: Until weights and KV cache are off the device.
        wake_seconds: Until a sleeping replica is ready again, beside the time that its bytes take.
        silence_seconds: How long a ready replica may say nothing before it counts as hung; 0: for ever.
        least_bytes_per_second: How slowly a replica may load what it books: no fixed time is enough for every model.
    """

    fetch_seconds: float
    start_seconds: float
    drain_seconds: float
    drain_grace_seconds: float
    sleep_seconds: float = 60.0
    wake_seconds: float = 60.0
    silence_seconds: float = 0.0
    background_start_seconds: float = 1800.0
    least_bytes_per_second: float = math.inf

    def loading_seconds(self, memory_bytes: int) -> float:
        """How long a replica that books so much may take to load, where it is as slow as it may be."""
        return memory_bytes / self.least_bytes_per_second
