"""Which registry serves the storage agents, as one of several sees it. Pure; times are of the monotonic clock.

    nobody known, or this one     served here
    another registry              passed on to it; where it does not answer, served here for a while

What is served here although another one is known, or was the coordinator's, is sent away when that changes, to come
back and be led to where it belongs.
"""

from dataclasses import dataclass
from typing import Final

from helios.mesh.errors import Unavailable

ALONE_SECONDS: Final = 15.0
"""How long agents are served here once the coordinator did not answer, before it is tried again."""


@dataclass(frozen=True, slots=True)
class Seat:
    """Who the coordinator is, by the database: this registry, or the one at an address (empty: nobody)."""

    is_mine: bool
    address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Change:
    """What a look at the database means for sessions that run."""

    has_moved: bool
    """Those that are passed on end: their coordinator is one no more."""
    is_sent_away: bool
    """Those that are served here end: they belong elsewhere."""


class Standing:
    """What one registry knows."""

    def __init__(self) -> None:
        self.seat: Seat | None = None
        self._alone_until: float | None = None

    @property
    def is_coordinator(self) -> bool:
        """Whether this registry is the coordinator."""
        return self.seat is not None and self.seat.is_mine

    def saw(self, seat: Seat, now: float) -> Change:
        """Takes what the database says."""
        known, self.seat = self.seat, seat
        is_alone_over = self._alone_until is not None and now >= self._alone_until
        if seat != known or is_alone_over:
            self._alone_until = None
        return Change(seat != known, not seat.is_mine and (seat != known or is_alone_over))

    def unanswered(self, now: float) -> None:
        """The coordinator did not answer."""
        self._alone_until = now + ALONE_SECONDS

    def target(self, now: float, *, is_forwarded: bool) -> str | None:
        """Returns the address of the registry that is to serve somebody, None: this one.

        Raises:
            Unavailable: NOT_COORDINATOR, another registry takes this one for what it is not.
        """
        if is_forwarded:
            if not self.is_coordinator:
                raise Unavailable("this registry is not the agents' coordinator", reason="NOT_COORDINATOR")
            return None
        if self.seat is None or self.seat.is_mine or (self._alone_until is not None and now < self._alone_until):
            return None
        return self.seat.address or None
