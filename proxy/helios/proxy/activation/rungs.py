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
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from helios.proxy.activation.means import moved_mean

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


@dataclass(slots=True)
class _Measured:
    """What starts have told, in seconds and bytes a second."""

    means: OrderedDict[tuple[str, StartRung], float] = field(default_factory=OrderedDict)
    fixed: OrderedDict[str, float] = field(default_factory=OrderedDict)
    fetched: OrderedDict[str, None] = field(default_factory=OrderedDict)
    fleet_fixed: float | None = None
    rates: dict[StartRung, float] = field(default_factory=dict)
    scores: dict[StartRung, Score] = field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError where that can't have been measured."""
        numbers = [*self.means.values(), *self.fixed.values(), *self.rates.values(), self.fleet_fixed or 0.0]
        if not all(math.isfinite(number) and number >= 0 for number in numbers) or not all(self.rates.values()):
            raise ValueError("a time or a rate is no number that can be")
        if not all(score.count >= 0 and 1 <= score.error_factor < math.inf for score in self.scores.values()):
            raise ValueError("a score is none that can be")
        if not all(isinstance(name, str) for name in (*(model for model, _ in self.means), *self.fixed, *self.fetched)):
            raise ValueError("a name is none")


class RungEstimates:
    """Means by model and rung, bandwidths by rung, and the score of what was promised by them."""

    def __init__(self, *, base_seconds: float, bytes_per_second: float) -> None:
        """Sets the guesses for what was never measured: a start without its weights, and how fast these come."""
        self._base_seconds = base_seconds
        self._bytes_per_second = bytes_per_second
        self._measured = _Measured()

    def expected_seconds(self, model: str, rung: StartRung, weights_bytes: int, known: float | None = None) -> float:
        """How long a start from a rung takes.

        ``known`` is what the model is known to take wherever its weights are, which counts where it was never measured
        here.
        """
        mean = self._measured.means.get((model, rung))
        if mean is not None:
            return mean
        moving = weights_bytes / self._rate(rung)
        if rung is StartRung.ASLEEP:
            return max(_LEAST_SECONDS, moving)
        fixed = self._measured.fixed.get(model)
        if fixed is None and known is not None:
            return known
        if fixed is None:
            fixed = self._base_seconds if self._measured.fleet_fixed is None else self._measured.fleet_fixed
        return fixed + moving

    def record(self, model: str, rung: StartRung, took: Took) -> None:
        """Takes in a start that was measured."""
        _learn(self._measured.means, (model, rung), took.seconds)
        is_moved = took.moved_seconds >= _LEAST_SECONDS and took.weights_bytes
        if is_moved:
            rate = took.weights_bytes / took.moved_seconds
            self._measured.rates[rung] = moved_mean(self._measured.rates.get(rung), rate)
        if rung is not StartRung.ASLEEP:
            fixed = max(0.0, took.seconds - took.moved_seconds)
            _learn(self._measured.fixed, model, fixed)
            self._measured.fetched.pop(took.revision, None)
            self._measured.fetched[took.revision] = None
            if len(self._measured.fetched) > _MOST_MEANS:
                self._measured.fetched.popitem(last=False)
            self._measured.fleet_fixed = moved_mean(self._measured.fleet_fixed, fixed)

    def score(self, rung: StartRung, promised_seconds: float, seconds: float) -> Score:
        """Compares a promise with what came of it; returns the rung's score."""
        factor = max(promised_seconds, _LEAST_SECONDS) / max(seconds, _LEAST_SECONDS)
        error, before = abs(math.log(factor)), self.score_of(rung)
        mean = moved_mean(math.log(before.error_factor) if before.count else None, error)
        self._measured.scores[rung] = Score(before.count + 1, math.exp(mean))
        return self._measured.scores[rung]

    def score_of(self, rung: StartRung) -> Score:
        """How right promises from a rung were; without any, a count of 0."""
        return self._measured.scores.get(rung, Score())

    def was_fetched(self, revision: str) -> bool:
        """Whether a start of the revision ended with its weights on a node's disk, and nobody evicted them."""
        return revision in self._measured.fetched

    def evicted(self, revision: str) -> None:
        """A revision's weights were dropped from all nodes."""
        self._measured.fetched.pop(revision, None)

    def document(self) -> dict[str, Any]:
        """All of it, as `restore` takes it: JSON's types."""
        return {
            "means": [[model, rung.name, seconds] for (model, rung), seconds in self._measured.means.items()],
            "fixed": dict(self._measured.fixed),
            "fetched": list(self._measured.fetched),
            "fleet_fixed": self._measured.fleet_fixed,
            "rates": {rung.name: rate for rung, rate in self._measured.rates.items()},
            "scores": {rung.name: [one.count, one.error_factor] for rung, one in self._measured.scores.items()},
        }

    def restore(self, document: Mapping[str, Any]) -> None:
        """Takes in what an earlier run had measured.

        Raises:
            ValueError: It is no such document; nothing of it is taken in.
        """
        measured = _measured_of(document)
        measured.check()
        self._measured = measured

    def _rate(self, rung: StartRung) -> float:
        """Bytes a second; a rung that was never measured is not slower than those below, nor faster than above."""
        known = self._measured.rates.get(rung)
        if known is not None:
            return known
        below = [rate for other, rate in self._measured.rates.items() if other < rung]
        above = [rate for other, rate in self._measured.rates.items() if other > rung]
        return min([max([self._bytes_per_second, *below]), *above])


def _measured_of(document: Mapping[str, Any]) -> _Measured:
    """Raises ValueError where it is another thing."""
    try:
        means, fleet_fixed = document["means"], document["fleet_fixed"]
        return _Measured(
            means=OrderedDict(((model, StartRung[name]), float(seconds)) for model, name, seconds in means),
            fixed=OrderedDict((model, float(seconds)) for model, seconds in document["fixed"].items()),
            fetched=OrderedDict((revision, None) for revision in document["fetched"]),
            fleet_fixed=None if fleet_fixed is None else float(fleet_fixed),
            rates={StartRung[name]: float(rate) for name, rate in document["rates"].items()},
            scores={StartRung[name]: Score(int(n), float(error)) for name, (n, error) in document["scores"].items()},
        )
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"a part is missing, or another thing: {error!r}") from error


def _learn(means: OrderedDict[Any, float], key: Any, value: float) -> None:
    means[key] = moved_mean(means.pop(key, None), value)
    if len(means) > _MOST_MEANS:
        means.popitem(last=False)
