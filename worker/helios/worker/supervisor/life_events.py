"""What may happen to a replica: the input of its state machine."""

from dataclasses import dataclass

from helios.mesh.transfer.progress import TransferProgress
from helios.worker.supervisor.records import Failure, PhaseTiming, ProcessIdentity, ReplicaState


@dataclass(frozen=True, slots=True)
class Begin:
    """Memory and a slot are booked: go."""


@dataclass(frozen=True, slots=True)
class WeightsEnough:
    """Enough of the weights is here for a replica to begin its start on; the rest comes, and nothing is lent yet."""

    path: str


@dataclass(frozen=True, slots=True)
class WeightsReady:
    """The storage agent lent the weights."""

    path: str
    lease_id: str


@dataclass(frozen=True, slots=True)
class WeightsFailed:
    """The storage agent can't lend them."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class WeightsCome:
    """The storage agent fetches them."""

    progress: TransferProgress


@dataclass(frozen=True, slots=True)
class Forked:
    """The launcher forked the front process."""

    process: ProcessIdentity


@dataclass(frozen=True, slots=True)
class ForkFailed:
    """There is no process and there will be none."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class Attached:
    """The replica said hello, for the first time or again."""

    process: ProcessIdentity
    state: ReplicaState
    address: str = ""
    max_context_tokens: int = 0
    phases: tuple[PhaseTiming, ...] = ()
    can_sleep: bool = False
    left_bytes: int = 0
    """Device memory that a sleeping replica still holds; 0: not measured."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """A phase of the start ended."""

    state: ReplicaState
    phase: PhaseTiming | None


@dataclass(frozen=True, slots=True)
class BecameReady:
    """The replica takes requests."""

    address: str
    max_context_tokens: int
    can_sleep: bool = False


@dataclass(frozen=True, slots=True)
class SleepRequested:
    """Take weights and KV cache off the device. ``left_bytes``: booked while it sleeps where it measures nothing."""

    left_bytes: int


@dataclass(frozen=True, slots=True)
class FellAsleep:
    """Weights and KV cache are off the device; 0: what is left was not measured."""

    left_bytes: int


@dataclass(frozen=True, slots=True)
class WakeRequested:
    """Come back; the memory is booked again already."""


@dataclass(frozen=True, slots=True)
class ReportedFailure:
    """The replica says that it can't go on."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """The front process is gone.

    ``status`` is its exit code, or minus the signal that killed it; None where nobody could wait for it.
    """

    status: int | None = None


@dataclass(frozen=True, slots=True)
class DrainRequested:
    """Finish the requests, then stop."""

    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Stop now."""


@dataclass(frozen=True, slots=True)
class TreeGone:
    """No process of the replica's tree is left; ``last_lines`` ended its log."""

    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Heard:
    """The replica said something: it is alive."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed: ``handle`` looks at the deadline."""


Event = (
    Begin
    | WeightsCome
    | WeightsEnough
    | WeightsReady
    | WeightsFailed
    | Forked
    | ForkFailed
    | Attached
    | Progressed
    | BecameReady
    | SleepRequested
    | FellAsleep
    | WakeRequested
    | ReportedFailure
    | ProcessExited
    | DrainRequested
    | StopRequested
    | TreeGone
    | Heard
    | Tick
)
