"""The registry's lease: asked for, renewed, given back."""

import asyncio
import time
from contextlib import suppress
from typing import Final, Protocol

import structlog

from helios.mesh.errors import Conflict, HeliosError
from helios.mesh.names import PROXY_LEASE
from helios.proxy.peers.link import PeerLink
from helios.proxy.peers.role import Ask, Role
from helios.registry.client import Grant, LeaseWish, ToldLease

log = structlog.get_logger()

# Times of a lease are seconds; a look costs a microsecond.
_LOOK_SECONDS: Final = 0.1


class Leases(Protocol):
    """Who grants leases. Raises HeliosError; `renew` raises Conflict where the lease is not the asker's any more."""

    async def acquire(self, wish: LeaseWish) -> tuple[bool, ToldLease]:
        """Asks for a lease; whether it was granted, and the lease as it stands."""
        ...

    async def renew(self, grant: Grant, ttl_seconds: float) -> ToldLease:
        """Has it end later."""
        ...

    async def release(self, grant: Grant) -> ToldLease:
        """Ends it."""
        ...


class LeaseKeeper:
    """Keeps a proxy's role in step with the registry. `run` must be running."""

    def __init__(self, link: PeerLink, role: Role, leases: Leases, *, holder: str, ttl_seconds: float) -> None:
        """`holder` is this proxy's name."""
        self._link = link
        self._role = role
        self._leases = leases
        self._leadership = link.runtime.core.leadership
        self._holder = holder
        self._ttl_seconds = ttl_seconds
        self.address = ""
        """Where other proxies reach this one; nothing is asked for before it is known."""

    async def run(self) -> None:
        """Runs until cancelled."""
        while True:
            ask = self._role.due(time.monotonic()) if self.address else None
            if ask is not None:
                epoch, leads = self._leadership.epoch, self._leadership.leads
                await (self._acquire() if ask is Ask.ACQUIRE else self._renew(epoch))
                self._link.flush()
                if (self._leadership.epoch, self._leadership.leads) != (epoch, leads):
                    # Who waits for a leader's word: it is this one, or there is another one.
                    self._link.told()
                if self._leadership.epoch != epoch:
                    log.info("lead", leads=self._leadership.leads, epoch=self._leadership.epoch, before=epoch)
            await asyncio.sleep(_LOOK_SECONDS)

    async def release(self) -> None:
        """Gives the lead back, so that the next one need not wait for the lease's end."""
        self.address = ""
        if self._leadership.epoch:
            epoch = self._leadership.epoch
            # Whoever leads next may do so from the next moment on.
            self._leadership.follow(time.monotonic())
            self._link.look()
            await self._give_back(epoch)

    async def _give_back(self, epoch: int) -> None:
        with suppress(HeliosError):
            await self._leases.release(Grant(PROXY_LEASE, self._holder, epoch))

    async def _acquire(self) -> None:
        asked_at = time.monotonic()
        seen_epoch = self._leadership.believed_epoch
        wish = LeaseWish(PROXY_LEASE, self._holder, self._ttl_seconds, self.address, seen_epoch)
        try:
            is_granted, lease = await self._leases.acquire(wish)
        except HeliosError as error:
            log.debug("lease can't be asked for", error=error.message)
            self._role.unreachable(time.monotonic())
            return
        if not is_granted:
            self._role.refused(lease.address, lease.epoch, lease.rest_seconds, time.monotonic())
            return
        is_stopping = not self.address
        if is_stopping or not self._role.granted(lease.epoch, asked_at, time.monotonic()):
            await self._give_back(lease.epoch)

    async def _renew(self, epoch: int) -> None:
        asked_at = time.monotonic()
        try:
            await self._leases.renew(Grant(PROXY_LEASE, self._holder, epoch), self._ttl_seconds)
        except Conflict as error:
            log.warning("lease lost", epoch=epoch, holder=error.metadata.get("holder", ""))
            self._role.lost(epoch, error.metadata.get("holder", ""), time.monotonic())
        except HeliosError as error:
            log.warning("lease can't be renewed", epoch=epoch, error=error.message)
            self._role.unreachable(time.monotonic())
        else:
            self._role.renewed(epoch, asked_at, time.monotonic())
