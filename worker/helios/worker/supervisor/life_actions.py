"""What a replica's state machine may decide: its output, carried out by the runner in order."""

from dataclasses import dataclass

from helios.worker.supervisor.records import ProcessIdentity


@dataclass(frozen=True, slots=True)
class Fetch:
    """Borrow the weights; ``lease_id`` resumes the lease of an adopted replica."""

    lease_id: str = ""


@dataclass(frozen=True, slots=True)
class Fork:
    """Have the launcher fork a process on these weights before ``deadline`` (same clock as ``now``)."""

    path: str
    lease_id: str
    deadline: float


@dataclass(frozen=True, slots=True)
class Watch:
    """Report ProcessExited as soon as this process is gone."""

    process: ProcessIdentity


@dataclass(frozen=True, slots=True)
class SendDrain:
    """Tell the replica to drain; nothing where it is not attached (its next hello repeats this action)."""

    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class KillTree:
    """Kill every process of the tree, report TreeGone when none is left."""

    process: ProcessIdentity


@dataclass(frozen=True, slots=True)
class ReleaseWeights:
    """End the borrowing, or the attempt to."""


@dataclass(frozen=True, slots=True)
class Free:
    """Give memory and slot back: nothing of the replica is left."""


@dataclass(frozen=True, slots=True)
class Publish:
    """The view changed."""


Action = Fetch | Fork | Watch | SendDrain | KillTree | ReleaseWeights | Free | Publish
