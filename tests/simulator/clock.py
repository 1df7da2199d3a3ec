"""Virtual time: what happens when."""

import heapq
from collections.abc import Callable


class Clock:
    """Events in the order of their times; those of the same moment in the order in which they were set."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count = 0

    def at(self, time: float, then: Callable[[float], None]) -> None:
        """Has something happen at a time, which it is told."""
        self._count += 1
        heapq.heappush(self._events, (time, self._count, then))

    def run_until(self, time: float) -> None:
        """Lets everything happen that is due at this time or before."""
        events = self._events
        while events and events[0][0] <= time:
            now, _, then = heapq.heappop(events)
            then(now)
