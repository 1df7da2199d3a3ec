"""Where a replica is for its supervisor, how long it may be there, and what it is called when that was too long."""

import enum
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
        fetch_seconds: Until the weights are on the node.
        start_seconds: From the fork to ready.
        background_start_seconds: The same, of a replica that computes with what others leave, or may have to compile.
        drain_seconds: For a replica that drains on its own account.
        drain_grace_seconds: Given to a replica on top of its drain timeout, to cut off what is left and to exit by
            itself.
        sleep_seconds: Until weights and KV cache are off the device.
        wake_seconds: Until a sleeping replica is ready again.
        silence_seconds: How long a ready replica may say nothing before it counts as hung; 0: for ever.
    """

    fetch_seconds: float
    start_seconds: float
    drain_seconds: float
    drain_grace_seconds: float
    sleep_seconds: float = 60.0
    wake_seconds: float = 60.0
    silence_seconds: float = 0.0
    background_start_seconds: float = 1800.0
