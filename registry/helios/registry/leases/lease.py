"""What becomes of a lease: granted, renewed, ended. Pure; times are microseconds since 1970 by the database's clock.

    nobody's, or past its end   → granted to whoever asks, with an epoch above all before
    held by another             → refused, with who it is
    held by the asker           → granted anew: the process was started again, or missed the answer
    renewed with its epoch      → ends a TTL from now; past its end or with another epoch: lost
    released with its epoch     → nobody's; with another epoch: nothing happens

Invariants: the epoch of a name never falls, and no two grants of it have the same one; at each moment at most one pair
of holder and epoch can be renewed. What a clock does moves only the moment at which a lease passes on: forward, and it
ends early, which its holder learns by its next renewal and everybody else by the higher epoch; back, and it is taken
for granted at that moment, so that a dead holder's lease lasts no more than its TTL longer.
"""

import re
from dataclasses import dataclass, replace
from typing import Final

from helios.mesh.errors import Conflict, InvalidRequest

MIN_TTL_SECONDS: Final = 1.0
"""A registry that pauses for a moment must not lose a lease."""
MAX_TTL_SECONDS: Final = 300.0
"""A holder that died is waited for that long."""
_LAST_EPOCH: Final = (1 << 63) - 1
"""What the column holds."""
_MAX_SEEN_EPOCH: Final = 1 << 62
"""Unless it was granted here: an asker that lies about what it has seen must leave numbers to grant, and after it
everybody else has seen the one that it was granted.
"""
_NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOLDER: Final = re.compile(r"[!-~]{1,128}")
_ADDRESS: Final = re.compile(r"[!-~]{0,256}")


@dataclass(frozen=True, slots=True)
class Lease:
    """A lease as its row has it. ``holder`` empty: nobody's, for the holder before has released it."""

    name: str
    holder: str = ""
    address: str = ""
    epoch: int = 0
    begins_at_us: int = 0
    """When it was granted or renewed last."""
    ends_at_us: int = 0

    def is_held(self, now_us: int) -> bool:
        """Whether somebody may act by it."""
        return bool(self.holder) and now_us < self.ends_at_us

    def rest_seconds(self, now_us: int) -> float:
        """How long it is held for, unless it is renewed."""
        return max(0, self.ends_at_us - now_us) / 1e6 if self.holder else 0.0


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody asks for; the contract's AcquireLeaseRequest says what the fields mean."""

    name: str
    holder: str
    ttl_seconds: float
    address: str = ""
    seen_epoch: int = 0


@dataclass(frozen=True, slots=True)
class Grant:
    """What a holder names its lease by."""

    name: str
    holder: str
    epoch: int


def check_wish(wish: Wish) -> None:
    """Raises InvalidRequest (INVALID_LEASE)."""
    if _NAME.fullmatch(wish.name) is None:
        raise _invalid(f"a name is 1 to 63 lower-case letters, digits and hyphens, not {wish.name[:64]!r}", "name")
    if _HOLDER.fullmatch(wish.holder) is None:
        raise _invalid("a holder is 1 to 128 printable characters", "holder")
    if _ADDRESS.fullmatch(wish.address) is None:
        raise _invalid("an address is at most 256 printable characters", "address")
    if wish.seen_epoch >= _LAST_EPOCH:
        raise _invalid(f"no epoch is above {_LAST_EPOCH}", "seen_epoch")
    check_ttl(wish.ttl_seconds)


def check_ttl(ttl_seconds: float) -> None:
    """Raises InvalidRequest (INVALID_LEASE)."""
    if not MIN_TTL_SECONDS <= ttl_seconds <= MAX_TTL_SECONDS:
        raise _invalid(f"a TTL is {MIN_TTL_SECONDS:g} to {MAX_TTL_SECONDS:g} s, not {ttl_seconds:g}", "ttl")


def acquired(lease: Lease, wish: Wish, now_us: int) -> Lease:
    """Returns the lease after somebody asked for it; it is theirs where its epoch is another one than before.

    Raises InvalidRequest (INVALID_LEASE).
    """
    if wish.seen_epoch > max(lease.epoch, _MAX_SEEN_EPOCH):
        raise _invalid(f"no epoch above {max(lease.epoch, _MAX_SEEN_EPOCH)} was granted", "seen_epoch")
    lease = _on_this_clock(lease, now_us)
    if lease.is_held(now_us) and lease.holder != wish.holder:
        return lease
    return Lease(
        name=wish.name,
        holder=wish.holder,
        address=wish.address,
        epoch=max(lease.epoch, wish.seen_epoch) + 1,
        begins_at_us=now_us,
        ends_at_us=now_us + _us(wish.ttl_seconds),
    )


def renewed(lease: Lease, grant: Grant, ttl_seconds: float, now_us: int) -> Lease:
    """Returns the lease with its new end. Raises Conflict (LEASE_LOST)."""
    lease = _on_this_clock(lease, now_us)
    if not lease.is_held(now_us) or (lease.holder, lease.epoch) != (grant.holder, grant.epoch):
        raise Conflict(
            f"the lease {grant.name!r} is not held with epoch {grant.epoch} any more",
            reason="LEASE_LOST",
            metadata={"holder": lease.holder if lease.is_held(now_us) else "", "epoch": str(lease.epoch)},
        )
    return replace(lease, begins_at_us=now_us, ends_at_us=now_us + _us(ttl_seconds))


def released(lease: Lease, grant: Grant) -> Lease:
    """Returns the lease after its holder has given it back; as it was where that was not its holder."""
    if (lease.holder, lease.epoch) != (grant.holder, grant.epoch):
        return lease
    return Lease(name=lease.name, epoch=lease.epoch)


def _on_this_clock(lease: Lease, now_us: int) -> Lease:
    """Returns a lease of a clock that was set back since as if it had been granted now."""
    if now_us >= lease.begins_at_us:
        return lease
    return replace(lease, begins_at_us=now_us, ends_at_us=now_us + lease.ends_at_us - lease.begins_at_us)


def _us(seconds: float) -> int:
    return round(seconds * 1e6)


def _invalid(message: str, param: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_LEASE", metadata={"param": param})
