"""What a replica's state machine may decide: its output, carried out by the runner in order."""

from dataclasses import dataclass

from helios.worker.supervisor.records import ProcessIdentity


@dataclass(frozen=True, slots=True)
class Fetch:
    """Borrow the weights; ``lease_id`` resumes the lease of an adopted replica."""

    lease_id: str = ""


@dataclass(frozen=True, slots=True)
class Fork:
    """Have the launcher fork a process on these weights before ``deadline`` (same clock as ``now``).

    ``asked_at`` is where the replica's own phases begin, on the same clock. ``is_early``: the weights are on their way.
    """

    path: str
    lease_id: str
    deadline: float
    asked_at: float = 0.0
    is_early: bool = False


@dataclass(frozen=True, slots=True)
class Watch:
    """Report ProcessExited as soon as this process is gone."""

    process: ProcessIdentity


@dataclass(frozen=True, slots=True)
class SendDrain:
    """Tell the replica to drain; nothing where it is not attached (its next hello repeats this action)."""

    timeout_seconds: float


@dataclass(frozen=True, slots=True)
class SendSleep:
    """Tell the replica to sleep; nothing where it is not attached (its next hello repeats this action)."""


@dataclass(frozen=True, slots=True)
class SendWake:
    """Tell the replica to wake; nothing where it is not attached (its next hello repeats this action)."""


@dataclass(frozen=True, slots=True)
class Shrink:
    """Book only what a sleeping replica leaves on its devices."""

    left_bytes: int


@dataclass(frozen=True, slots=True)
class Regrow:
    """Book all of its memory again, as a fact: it is awake, whatever it was believed to be."""


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


Action = (
    Fetch
    | Fork
    | Watch
    | SendDrain
    | SendSleep
    | SendWake
    | Shrink
    | Regrow
    | KillTree
    | ReleaseWeights
    | Free
    | Publish
)
