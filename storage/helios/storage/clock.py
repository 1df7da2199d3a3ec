"""The agent's clock: absolute, and never set back while the agent runs.

Leases are persisted with absolute ends, so they need the wall clock; but a wall clock that is set forward would end
every lease at once, and one that is set back would let them live for ever. So the wall clock is read once, at start,
and time goes on from there with the monotonic clock.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

Clock = Callable[[], datetime]


def steady_clock() -> Clock:
    """Returns a function that says what time it is, in UTC."""
    started_at = datetime.now(UTC)
    started = time.monotonic()
    return lambda: started_at + timedelta(seconds=time.monotonic() - started)
