"""PeerService: the leader's end of sessions with followers."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Final

import structlog

from helios.api.proxy.v1 import peer_service_pb2 as pb
from helios.api.proxy.v1.peer_service_pb2_grpc import PeerServiceServicer
from helios.mesh.errors import InvalidRequest, Unavailable
from helios.proxy.peers.link import REPORT_SECONDS, PeerLink
from helios.proxy.peers.messages import Hello
from helios.proxy.peers.role import NOT_LEADING, Role
from helios.proxy.peers.wire import hello_from_proto, news_to_proto, report_from_proto

log = structlog.get_logger()

PEER_SERVICE: Final = "helios.api.proxy.v1.PeerService"
_HELLO_SECONDS: Final = 5.0


class _SessionEnd(Exception):
    """One half of a session has ended."""


class PeerServicer(PeerServiceServicer):
    """Takes followers in, while this proxy leads."""

    def __init__(self, link: PeerLink, role: Role) -> None:
        self._link = link
        self._role = role
        self._leadership = link.runtime.core.leadership

    # A coroutine that writes to the context: see FleetServicer.
    async def Session(  # type: ignore[override]
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: Any
    ) -> None:
        """Serves one follower until its stream ends, or this proxy leads no more."""
        hello = await self._hello(request_iterator)
        self._role.outdone(hello.epoch, time.monotonic())
        self._check_leads()
        session = self._leadership.connect(hello, time.monotonic())
        log.info("proxy follows", proxy=hello.proxy_id)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read(request_iterator, session), name=f"read {session}")
                group.create_task(self._write(context, session), name=f"write {session}")
        except BaseExceptionGroup as group:
            _, others = group.split(_SessionEnd)
            if others is not None:
                raise others.exceptions[0] from None
        finally:
            self._leadership.disconnect(session, time.monotonic())
            self._link.flush()
            log.info("proxy follows no more", proxy=hello.proxy_id)
        self._check_leads()

    async def _hello(self, requests: AsyncIterator[pb.SessionRequest]) -> Hello:
        async with asyncio.timeout(_HELLO_SECONDS):
            first = await anext(requests, None)
        if first is None or first.WhichOneof("message") != "hello" or not first.hello.proxy_id:
            raise InvalidRequest("the first message of a session must be a hello", reason="HELLO_EXPECTED")
        return hello_from_proto(first.hello)

    def _check_leads(self) -> None:
        if not self._leadership.epoch:
            raise Unavailable(
                "this proxy does not lead",
                reason=NOT_LEADING,
                metadata={"leader": self._role.leader_address},
                retry_after_seconds=1,
            )

    async def _read(self, requests: AsyncIterator[pb.SessionRequest], session: str) -> None:
        async for message in requests:
            if not self._leadership.followers.is_connected(session):
                break
            now = time.monotonic()
            match message.WhichOneof("message"):
                case "report":
                    self._leadership.report(session, report_from_proto(message.report), now)
                case "leaving":
                    self._leadership.disconnect(session, now, is_leaving=True)
                case "hello":
                    raise InvalidRequest("a session has one hello", reason="HELLO_EXPECTED")
                case _:
                    pass
            self._link.flush()
        raise _SessionEnd

    async def _write(self, context: Any, session: str) -> None:
        said_at = -REPORT_SECONDS
        while self._leadership.followers.is_connected(session):
            now = time.monotonic()
            news = self._leadership.news(session, now)
            if news.has_content or now - said_at >= REPORT_SECONDS:
                said_at = now
                await context.write(pb.SessionResponse(news=news_to_proto(news)))
            await self._link.happened()
        raise _SessionEnd
