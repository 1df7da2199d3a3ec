"""In which order an engine begins the requests that wait in it: by the hints that travel with them. Pure.

The endpoint picker says of a request its caller's band of priority, how long its answer is likely to be, and which
requests begin like it (its cohort). An engine that served the highest band first would never come to the lowest while
the others keep it busy. So a hint is worth time: a request counts as if it had come so much earlier, or later, and the
order is that of arrival. Nobody waits longer for those of a higher band than the bands are apart.

Hints travel in headers that clients can't set.
"""

from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from helios.mesh.names import COHORT_HEADER, EXPECTED_TOKENS_HEADER, PRIORITY_HEADER

NORMAL_BAND: Final = 2
_BANDS: Final = range(1, 4)
# A request of a higher band overtakes those that came within so long before it.
_BAND_SECONDS: Final = 10.0
# A short answer leaves its place sooner, so it goes first: a thousand tokens count as five seconds.
_SECONDS_PER_TOKEN: Final = 0.005
_MOST_EXPECTED_TOKENS: Final = 2000
# A prompt that begins like one a moment ago finds its blocks in the cache, as long as they are there.
_COHORT_SECONDS: Final = 2.0
_COHORT_LIFE_SECONDS: Final = 30.0
_MOST_COHORTS: Final = 1024

ORDER: Final[ContextVar[int | None]] = ContextVar("helios_order", default=None)
"""Where the current request stands in the engine's queue: lower goes first. None: it is nobody's request."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What is known of a request; 0 tokens and an empty cohort: nothing is."""

    band: int = NORMAL_BAND
    expected_tokens: int = 0
    cohort: str = ""


NO_HINTS: Final = Hints()


def read_hints(metadata: Mapping[str, str]) -> Hints:
    """Reads a call's metadata; what makes no sense says nothing."""
    if PRIORITY_HEADER not in metadata and COHORT_HEADER not in metadata:
        return NO_HINTS
    band = _number(metadata.get(PRIORITY_HEADER, ""))
    return Hints(
        band if band in _BANDS else NORMAL_BAND,
        _number(metadata.get(EXPECTED_TOKENS_HEADER, "")),
        metadata.get(COHORT_HEADER, ""),
    )


class Queueing:
    """Puts requests in order. Times are seconds of a monotonic clock.

    Invariant: what came at `t` goes before all that comes later than `t` plus the sum of what hints are worth.
    """

    def __init__(self) -> None:
        self._cohorts: OrderedDict[str, float] = OrderedDict()

    def order(self, hints: Hints, now: float) -> int:
        """Returns a request's place, in milliseconds; lower goes first."""
        at = now - (hints.band - NORMAL_BAND) * _BAND_SECONDS
        at += min(hints.expected_tokens, _MOST_EXPECTED_TOKENS) * _SECONDS_PER_TOKEN
        if hints.cohort and self._was_here(hints.cohort, now):
            at -= _COHORT_SECONDS
        return round(at * 1000)

    def _was_here(self, cohort: str, now: float) -> bool:
        last = self._cohorts.pop(cohort, None)
        self._cohorts[cohort] = now
        if len(self._cohorts) > _MOST_COHORTS:
            self._cohorts.popitem(last=False)
        return last is not None and now - last < _COHORT_LIFE_SECONDS


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0
