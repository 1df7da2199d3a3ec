"""What is expected of models, and how warm each is to be kept for it. Pure.

The registry forecasts; its targets come in whenever it has made new ones, and expire: without news for two hours
nothing is kept warm for a forecast any more. What is followed takes nothing from anybody: replicas are started, and
weights staged, where there is room that nobody has.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from helios.proxy.scaling.ladder import Rung


class WarmPoolMode(StrEnum):
    """What is made of forecasts."""

    OFF = "off"
    ADVISE = "advise"
    ON = "on"


@dataclass(frozen=True, slots=True)
class Expected:
    """Keep a model on a rung, with so many replicas where that is READY, until `until` (monotonic seconds).

    Below READY a replica is worth keeping for `idle_seconds` after its last request; 0: nothing is said of that.
    """

    rung: Rung
    replica_count: int
    reason: str
    until: float
    idle_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """A model is to be kept otherwise than before; None where it is not, or was not, to be kept at all."""

    model: str
    before: Expected | None
    after: Expected | None


class Forecasts:
    """The newest targets by model.

    Invariant: nothing that has expired is ever given, and in the mode `off` there is nothing.
    """

    def __init__(self, mode: WarmPoolMode) -> None:
        self.mode = mode
        self.is_followed = mode is WarmPoolMode.ON
        """Whether anything is done about targets."""
        self._expected: dict[str, Expected] = {}

    def replace(self, expected: Mapping[str, Expected]) -> list[Change]:
        """Takes in all targets; returns where rung or count are others, by name."""
        before = self._expected
        self._expected = dict(expected) if self.mode is not WarmPoolMode.OFF else {}
        return [
            Change(name, before.get(name), self._expected.get(name))
            for name in sorted(before.keys() | self._expected.keys())
            if _aim(before.get(name)) != _aim(self._expected.get(name))
        ]

    def of(self, model: str, now: float) -> Expected | None:
        """How warm a model is best kept, whether or not that is followed."""
        expected = self._expected.get(model)
        return expected if expected is not None and now < expected.until else None

    def followed(self, model: str, now: float) -> Expected | None:
        """How warm a model is to be kept."""
        return self.of(model, now) if self.is_followed and self._expected else None

    def dismiss(self, model: str) -> None:
        """An operator has said otherwise of a model: nothing is expected of it until there are new targets."""
        self._expected.pop(model, None)

    def models(self) -> list[str]:
        """Models that are to be kept warm."""
        return list(self._expected) if self.is_followed else []


def _aim(expected: Expected | None) -> tuple[Rung, int] | None:
    return (expected.rung, expected.replica_count) if expected is not None else None
