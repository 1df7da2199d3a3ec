"""What the registry would say: forecasts of each model by its own forecaster, and the warm targets made of them.

Hour by hour, as in the registry: two minutes into an hour each model that was ever asked for learns the hour before,
and gets its target. Reports and the watch take no time here.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from helios.registry.usage.forecast_run import HORIZON_HOURS
from helios.registry.usage.forecasting import Forecaster
from helios.registry.usage.records import Counts, Forecast
from helios.registry.usage.targets import Target, TargetPolicy, target_of
from tests.simulator.loads import Load
from tests.simulator.world import Model

FORECAST_DELAY_SECONDS: Final = 120
_RECENT_HOURS: Final = 24
# Hours since 1970 at which a study begins; any.
FIRST_HOUR: Final = 490_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# What a request takes, for the number of replicas that a target names: a mean prompt and a mean answer.
_MEAN_TOKENS: Final = (1000, 200)


def expected_targets(load: Load, models: Sequence[Model], policies: Sequence[TargetPolicy]) -> list[list[list[Target]]]:
    """Returns the targets of each simulated hour, for each policy: all are made of the same forecasts."""
    span = load.span
    found: list[list[list[Target]]] = [[[] for _ in range(span.simulated_hours)] for _ in policies]
    for index, model in enumerate(models):
        hours = load.hours[index]
        used = hours.nonzero()[0]
        if not len(used):
            continue
        begun = int(used[0])
        seconds = model.times(*_MEAN_TOKENS, 0)[1]
        forecaster = Forecaster()
        counts: list[float] = hours.tolist()
        for hour in range(begun, span.hours - 1):
            forecaster.learn(counts[hour])
            now = hour + 1 - span.history_hours
            if now < 0:
                continue
            outlook = forecaster.forecast(HORIZON_HOURS)
            at = FIRST_HOUR + now
            forecast = Forecast(outlook.method, outlook.history_hours, at, outlook.hours, _EPOCH)
            requests = round(sum(counts[max(0, hour + 1 - _RECENT_HOURS) : hour + 1]))
            recent = Counts(requests=requests, busy_ms=round(1000 * seconds * requests))
            for policy, by_hour in zip(policies, found, strict=True):
                target = target_of(model.entry.name, forecast, recent, hour=at, policy=policy)
                if target is not None:
                    by_hour[now].append(target)
    return found
