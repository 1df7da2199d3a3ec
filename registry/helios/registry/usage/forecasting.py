"""What is expected of a model, learnt hour by hour. Pure; it imports river, which takes two seconds and 120 MB.

Five forecasters learn the same hours: the last hour, the recent rate and the level of weeks (exponential smoothing),
the rhythm of days and that of weeks (Holt-Winters). Before each hour each one says what it expects; the one that erred
least lately speaks for the model. So a model without a rhythm is not given one, bursts that last are followed, and a
model with little history has the recent rate. Mixing all by their errors was tried: it is worse on each trace.

river rather than its rivals: it learns an hour in microseconds, so that five weeks of 10,000 models are replayed in two
or three minutes and no fitted model has to be kept. statsforecast's AutoETS and statsmodels' Holt-Winters fit anew, a
tenth of a second a model, which is a quarter of an hour for as many, and bring pandas (440 and 270 MB in all, river 180
MB, most of it scipy and numpy); sktime wraps those; augurs is small and fast, and has had no release for two years.

The spread is measured, not modelled: errors of the last week on the scale of square roots, where the noise of counts is
the same for busy and quiet models (Anscombe). Of busy hours it is taken from hours that were expected to be busy: that
nothing came where nothing was expected says nothing of them, and bursts would look as sure as a rhythm. Where there are
too few errors, it is that of a Poisson process, and half.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from river.time_series import HoltWinters

from helios.registry.usage.records import Expectation

# Chosen on the trace that does not judge; tests/benchmarks/forecast_bench.py says how.
_LAST: Final = {"alpha": 0.999}
_RECENT: Final = {"alpha": 0.3}
_LEVEL: Final = {"alpha": 0.05}
_DAILY: Final = {"alpha": 0.1, "beta": 0.001, "gamma": 0.1, "seasonality": 24}
_WEEKLY: Final = {"alpha": 0.1, "beta": 0.001, "gamma": 0.2, "seasonality": 168}
# Seasons before a rhythm is believed: the first one is all noise.
_SEASON_COUNT: Final = 2
# river divides the first season by its mean, which is 0 where nothing was asked for.
_SHIFT: Final = 1.0
# Errors count half after a week.
_FADING: Final = 0.5 ** (1 / 168)
# Errors that the spread is taken from: a week's, or as many busy hours'. Fewer than a day's say too little.
_ERROR_COUNT: Final = 168
_MIN_ERROR_COUNT: Final = 24
_MIN_BUSY_COUNT: Final = 8
# Hours are as busy as others where what is expected of them is within a factor of four; below one request, quiet.
_BUSY: Final = 1.0
_LEVELS: Final = 4.0
# One side of four fifths of a normal distribution; the square root of a Poisson count has a deviation of a half.
_NORMAL_SIDE: Final = 1.2816
_FIRST_SPREAD: Final = 1.5 * 0.5 * _NORMAL_SIDE
# Beyond this a smoothing that runs away is cut: ten times the most that was ever seen.
_CEILING: Final = 10.0


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is expected of the hours after the last one that was learnt."""

    method: str
    history_hours: int
    hours: tuple[Expectation, ...]


class _Expert:
    """A forecaster and how far off it was lately."""

    def __init__(self, name: str, parameters: dict[str, Any], *, seen_hours: int) -> None:
        """Makes a forecaster that says nothing before it has seen so many hours."""
        self.name = name
        self.alpha: float = parameters["alpha"]
        self.expected = 0.0
        self.error = 0.0
        self.weight = 0.0
        self._model = HoltWinters(**parameters)
        self._seen_hours = seen_hours
        self._season: int = parameters.get("seasonality", 0)
        self._first: list[float] = []

    def is_able(self, hour_count: int) -> bool:
        return hour_count >= self._seen_hours

    def expect(self, horizon: int, ceiling: float) -> list[float]:
        return [min(ceiling, max(0.0, value - _SHIFT)) for value in self._model.forecast(horizon)]

    def judge(self, count: float) -> None:
        self.error = self.error * _FADING + abs(self.expected - count)
        self.weight = self.weight * _FADING + 1.0

    def learn(self, count: float) -> None:
        self._model.learn_one(count + _SHIFT)
        if len(self._first) < self._season:
            self._first.append(count)
            if len(self._first) == self._season:
                self._begin_season()

    def _begin_season(self) -> None:
        """Has the first season be what it was, without a trend.

        river 0.26 begins with quotients, also where seasons are added, and with the slope from the first hour to the
        last; both take weeks to unlearn.
        """
        mean = sum(self._first) / self._season
        trend, season = self._model.trend, self._model.season
        assert trend is not None, "a forecaster with a season has a trend"
        assert season is not None, "it is asked for where there is one"
        trend[-1] = 0.0
        season.clear()
        season.extend(count - mean for count in self._first)


