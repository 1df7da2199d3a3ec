"""What is counted and what is expected, as values. Hours are whole hours since 1970, UTC. Pure."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
HOUR: Final = timedelta(hours=1)


def hour_of(moment: datetime) -> int:
    """Returns the hour that a moment is in."""
    return (moment - _EPOCH) // HOUR


def start_of(hour: int) -> datetime:
    """Returns when an hour begins."""
    return _EPOCH + hour * HOUR


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted; ``busy_ms`` is what requests took at their replicas, in all."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cold_starts: int = 0
    busy_ms: int = 0


@dataclass(frozen=True, slots=True)
class Delta:
    """What was counted of a model in an hour since the last report."""

    model: str
    hour: int
    counts: Counts


@dataclass(frozen=True, slots=True)
class Expectation:
    """Requests that are expected in an hour: the mean, and bounds that four hours of five lie between."""

    requests: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What is expected of a model, hour for hour from ``first_hour`` on.

    ``method`` is ``last``, ``recent``, ``level``, ``daily`` or ``weekly``; ``history_hours`` is what it was made from.
    """

    method: str
    history_hours: int
    first_hour: int
    hours: tuple[Expectation, ...]
    made_at: datetime

    def at(self, hour: int) -> Expectation | None:
        """Returns what is expected of an hour; None where the forecast does not reach it."""
        index = hour - self.first_hour
        return self.hours[index] if 0 <= index < len(self.hours) else None

    def expected_requests(self, hour: int, count: int) -> float:
        """Returns how many requests are expected in ``count`` hours from ``hour`` on, as far as it reaches."""
        found = (self.at(hour + index) for index in range(count))
        return sum(expectation.requests for expectation in found if expectation is not None)


@dataclass(frozen=True, slots=True)
class UsageHour:
    """An hour of a model, and what had been expected of it from the hours before; None: nothing was."""

    hour: int
    counts: Counts
    expectation: Expectation | None = None


@dataclass(frozen=True, slots=True)
class BlobHeat:
    """How much the models that share a blob were asked for."""

    hash: str
    size_bytes: int
    requests: int
    model_count: int
