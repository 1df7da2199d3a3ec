"""The coordinator's seat: a lease in the database, which one registry holds and the others look at."""

from typing import Final

from helios.mesh.errors import Conflict
from helios.registry.coordination.standing import Seat
from helios.registry.leases.lease import Grant, Wish
from helios.registry.leases.store import LeaseStore

LEASE: Final = "agents-coordinator"
"""Name of the lease."""


class Seats:
    """One registry's part in it. Not for several tasks at a time."""

    def __init__(self, leases: LeaseStore, *, holder: str, address: str, ttl_seconds: float) -> None:
        """Takes the registry's name, of this process alone, and where others reach it.

        `address` empty: nowhere, so it never takes the seat. `ttl_seconds`: how long a registry that died keeps it.
        """
        self._leases = leases
        self._wish = Wish(LEASE, holder, ttl_seconds, address)
        self._grant: Grant | None = None

    async def take(self) -> Seat:
        """Keeps the seat, or takes it where it is free; returns whose it is.

        Raises:
            HeliosError: The database does not answer.
        """
        if self._grant is not None:
            try:
                await self._leases.renew(self._grant, self._wish.ttl_seconds)
            except Conflict:
                self._grant = None
            else:
                return Seat(is_mine=True, address=self._wish.address, epoch=self._grant.epoch)
        if not self._wish.address:
            return await self._look()
        is_granted, lease, _ = await self._leases.acquire(self._wish)
        if is_granted:
            self._grant = Grant(LEASE, self._wish.holder, lease.epoch)
        return Seat(is_mine=is_granted, address=lease.address, epoch=lease.epoch)

    async def give_up(self) -> None:
        """Frees the seat where it is this registry's.

        Raises:
            HeliosError: The database does not answer; the seat is free when its time is over.
        """
        grant, self._grant = self._grant, None
        if grant is not None:
            await self._leases.release(grant)

    async def _look(self) -> Seat:
        held = {lease.name: lease for lease, rest_seconds in await self._leases.list() if rest_seconds > 0}
        lease = held.get(LEASE)
        return Seat(is_mine=False, address=lease.address if lease else "", epoch=lease.epoch if lease else 0)
