"""A part of a key's limit, as a proxy has it that does not lead. Pure.

The leader has reserved in its bucket what it grants here, so whatever is used of it is within the limit, whenever the
leader hears of it. What is granted is good for a bounded time after the leader was last heard (`Validity`): after a
little more than that the leader counts it as used, wherever this proxy is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from helios.proxy.peers.messages import Granted, Spent

# Half of the weight lies on the last second: what is asked for ahead follows the load.
_NEW_SHARE: Final = 0.5
# Of the limit, what is asked for at least where a request waits: a burst has not to ask for each of its requests.
_LEAST_SHARE: Final = 0.05
# Where the leader has not said how long to wait.
_ASK_SECONDS: Final = 0.05


@dataclass(slots=True)
class Validity:
    """Until when what was granted may be used, in monotonic seconds."""

    until: float = 0.0


class Slice:
    """Credit that the leader granted; to requests it looks like a `Bucket`. Times in seconds.

    Invariant: `granted` = free + running + used + returned, none of which is negative.
    """

    def __init__(self, per_minute: int, validity: Validity, on_change: Callable[[], None]) -> None:
        """``on_change`` is called whenever there may be something to report."""
        self.capacity = per_minute
        self._on_change = on_change
        self._validity = validity
        self._granted = Granted()
        self._told_at = 0.0
        self._free = 0
        self._need = 0
        self._asked = 0
        self._used = 0
        self._owed = 0
        self._returned = 0
        self._taken = 0
        self._recent = 0.0

    def reserve(self, amount: int, now: float) -> float:
        """Reserves an amount; returns 0, or in how many seconds to try again: then nothing was reserved.

        What is missing is asked for with the next report.
        """
        if amount <= self._free and now < self._validity.until:
            self._free -= amount
            self._taken += amount
            self._on_change()
            return 0.0
        self._need = max(self._need, amount)
        self._asked = max(self._asked, amount)
        self._on_change()
        return max(_ASK_SECONDS, self._granted.wait_seconds - (now - self._told_at))

    def settle(self, reserved: int, actual: int, now: float) -> None:
        """Ends a reservation."""
        del now
        used = min(reserved, actual)
        self._used += used
        self._owed += actual - used
        self._free += reserved - used
        self._on_change()

    def remaining(self, now: float) -> int:
        """What may be reserved now, here or after asking."""
        return self._free + self._granted.remaining if now < self._validity.until else 0

    def reset_seconds(self, now: float) -> float:
        """When all of the limit is there again, if nothing more is used."""
        return max(0.0, self._granted.reset_seconds - (now - self._told_at))

    @property
    def is_refused(self) -> bool:
        """Whether the leader has said that what is needed will not be there soon."""
        return self._need > self._free and self._granted.wait_seconds > _ASK_SECONDS

    def granted(self, granted: Granted, now: float) -> None:
        """Takes in what the leader says."""
        self._free += granted.granted - self._granted.granted
        self._granted, self._told_at = granted, now
        if self._need <= self._free:
            self._need = 0

    def follow(self) -> None:
        """Gives back what is not used; to be called about every second."""
        # What nobody has asked for since the last time is needed no more.
        self._need, self._asked = (self._asked if self._asked > self._free else 0), 0
        self._recent += _NEW_SHARE * (self._taken - self._recent)
        self._taken = 0
        surplus = self._free - self._need - 2 * self._ahead
        if surplus > 0:
            self._give_back(surplus)

    def reclaim(self) -> None:
        """Gives back what no request waits for: others want it."""
        self._give_back(max(0, self._free - self._need))

    def spent(self) -> Spent:
        """What is to be reported."""
        missing = max(0, min(self._need + self._ahead, self.capacity) - self._free)
        return Spent(self._granted.granted + missing, self._used, self._owed, self._returned)

    @property
    def _ahead(self) -> int:
        """What is kept for requests to come: as much as a second takes."""
        least = round(_LEAST_SHARE * self.capacity) if self._asked else 0
        return max(self._taken, round(self._recent), least)

    def _give_back(self, amount: int) -> None:
        self._free -= amount
        self._returned += amount
        self._on_change()
