"""How right forecasts were: what was expected of each hour from the hours before, against what came. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from helios.registry.usage.records import UsageHour


@dataclass(frozen=True, slots=True)
class Score:
    """Of hours that are over and of which something was expected.

    Attributes:
        hour_count: How many those are.
        wmape: Sum of absolute errors over the sum of requests; None: no request came.
        mase: Mean absolute error over that of expecting what came in the hour before; None: that one made none.
        covered_ratio: Share of hours whose requests were between the bounds.
    """

    hour_count: int
    wmape: float | None
    mase: float | None
    covered_ratio: float


def score_of(hours: Sequence[UsageHour], current_hour: int) -> Score | None:
    """Scores a model's hours, the oldest first; None where nothing can be compared yet.

    Hours that have no row had no request; the one that runs is left out.
    """
    requests = {hour.hour: hour.counts.requests for hour in hours}
    judged = [hour for hour in hours if hour.expectation is not None and hour.hour < current_hour]
    if not judged:
        return None
    error = naive_error = total = 0.0
    covered = 0
    for hour in judged:
        expectation, came = hour.expectation, hour.counts.requests
        assert expectation is not None
        error += abs(expectation.requests - came)
        naive_error += abs(requests.get(hour.hour - 1, 0) - came)
        total += came
        # Bounds are of a continuous number; what comes is a whole one.
        covered += round(expectation.low) <= came <= round(expectation.high + 0.5)
    return Score(
        hour_count=len(judged),
        wmape=error / total if total else None,
        mase=error / naive_error if naive_error else None,
        covered_ratio=covered / len(judged),
    )
