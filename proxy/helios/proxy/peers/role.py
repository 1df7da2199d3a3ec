"""When a proxy asks for the lead, and when it gives it up. Pure; times are monotonic seconds.

| state | event | next |
|---|---|---|
| follows | its promise to a leader is over, and nobody is known to hold the lease | asks |
| follows | granted | leads, in the grant's epoch |
| follows | granted, and has heard a leader since it asked | follows, and gives the lease back |
| leads | a third of the TTL is over | renews |
| leads | the registry can't be asked | leads: workers are fenced, and nobody else can get an epoch |
| leads | the lease ended, and is nobody's | asks anew, and leads on meanwhile |
| leads | the lease is another's, or a higher epoch is heard of by another proxy | follows |
| leads | a worker says that there is a later leader | asks the registry at once, and orders nothing until it has said |
| leads, doubted | the registry can't be asked | follows: it may be cut off, and the other one not |
| leads, doubted | the lease is its own, and most workers know of a higher epoch | asks for one above that |
| leads, doubted | the lease is its own | leads: that worker is wrong |

A follower that hears the leader does not ask, whatever the registry says: an outage of the registry moves no lead.
"""

from __future__ import annotations

import enum
from typing import Final

from helios.proxy.peers.leadership import Leadership

NOT_LEADING: Final = "NOT_LEADING"
"""What a proxy says to those who take it for the leader."""


class Ask(enum.Enum):
    """What is to be asked of the registry."""

    ACQUIRE = 1
    RENEW = 2


class Role:
    """One proxy's part in who leads.

    Invariant: what the registry answered to a question that was asked before a change is not taken for an answer after.
    """

    def __init__(self, leadership: Leadership, *, ttl_seconds: float) -> None:
        self._leadership = leadership
        self._ttl_seconds = ttl_seconds
        self._next_at = 0.0
        self._is_lost = False
        self.leader_address = ""
        """Where the leader listens; empty: this proxy leads, or nobody is known to."""

    def due(self, now: float) -> Ask | None:
        """What is to be asked now."""
        leadership = self._leadership
        if now < self._next_at and leadership.doubted_at is None:
            return None
        if leadership.epoch:
            return Ask.ACQUIRE if self._is_lost else Ask.RENEW
        following = leadership.following
        return Ask.ACQUIRE if following is None or now >= following.promised_until else None

    def granted(self, epoch: int, asked_at: float, now: float) -> bool:
        """The lease is this proxy's, since the question was asked at the latest; returns whether it leads then.

        It does not where it has heard a leader meanwhile, which counts on its promise, or of a later one.
        """
        following = self._leadership.following
        has_promised = following is not None and now < following.promised_until
        if has_promised or epoch < self._leadership.seen_epoch:
            return False
        self.leader_address, self._is_lost = "", False
        self._leadership.lead(epoch, now)
        self.renewed(epoch, asked_at, now)
        return True

    def renewed(self, epoch: int, asked_at: float, now: float) -> None:
        """The lease goes on."""
        if epoch == self._leadership.epoch:
            self._leadership.lease_until = asked_at + self._ttl_seconds
            self._next_at = asked_at + self._ttl_seconds / 3
            self._is_lost = not self._leadership.confirmed(asked_at, now)

    def refused(self, address: str, epoch: int, rest_seconds: float, now: float) -> None:
        """The lease is another's, which listens there; for so long, unless it renews it."""
        self._next_at = now + min(max(rest_seconds, 0.1), self._ttl_seconds / 3)
        if epoch >= max(self._leadership.epoch, self._leadership.seen_epoch):
            self.leader_address = address
        self.outdone(epoch, now)

    def lost(self, epoch: int, holder: str, now: float) -> None:
        """The lease with this epoch has ended; `holder` has it now, or nobody."""
        if epoch != self._leadership.epoch:
            return
        self._leadership.lease_until = 0.0
        self._is_lost, self._next_at = True, now
        if holder:
            self._follow(now)

    def unreachable(self, now: float) -> None:
        """The registry could not be asked."""
        self._next_at = now + self._ttl_seconds / 6
        if self._leadership.doubted_at is not None:
            self._follow(now)

    def outdone(self, epoch: int, now: float) -> None:
        """Somebody has heard of this epoch."""
        self._leadership.outdone(epoch, now)

    def _follow(self, now: float) -> None:
        self._is_lost = False
        self._leadership.follow(now)
