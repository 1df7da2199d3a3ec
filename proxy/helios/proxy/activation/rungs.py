"""How long a model takes to be ready from each rung of the ladder, and how right that was. Pure.

A start has a part that moves weights (fetching and loading: bytes over a bandwidth, which each rung has of its own) and
a part that does not (processes, engine, warm-up: the model's own, wherever its weights are). Both are measured at every
start, so a model that was only ever fetched from afar is known to start sooner from a disk, and one that was never
started has the fleet's mean of the one part and the rung's bandwidth of the other. Where a model was measured on a rung
itself, that counts.

What was promised when a start began is compared with what it took: the mean of how many times too long or too short
promises were, by rung. Source of the split by phases: "Breaking the Ice", MLSys'26, each phase linear in few numbers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

# Half of the weight lies on the last two or three starts.
_NEW_SHARE: Final = 0.3
# A share of a second is as good as none, and a factor of it says nothing.
_LEAST_SECONDS: Final = 0.1
# Models that were started last, on each rung; some 200 bytes each.
_MOST_MEANS: Final = 20_000


class StartRung(IntEnum):
    """Where a model's next replica comes from, the farthest first; the values are the contract's."""

    CLOUD = 1
    """Its weights are on no node that is known to have them."""
    PEER = 2
    """On another node's disk."""
    DISK = 3
    MEMORY = 4
    ASLEEP = 5
    """Its processes wait, weights off the device."""


@dataclass(frozen=True, slots=True)
class Took:
    """What a start took in all, and `moved_seconds` of it for a revision's `weights_bytes` of weights."""

    seconds: float
    moved_seconds: float
    revision: str
    weights_bytes: int


@dataclass(frozen=True, slots=True)
class Score:
    """How right promises were: of `count` starts, `error_factor` is by how much they were wrong on the mean.

    1 is exact; 2 is half or double. Later starts count more.
    """

    count: int = 0
    error_factor: float = 1.0


class RungEstimates:
    """Means by model and rung, bandwidths by rung, and the score of what was promised by them."""

    def __init__(self, *, base_seconds: float, bytes_per_second: float) -> None:
        """Sets the guesses for what was never measured: a start without its weights, and how fast these come."""
        self._base_seconds = base_seconds
        self._bytes_per_second = bytes_per_second
        self._means: OrderedDict[tuple[str, StartRung], float] = OrderedDict()
        self._fixed: OrderedDict[str, float] = OrderedDict()
        self._fetched: OrderedDict[str, None] = OrderedDict()
        self._fleet_fixed: float | None = None
        self._rates: dict[StartRung, float] = {}
        self._scores: dict[StartRung, Score] = {}

    def expected_seconds(self, model: str, rung: StartRung, weights_bytes: int, known: float | None = None) -> float:
        """How long a start from a rung takes.

        ``known`` is what the model is known to take wherever its weights are, which counts where it was never measured
        here.
        """
        mean = self._means.get((model, rung))
        if mean is not None:
            return mean
        moving = weights_bytes / self._rate(rung)
        if rung is StartRung.ASLEEP:
            return max(_LEAST_SECONDS, moving)
        fixed = self._fixed.get(model)
        if fixed is None and known is not None:
            return known
        if fixed is None:
            fixed = self._base_seconds if self._fleet_fixed is None else self._fleet_fixed
        return fixed + moving

    def record(self, model: str, rung: StartRung, took: Took) -> None:
        """Takes in a start that was measured."""
        _learn(self._means, (model, rung), took.seconds)
        is_moved = took.moved_seconds >= _LEAST_SECONDS and took.weights_bytes
        if is_moved:
            rate = took.weights_bytes / took.moved_seconds
            self._rates[rung] = _mean(self._rates.get(rung), rate)
        if rung is not StartRung.ASLEEP:
            fixed = max(0.0, took.seconds - took.moved_seconds)
            _learn(self._fixed, model, fixed)
            self._fetched[took.revision] = None
            if len(self._fetched) > _MOST_MEANS:
                self._fetched.popitem(last=False)
            self._fleet_fixed = _mean(self._fleet_fixed, fixed)

    def score(self, rung: StartRung, promised_seconds: float, seconds: float) -> Score:
        """Compares a promise with what came of it; returns the rung's score."""
        factor = max(promised_seconds, _LEAST_SECONDS) / max(seconds, _LEAST_SECONDS)
        error, before = abs(math.log(factor)), self.score_of(rung)
        mean = _mean(math.log(before.error_factor) if before.count else None, error)
        self._scores[rung] = Score(before.count + 1, math.exp(mean))
        return self._scores[rung]

    def score_of(self, rung: StartRung) -> Score:
        """How right promises from a rung were; without any, a count of 0."""
        return self._scores.get(rung, Score())

    def was_fetched(self, revision: str) -> bool:
        """Whether a start of the revision ended with its weights on a node's disk, and nobody evicted them."""
        return revision in self._fetched

    def evicted(self, revision: str) -> None:
        """A revision's weights were dropped from all nodes."""
        self._fetched.pop(revision, None)

    def document(self) -> dict[str, Any]:
        """All of it, as `restore` takes it: JSON's types."""
        return {
            "means": [[model, rung.name, seconds] for (model, rung), seconds in self._means.items()],
            "fixed": dict(self._fixed),
            "fetched": list(self._fetched),
            "fleet_fixed": self._fleet_fixed,
            "rates": {rung.name: rate for rung, rate in self._rates.items()},
            "scores": {rung.name: [one.count, one.error_factor] for rung, one in self._scores.items()},
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        """Takes in what an earlier run had measured. Raises KeyError, TypeError, ValueError where it is none."""
        means = [((str(model), StartRung[name]), float(seconds)) for model, name, seconds in document["means"]]
        fixed = [(str(model), float(seconds)) for model, seconds in document["fixed"].items()]
        rates = {StartRung[name]: float(rate) for name, rate in document["rates"].items()}
        scores = {StartRung[name]: Score(int(n), float(error)) for name, (n, error) in document["scores"].items()}
        fleet = document["fleet_fixed"]
        numbers: Iterable[float] = (
            *(seconds for _, seconds in means),
            *(seconds for _, seconds in fixed),
            *rates.values(),
            *(one.error_factor for one in scores.values()),
        )
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or not all(rates.values()):
            raise ValueError("a time or a rate is no number that can be")
        if any(one.error_factor < 1 for one in scores.values()):
            raise ValueError("an error is below the least")
        self._means, self._fixed = OrderedDict(means), OrderedDict(fixed)
        self._fetched = OrderedDict.fromkeys(map(str, document["fetched"]))
        self._fleet_fixed = None if fleet is None else float(fleet)
        self._rates, self._scores = rates, scores

    def _rate(self, rung: StartRung) -> float:
        """Bytes a second; a rung that was never measured is not slower than those below, nor faster than above."""
        known = self._rates.get(rung)
        if known is not None:
            return known
        below = [rate for other, rate in self._rates.items() if other < rung]
        above = [rate for other, rate in self._rates.items() if other > rung]
        return min([max([self._bytes_per_second, *below]), *above])


def _learn(means: OrderedDict[Any, float], key: Any, value: float) -> None:
    means[key] = _mean(means.pop(key, None), value)
    if len(means) > _MOST_MEANS:
        means.popitem(last=False)


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else mean + _NEW_SHARE * (value - mean)
