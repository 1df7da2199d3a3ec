"""One proxy's part among several: its lease, its end of sessions, and what it serves to others."""

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Final, Self
from uuid import uuid4

import grpc.aio

from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceServicer
from helios.api.proxy.v1.peer_service_pb2_grpc import add_PeerServiceServicer_to_server
from helios.mesh.channel import Dialer
from helios.mesh.identity import IdentityFiles
from helios.mesh.tasks import keep_running
from helios.proxy.peers.calls import PeerCalls
from helios.proxy.peers.forward import SharedAdmin
from helios.proxy.peers.lease import LeaseKeeper
from helios.proxy.peers.link import PeerLink
from helios.proxy.peers.role import Role
from helios.proxy.peers.servicer import PEER_SERVICE, PeerServicer
from helios.proxy.peers.session import FollowerSession
from helios.proxy.runtime import Runtime
from helios.registry.client import LeaseClient

__all__ = ["PEER_SERVICE", "PeerGroup"]

_STOP_SECONDS: Final = 2.0


class PeerGroup:
    """Follows or leads, as the lease says; open it with ``async with`` and `start` it once it can be reached.

    A proxy begins as a follower, without a leader: it holds, and orders nothing.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        registry_target: str,
        identity: IdentityFiles | None,
        proxy_id: str,
        ttl_seconds: float,
        feed_target: str = "",
    ) -> None:
        """``feed_target``: the proxy of which this is a picker process, which never leads; empty: this is no such."""
        runtime.core.leadership.follow(time.monotonic())
        # A channel of its own: what is large on the others is not in the way of a lease.
        self._dialer = Dialer(registry_target, identity=identity, peer="registry")
        self._leadership = runtime.core.leadership
        self._link = PeerLink(runtime)
        self._role = Role(self._leadership, ttl_seconds=ttl_seconds)
        self._keeper = LeaseKeeper(
            self._link, self._role, LeaseClient(self._dialer), holder=proxy_id, ttl_seconds=ttl_seconds
        )
        self._session = FollowerSession(
            self._link,
            self._role,
            identity=identity,
            proxy_id=proxy_id,
            incarnation=uuid4().hex,
            first_address=feed_target,
        )
        self._feed_target = feed_target
        self.calls = PeerCalls(self, identity=identity)
        """Passes calls on to other proxies, while the group is open."""
        self._stack = AsyncExitStack()

    @property
    def leads(self) -> bool:
        """Whether this proxy leads."""
        return self._leadership.epoch > 0 and self._leadership.leads

    def addresses(self) -> list[str]:
        """Where others are reached: of a follower's, the leader; of the leader's, all followers."""
        if self.leads:
            return self._leadership.followers.addresses()
        return [self._role.leader_address] if self._role.leader_address else []

    def share(self, admin: AdminServiceServicer) -> AdminServiceServicer:
        """This proxy's AdminService as one of all proxies; valid while the group is open."""
        return SharedAdmin(admin, self.calls).as_servicer()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Registers the service."""
        add_PeerServiceServicer_to_server(PeerServicer(self._link, self._role), server)

    async def __aenter__(self) -> Self:
        """Opens the way to the registry."""
        await self._stack.enter_async_context(self._dialer)
        await self._stack.enter_async_context(self.calls)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes it."""
        await self._stack.aclose()

    def start(self, group: asyncio.TaskGroup, address: str) -> None:
        """Begins; other proxies reach this one at the address."""
        self._keeper.address = self._session.address = address
        works = {"follow": self._session.run}
        if not self._feed_target:
            works["lease"] = self._keeper.run
        for name, work in works.items():
            task = group.create_task(keep_running(name, work), name=name)
            self._stack.callback(task.cancel)

    async def stop(self) -> None:
        """Gives the lead, and what was promised, back: the next leader need not wait for the lease's end."""
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                self._session.leave()
                await self._keeper.release()
        except TimeoutError:
            pass
