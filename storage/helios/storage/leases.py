"""Leases: what keeps a revision on the node while replicas use it.

    granted ──renew, resume──▶ granted (its end moves to now + ttl)
       │ release                  │ now ≥ end
       ▼                          ▼
     ended ◀──────────────────── ended        (nothing leads out of `ended`)

An ended lease is as good as one that never was: whether `expire` has collected it yet makes no difference. Time is
passed in; the caller persists what is returned. A lease id is a capability (whoever knows it can renew and release),
so it is unguessable and stays out of logs and metrics.
"""

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from helios.mesh.errors import InvalidRequest, NotFound

DEFAULT_TTL = timedelta(seconds=60)
"""Long enough for an agent to restart, short enough that a crashed worker frees its revisions soon."""

MIN_TTL = timedelta(seconds=5)
"""A holder renews every third; below this a busy machine's pause would end leases."""

MAX_TTL = timedelta(hours=1)
"""A holder that died keeps bytes on the disk for at most this long."""


@dataclass(frozen=True, slots=True)
class Lease:
    """A promise that a revision stays in a tier until `ends_at`, which is exclusive."""

    id: str
    revision: str
    holder: str
    ttl: timedelta
    ends_at: datetime
    tier: str = ""

    def is_alive(self, now: datetime) -> bool:
        """Whether the promise holds at `now`."""
        return now < self.ends_at


def new_lease_id() -> str:
    """An id of 192 random bits, safe in a URL."""
    return secrets.token_urlsafe(24)


def check_ttl(ttl: timedelta | None) -> timedelta:
    """Returns the time to live, the default for None.

    Raises:
        InvalidRequest: INVALID_TTL, when it is out of bounds.
    """
    if ttl is None:
        return DEFAULT_TTL
    if not MIN_TTL <= ttl <= MAX_TTL:
        raise InvalidRequest(
            f"a lease lives {MIN_TTL.total_seconds():.0f} s to {MAX_TTL.total_seconds():.0f} s from each renewal",
            reason="INVALID_TTL",
            metadata={"ttl_seconds": str(ttl.total_seconds())},
        )
    return ttl


class LeaseTable:
    """All leases of a node. Pure: no clock, no I/O."""

    def __init__(self, leases: Iterable[Lease] = (), *, make_id: Callable[[], str] = new_lease_id) -> None:
        """Starts with leases that were persisted; those that have ended count for nothing."""
        self._leases = {lease.id: lease for lease in leases}
        self._make_id = make_id

    def grant(self, revision: str, *, holder: str, ttl: timedelta | None, now: datetime, tier: str = "") -> Lease:
        """Makes a new lease of a revision where it is.

        Raises:
            InvalidRequest: INVALID_TTL.
        """
        checked = check_ttl(ttl)
        lease = Lease(self._make_id(), revision, holder, ttl=checked, ends_at=now + checked, tier=tier)
        self._leases[lease.id] = lease
        return lease

    def renew(self, lease_id: str, now: datetime) -> Lease:
        """Moves the end to now plus the time to live.

        Raises:
            NotFound: LEASE_NOT_FOUND, when the lease has ended.
        """
        lease = self._alive(lease_id, now)
        renewed = replace(lease, ends_at=now + lease.ttl)
        self._leases[lease_id] = renewed
        return renewed

    def resume(self, lease_id: str, revision: str, *, ttl: timedelta | None, now: datetime) -> Lease:
        """Renews a lease from another stream; a time to live that is given replaces the old one.

        Raises:
            NotFound: LEASE_NOT_FOUND, when the lease has ended or is one of another revision.
            InvalidRequest: INVALID_TTL.
        """
        lease = self._alive(lease_id, now)
        if lease.revision != revision:
            raise _not_found()
        checked = lease.ttl if ttl is None else check_ttl(ttl)
        resumed = replace(lease, ttl=checked, ends_at=now + checked)
        self._leases[lease_id] = resumed
        return resumed

    def find(self, lease_id: str, now: datetime) -> Lease:
        """A lease that lives.

        Raises:
            NotFound: LEASE_NOT_FOUND, when it has ended.
        """
        return self._alive(lease_id, now)

    def release(self, lease_id: str, now: datetime) -> Lease | None:
        """Ends a lease; returns it exactly once, and None when it had ended before."""
        lease = self._leases.get(lease_id)
        if lease is None or not lease.is_alive(now):
            return None
        return self._leases.pop(lease_id)

    def expire(self, now: datetime) -> list[Lease]:
        """Collects leases whose end has come; each is returned exactly once."""
        ended = [lease for lease in self._leases.values() if not lease.is_alive(now)]
        for lease in ended:
            del self._leases[lease.id]
        return ended

    def alive(self, now: datetime) -> list[Lease]:
        """The leases that live at `now`."""
        return [lease for lease in self._leases.values() if lease.is_alive(now)]

    def count_by_revision(self, now: datetime) -> dict[str, int]:
        """How many leases each leased revision has at `now`."""
        counts: dict[str, int] = {}
        for lease in self.alive(now):
            counts[lease.revision] = counts.get(lease.revision, 0) + 1
        return counts

    def revisions_in(self, tier: str, now: datetime) -> set[str]:
        """The revisions that are lent from a tier at `now`."""
        return {lease.revision for lease in self.alive(now) if lease.tier == tier}

    def tiers_of(self, revision: str, now: datetime) -> set[str]:
        """The tiers from which a revision is lent at `now`."""
        return {lease.tier for lease in self.alive(now) if lease.revision == revision}

    def forget_revision(self, revision: str, tier: str) -> list[Lease]:
        """Ends all leases of a revision whose bytes in a tier are lost; returns them."""
        lost = [lease for lease in self._leases.values() if (lease.revision, lease.tier) == (revision, tier)]
        for lease in lost:
            del self._leases[lease.id]
        return lost

    def _alive(self, lease_id: str, now: datetime) -> Lease:
        lease = self._leases.get(lease_id)
        if lease is None or not lease.is_alive(now):
            raise _not_found()
        return lease


def restore(leases: Iterable[Lease], now: datetime) -> list[Lease]:
    """Leases as they stand after a restart: the ended ones are gone, no end lies further away than the time to live.

    The bound matters when the wall clock was set back while the agent was down: a lease must not live for days.
    """
    return [replace(lease, ends_at=min(lease.ends_at, now + lease.ttl)) for lease in leases if lease.is_alive(now)]


def _not_found() -> NotFound:
    return NotFound("the lease has ended, or is one of another revision", reason="LEASE_NOT_FOUND")
