"""What the core wants done. The core decides and returns these; the runtime carries them out. All are immutable."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from helios.mesh.errors import HeliosError
from helios.proxy.activation.rungs import Score
from helios.proxy.fleet.commands import Command
from helios.proxy.fleet.state import Replica
from helios.proxy.holds import Hold
from helios.proxy.routing.pick import Pick
from helios.proxy.scaling.decisions import Scaled


@dataclass(frozen=True, slots=True)
class Send:
    """Send a command to its worker; where it is not connected, its next hello repeats the command."""

    command: Command


@dataclass(frozen=True, slots=True)
class Release:
    """Answer a held request with a pick."""

    hold: Hold
    pick: Pick


@dataclass(frozen=True, slots=True)
class Fail:
    """Answer a held request with an error."""

    hold: Hold
    error: HeliosError


@dataclass(frozen=True, slots=True)
class HoldMoved:
    """A held request waits for `hold.model` and its `revision` now: the entry that it waited for, `left`, is gone."""

    hold: Hold
    left: str
    revision: str


@dataclass(frozen=True, slots=True)
class WorkersChanged:
    """Remember which workers there are, for the next start of this process."""


@dataclass(frozen=True, slots=True)
class SwapFailuresChanged:
    """Remember which models' compiled replicas failed, and how often, for the next start of this process."""


@dataclass(frozen=True, slots=True)
class Disconnect:
    """End a worker's session, where it has one: it was silent for so long that only a new hello makes it believed."""

    worker_id: str


@dataclass(frozen=True, slots=True)
class FleetResynchronised:
    """The fleet is believed to be complete: endpoints may be published, replicas started."""

    is_complete: bool


class WorkerChange(enum.Enum):
    """What can happen to a worker."""

    CONNECTED = 1
    UNREACHABLE = 2
    GONE = 3
    CORDONED = 4
    UNCORDONED = 5


@dataclass(frozen=True, slots=True)
class WorkerChanged:
    """Something happened to a worker."""

    worker_id: str
    change: WorkerChange


@dataclass(frozen=True, slots=True)
class ReplicaChanged:
    """A replica is in another state than before, or gone; as it was last told of."""

    replica: Replica


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """A replica's breaker opened or closed."""

    model: str
    replica_id: str
    worker_id: str
    is_open: bool


@dataclass(frozen=True, slots=True)
class ActivationBegun:
    """A start command goes out; `placement` says, for people, why there, `traceparent` is of the request that asked."""

    model: str
    replica_id: str
    worker_id: str
    held_count: int
    placement: str = ""
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class ActivationDelayed:
    """A start waits for room or for a worker; it is said again whenever the activation looks again."""

    model: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ActivationDone:
    """A replica is ready that this proxy waited for."""

    model: str
    replica_id: str
    seconds: float
    phases: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class StartScored:
    """A start or wake is over: `rung` is where it came from, as was believed when `promised_seconds` were, and `score`
    how right promises from there have been.
    """

    model: str
    replica_id: str
    rung: str
    promised_seconds: float
    seconds: float
    score: Score


@dataclass(frozen=True, slots=True)
class ActivationFailed:
    """A start failed, or there was no room; `held_count` requests are told so, those of other proxies among them."""

    model: str
    reason: str
    message: str
    held_count: int
    retry_after_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelScaled:
    """It was decided that a model is to have another number of replicas, or to be kept otherwise warm."""

    decision: Scaled


@dataclass(frozen=True, slots=True)
class SwapBegun:
    """A compiled replica was ordered in the background; `placement` says, for people, why there."""

    model: str
    replica_id: str
    worker_id: str
    placement: str


@dataclass(frozen=True, slots=True)
class SwapReady:
    """A compiled replica is ready, `seconds` after it was ordered, and waits to be known to every Envoy."""

    model: str
    replica_id: str
    seconds: float
    phases: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class SwapDone:
    """An eager replica drains in favour of a compiled one."""

    model: str
    replica_id: str


@dataclass(frozen=True, slots=True)
class SwapStopped:
    """A compiled replica on its way is stopped; it was no failure of its own."""

    model: str
    replica_id: str
    why: str


@dataclass(frozen=True, slots=True)
class SwapFailed:
    """A compiled replica failed, and the model stays eager: for `pause_seconds`, or until it changes (0)."""

    model: str
    reason: str
    message: str
    pause_seconds: float


Action = (
    Send
    | Release
    | Fail
    | HoldMoved
    | WorkersChanged
    | SwapFailuresChanged
    | Disconnect
    | FleetResynchronised
    | WorkerChanged
    | ReplicaChanged
    | BreakerChanged
    | ActivationBegun
    | ActivationDelayed
    | ModelScaled
    | ActivationDone
    | StartScored
    | ActivationFailed
    | SwapBegun
    | SwapReady
    | SwapDone
    | SwapStopped
    | SwapFailed
)