class Forecaster:
    """Learns a model's hours, one after another, without gaps."""

    def __init__(self) -> None:
        self._experts = (
            _Expert("recent", _RECENT, seen_hours=2),
            _Expert("last", _LAST, seen_hours=2),
            _Expert("level", _LEVEL, seen_hours=2),
            _Expert("daily", _DAILY, seen_hours=_SEASON_COUNT * 24),
            _Expert("weekly", _WEEKLY, seen_hours=_SEASON_COUNT * 168),
        )
        self._errors: deque[float] = deque(maxlen=_ERROR_COUNT)
        self._busy_errors: dict[int, deque[float]] = {}
        self._hour_count = 0
        self._most = 0.0
        self._sum = 0.0

    def learn(self, count: float) -> None:
        """Learns the requests of the next hour."""
        chosen = self._choose()
        for expert in self._experts:
            if expert.is_able(self._hour_count):
                expert.expected = expert.expect(1, self._ceiling)[0]
                expert.judge(count)
        expected = chosen.expected if chosen is not None else self._mean
        if self._hour_count:
            error = _root(count) - _root(expected)
            self._errors.append(error)
            if level := _level(expected):
                self._busy_errors.setdefault(level, deque(maxlen=_ERROR_COUNT)).append(error)
        for expert in self._experts:
            expert.learn(count)
        self._hour_count += 1
        self._sum += count
        self._most = max(self._most, count)

    def forecast(self, horizon: int) -> Outlook:
        """Returns what is expected of the next ``horizon`` hours."""
        chosen = self._choose()
        known: dict[int, tuple[float, float]] = {}
        if chosen is None:
            hours = tuple(self._spread(self._mean, 1.0, known) for _ in range(horizon))
            return Outlook("recent", self._hour_count, hours)
        means = chosen.expect(horizon, self._ceiling)
        # The level wanders by alpha times each error to come.
        widths = (math.sqrt(1.0 + index * chosen.alpha**2) for index in range(horizon))
        hours = tuple(self._spread(mean, width, known) for mean, width in zip(means, widths, strict=True))
        return Outlook(chosen.name, self._hour_count, hours)

    @property
    def _mean(self) -> float:
        return self._sum / self._hour_count if self._hour_count else 0.0

    @property
    def _ceiling(self) -> float:
        return _CEILING * self._most

    def _choose(self) -> _Expert | None:
        """Returns who erred least lately, of those who have been judged for a day or are all there is."""
        able = [expert for expert in self._experts if expert.is_able(self._hour_count)]
        judged = [expert for expert in able if expert.weight >= _MIN_ERROR_COUNT / 2] or able[:1]
        return min(judged, key=lambda expert: expert.error / max(expert.weight, 1.0), default=None)

    def _spread(self, mean: float, width: float, known: dict[int, tuple[float, float]]) -> Expectation:
        level, root = _level(mean), _root(mean)
        sides = known.get(level)
        if sides is None:
            sides = known[level] = self._sides(level)
        low, high = _square(root + width * sides[0]), _square(root + width * sides[1])
        return Expectation(mean, min(low, mean), max(high, mean))

    def _sides(self, level: int) -> tuple[float, float]:
        """How far below and above what is expected most hours are that are as busy."""
        if not level:
            return _quantiles(self._errors)
        errors = self._busy_errors.get(level, ())
        if len(errors) >= _MIN_BUSY_COUNT:
            return _quantiles(errors, _MIN_BUSY_COUNT)
        # Nothing is sure of hours that there were none of.
        return -math.inf, _quantiles(self._errors)[1]


def forecast_of(counts: Iterable[float], horizon: int) -> Outlook:
    """Replays the requests of hours, the oldest first, and returns what is expected of those that follow."""
    forecaster = Forecaster()
    for count in counts:
        forecaster.learn(count)
    return forecaster.forecast(horizon)


def _quantiles(errors: Sequence[float], least: int = _MIN_ERROR_COUNT) -> tuple[float, float]:
    """Returns the tenth and ninetieth of a hundred errors; with few, those of a process that is half again as wide."""
    if len(errors) < least:
        return -_FIRST_SPREAD, _FIRST_SPREAD
    ordered = sorted(errors)
    index = len(ordered) // 10
    return min(0.0, ordered[index]), max(0.0, ordered[-1 - index])


def _level(mean: float) -> int:
    return 1 + int(math.log(mean, _LEVELS)) if mean >= _BUSY else 0


def _root(count: float) -> float:
    # Anscombe, The transformation of Poisson, binomial and negative-binomial data, Biometrika 35 (1948).
    return math.sqrt(count + 0.375)


def _square(root: float) -> float:
    return max(0.0, root) ** 2 - 0.375 if root > math.sqrt(0.375) else 0.0
