"""What is told of a model's use. Pure."""

from dataclasses import dataclass

from helios.registry.usage.records import Counts, Forecast, UsageHour
from helios.registry.usage.score import Score
from helios.registry.usage.targets import Target


@dataclass(frozen=True, slots=True)
class ModelUsage:
    """What is known of a model's use; ``hours`` are those that were asked for, the oldest first."""

    model: str
    counts: Counts
    hours: tuple[UsageHour, ...]
    forecast: Forecast | None
    score: Score | None
    target: Target | None
