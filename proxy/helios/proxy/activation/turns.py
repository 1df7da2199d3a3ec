"""Models that wait for room which others have: whose turn it is, and what room is being made for whom. Pure.

Where ten models share a device that has room for one, each request for another model would have its way at once and
the device would do nothing but load (llama-swap's users report it). So a model that has been started keeps its room
for a time, and answers at least what had queued for it; what is in use then gives way to those that have waited for
`turn_seconds`, and the one that has waited longest is next. A model whose turn ends goes to the end of the line, with
the requests that come for it meanwhile.

Room that is being made is claimed: without that, whoever asks first when it is free would take it, and the one that
others were drained for would drain others again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from helios.mesh.gangs import GangDevice
from helios.proxy.placement.workers import Occupant


@dataclass(frozen=True, slots=True)
class TurnPolicy:
    """How models take turns on devices.

    Attributes:
        turn_seconds: a model that has waited for so long takes room from others that are in use; 0: never.
        drain_seconds: how long requests may go on at a replica whose turn is over.
    """

    turn_seconds: float = 30.0
    drain_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class Claim:
    """Room that is being made: an equal share of each of these devices; without devices, of any that the worker has."""

    worker_id: str
    device_ids: tuple[str, ...]
    share_bytes: int

    def as_occupant(self) -> Occupant:
        """The claim as something that takes room."""
        return Occupant("", self.share_bytes * max(1, len(self.device_ids)), self.device_ids)

    def book(self, devices: Iterable[GangDevice]) -> tuple[GangDevice, ...]:
        """The devices without what is claimed of them."""
        return tuple(
            replace(device, free_bytes=device.free_bytes - self.share_bytes)
            if device.device_id in self.device_ids
            else device
            for device in devices
        )


class Line:
    """Models that wait for room, the longest wait first.

    Invariant: a model has a claim only while it is in the line.
    """

    def __init__(self) -> None:
        # In the order of joining, which is that of time.
        self._since: dict[str, float] = {}
        self._claims: dict[str, Claim] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._since)

    def __contains__(self, model: str) -> bool:
        """Whether a model waits."""
        return model in self._since

    def models(self) -> Sequence[str]:
        """Those that wait, the longest wait first."""
        return tuple(self._since)

    def join(self, model: str, now: float) -> None:
        """A model waits from now on; one that waits already keeps its place."""
        self._since.setdefault(model, now)

    def leave(self, model: str) -> None:
        """A model waits no more; harmless where it did not."""
        self._since.pop(model, None)
        self._claims.pop(model, None)

    def waited_seconds(self, model: str, now: float) -> float:
        """How long a model has waited; 0 where it does not."""
        return now - self._since.get(model, now)

    def ahead_count(self, model: str) -> int:
        """How many wait for longer than a model; 0 where it does not wait."""
        return tuple(self._since).index(model) if model in self._since else 0

    def claim(self, model: str, claim: Claim) -> None:
        """Room is being made for a model, until it waits no more; harmless where it does not wait."""
        if model in self._since:
            self._claims[model] = claim

    def claims_on(self, worker_id: str, model: str) -> list[Claim]:
        """What is claimed of a worker by others than this model."""
        return [claim for name, claim in self._claims.items() if name != model and claim.worker_id == worker_id]
