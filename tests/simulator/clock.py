"""Virtual time: what happens when."""

import heapq
from collections.abc import Callable


class Clock:
    """Events in the order of their times; of the same moment rounds come first, then each in the order of its setting.

    A round is when the core looks at everything, once a second: what happens at that very moment it sees in the next.
    """

    def __init__(self) -> None:
        self._events: list[tuple[float, bool, int, Callable[[float], None]]] = []
        self._count = 0

    def at(self, time: float, then: Callable[[float], None], *, is_round: bool = False) -> None:
        """Has something happen at a time, which it is told."""
        self._count += 1
        heapq.heappush(self._events, (time, not is_round, self._count, then))

    def run_until(self, time: float) -> None:
        """Lets everything happen that is due at this time or before."""
        events = self._events
        while events and events[0][0] <= time:
            now, _, _, then = heapq.heappop(events)
            then(now)
