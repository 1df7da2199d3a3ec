"""A follower's end: it dials whoever holds the lease, says what waits here, and hears what becomes of it."""

import asyncio
import random
import time
from typing import Any, Final

import grpc.aio
import structlog

from helios.api.proxy.v1 import peer_service_pb2 as pb
from helios.api.proxy.v1.peer_service_pb2_grpc import PeerServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.errors import HeliosError
from helios.mesh.identity import IdentityFiles
from helios.mesh.requests import StreamRequests
from helios.mesh.status import error_from_rpc
from helios.mesh.tasks import task_scope
from helios.proxy.peers.escrow import VALID_SECONDS
from helios.proxy.peers.link import REPORT_SECONDS, PeerLink
from helios.proxy.peers.messages import Hello
from helios.proxy.peers.role import NOT_LEADING, Role
from helios.proxy.peers.wire import hello_to_proto, news_from_proto, report_to_proto

log = structlog.get_logger()

# Who does not read so many messages is not there; the session begins anew.
_MOST_MESSAGES: Final = 64
# A leader that has just been replaced, or not yet been told that it leads, is asked again after this, on average.
_AGAIN_SECONDS: Final = 0.2


class FollowerSession:
    """Follows whoever leads. `run` must be running."""

    def __init__(
        self,
        link: PeerLink,
        role: Role,
        *,
        identity: IdentityFiles | None,
        proxy_id: str,
        incarnation: str,
        first_address: str = "",
    ) -> None:
        """``first_address``: who knows the leader, where this process does not ask for the lease itself."""
        self._first_address = first_address
        self._link = link
        self._role = role
        self._leadership = link.runtime.core.leadership
        self._identity = identity
        self._proxy_id = proxy_id
        self._incarnation = incarnation
        self._requests: StreamRequests[pb.SessionRequest] | None = None
        self._is_leaving = False
        self.address = ""
        """Where other proxies reach this one."""

    async def run(self) -> None:
        """Follows until cancelled."""
        while True:
            address = self._role.leader_address or self._first_address
            if self._leadership.epoch or not address or self._is_leaving:
                await self._link.happened()
                continue
            try:
                await self._follow(address)
            except (HeliosError, OSError, TimeoutError) as error:
                log.debug("session with the leader ended", leader=address, error=str(error))
                if isinstance(error, HeliosError) and error.reason == NOT_LEADING:
                    self._leadership.released()
                if self._first_address:
                    leader = error.metadata.get("leader", "") if isinstance(error, HeliosError) else ""
                    self._role.leader_address = leader
            await asyncio.sleep(random.uniform(0, 2 * _AGAIN_SECONDS))  # noqa: S311 - no secret

    def leave(self) -> None:
        """Says that this proxy stops. A session that began after that would look like one that broke."""
        self._is_leaving = True
        if self._requests is not None:
            self._requests.put(pb.SessionRequest(leaving=pb.Leaving()))
            self._requests.finish()

    async def _follow(self, address: str) -> None:
        hello = Hello(self._proxy_id, self._incarnation, self._leadership.seen_epoch, self.address)
        requests = StreamRequests(pb.SessionRequest(hello=hello_to_proto(hello)), max_count=_MOST_MESSAGES)
        try:
            async with Dialer(address, identity=self._identity, peer="proxy") as dialer, task_scope() as group:
                call = dialer.stub(PeerServiceStub).Session(requests)
                self._leadership.begin_session(time.monotonic())
                self._requests = requests
                group.create_task(self._report(requests), name=f"report to {address}")
                await self._hear(call)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        finally:
            self._requests = None
            requests.close()

    async def _hear(self, call: Any) -> None:
        """Takes news in until the stream ends, or this proxy leads, or another one than that which speaks.

        Raises TimeoutError where the leader is silent.
        """
        while not self._leadership.epoch:
            async with asyncio.timeout(VALID_SECONDS):
                message = await call.read()
            if message is grpc.aio.EOF:
                return
            if message.WhichOneof("message") == "news":
                if not self._leadership.heard(news_from_proto(message.news), time.monotonic()):
                    # The next session's hello tells it of the later leader.
                    return
                self._link.flush()
                self._link.told()

    async def _report(self, requests: StreamRequests[pb.SessionRequest]) -> None:
        said_at = -REPORT_SECONDS
        while not self._leadership.epoch:
            now = time.monotonic()
            if self._leadership.has_changes() or now - said_at >= REPORT_SECONDS:
                said_at = now
                report = pb.SessionRequest(report=report_to_proto(self._leadership.own_report(now)))
                if not requests.put(report):
                    requests.close()
                    return
            await self._link.happened()
