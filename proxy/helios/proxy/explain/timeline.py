"""Lays measured stretches of time out on one line. Pure.

Everything that is known of a request is an interval on the proxy's monotonic clock. Laid between a beginning and an
end, the intervals become phases that add up to the whole by construction; time that no interval covers is a phase of
its own, so nothing is ever hidden in a neighbour.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

UNEXPLAINED: Final = "unexplained"
# Below it, a gap is the rounding of clocks and not something to be explained.
_ROUNDING_SECONDS: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time with a name; `begin` and `end` are monotonic seconds."""

    phase: str
    begin: float
    end: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of a whole, in seconds."""

    phase: str
    seconds: float
    reason: str = ""


def lay_out(begin: float, end: float, segments: Iterable[Segment]) -> tuple[Phase, ...]:
    """Returns the phases between `begin` and `end`, in order; they add up to `end - begin`, and none is negative.

    What lies outside is cut off; where two overlap, the one that begins first keeps the time. What nothing covers is
    summed up in one last phase, `unexplained`, together with what a segment of that name says of itself.
    """
    phases: list[Phase] = []
    cursor, uncovered = begin, 0.0
    for segment in sorted(segments, key=lambda segment: segment.begin):
        first, last = max(segment.begin, cursor), min(segment.end, end)
        if last <= first or segment.phase == UNEXPLAINED:
            continue
        uncovered += first - cursor
        phases.append(Phase(segment.phase, last - first, segment.reason))
        cursor = last
    uncovered += max(0.0, end - cursor)
    if uncovered > _ROUNDING_SECONDS:
        phases.append(Phase(UNEXPLAINED, uncovered, "no phase accounts for it"))
    return tuple(phases)


def clip(segments: Iterable[Segment], begin: float, end: float) -> list[Segment]:
    """Cuts segments to a window; those outside of it are left out."""
    return [
        Segment(s.phase, max(s.begin, begin), min(s.end, end), s.reason)
        for s in segments
        if min(s.end, end) > max(s.begin, begin)
    ]
