"""Operators' calls that are not this proxy's own: passed on to the leader, or asked of all.

    what changes something, or what only the leader decides     the leader's
    a request's explanation                                     whoever picked it: here first, then elsewhere
    the newest requests                                         all proxies', by their times
    a breaker's reset                                           everybody's, since each proxy has breakers of its own
    the rest                                                    answered here

An operator's call reaches any proxy.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, cast

from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceServicer, AdminServiceStub
from helios.mesh.calls import messages_of
from helios.mesh.errors import HeliosError, NotFound, Unavailable
from helios.proxy.admin.servicer import DEFAULT_PAGE_SIZE
from helios.proxy.peers.calls import PeerCalls, hops

Call = Callable[[Any, Any], Awaitable[Any]]

_LEADERS: Final = frozenset(
    {
        "PreloadModel",
        "ScaleModel",
        "EvictModel",
        "StageModel",
        "UnstageModel",
        "SleepReplica",
        "WakeReplica",
        "DrainWorker",
        "ListScalingDecisions",
    }
)
_WATCHED: Final = "WatchEvents"
_ANYBODYS: Final = "ExplainRequest"
_EVERYBODYS: Final = "ResetBreaker"
_MERGED: Final = "ListRequests"
# One that does not answer must not hide what others know.
_LOOK_SECONDS: Final = 2.0
# Proxies that start, or lose their leader, have one within seconds: nobody is to ask again for that.
_ELECTION_SECONDS: Final = 5.0
_ELECTION_LOOK_SECONDS: Final = 0.05


class SharedAdmin:
    """An AdminService of several proxies, over this one's own. To gRPC it is one."""

    def __init__(self, own: AdminServiceServicer, peers: PeerCalls) -> None:
        self._own = own
        self._peers = peers

    def as_servicer(self) -> AdminServiceServicer:
        """What `add_AdminServiceServicer_to_server` takes: it asks for methods by their names, and nothing else."""
        return cast("AdminServiceServicer", self)

    def __getattr__(self, name: str) -> Any:
        """A method of the service, by its name."""
        own = getattr(self._own, name)
        if name in _LEADERS:
            return self._of_leader(name, own)
        ways: dict[str, Callable[[Any], Any]] = {
            _WATCHED: self._watch,
            _ANYBODYS: self._of_anybody,
            _EVERYBODYS: self._of_everybody,
            _MERGED: self._merged,
        }
        return ways[name](own) if name in ways else own

    def _of_leader(self, name: str, own: Call) -> Call:
        async def call(request: Any, context: Any) -> Any:
            leader = await self._leader(context)
            if not leader:
                return await own(request, context)
            return await self._peers.ask(leader, AdminServiceStub, name, request, context)

        return call

    def _watch(self, own: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def watch(request: Any, context: Any) -> AsyncIterator[Any]:
            leader = await self._leader(context)
            if not leader:
                async for event in own(request, context):
                    yield event
                return
            stub = await self._peers.stub(leader, AdminServiceStub)
            async with aclosing(messages_of(stub.WatchEvents(request, metadata=hops(context)))) as events:
                async for event in events:
                    yield event

        return watch

    def _of_anybody(self, own: Call) -> Call:
        async def call(request: Any, context: Any) -> Any:
            try:
                return await own(request, context)
            except NotFound:
                for address in self._peers.addresses(context):
                    try:
                        return await self._peers.ask(
                            address, AdminServiceStub, _ANYBODYS, request, context, seconds=_LOOK_SECONDS
                        )
                    except HeliosError:
                        # It was not there either, or can't be asked.
                        continue
                raise

        return call

    def _of_everybody(self, own: Call) -> Call:
        async def call(request: Any, context: Any) -> Any:
            response = await own(request, context)
            for address in self._peers.addresses(context):
                await self._peers.ask(address, AdminServiceStub, _EVERYBODYS, request, context)
            return response

        return call

    def _merged(self, own: Call) -> Call:
        async def call(request: Any, context: Any) -> Any:
            response = await own(request, context)
            others = self._peers.addresses(context) if not request.page_token else []
            if not others:
                return response
            found = list(response.requests)
            for address in others:
                try:
                    found += (
                        await self._peers.ask(
                            address, AdminServiceStub, _MERGED, request, context, seconds=_LOOK_SECONDS
                        )
                    ).requests
                except HeliosError:
                    # What it knows is not known to anybody else.
                    continue
            # A follower asks the leader, which asks all followers: what is known here comes twice.
            by_id = {summary.request_id: summary for summary in found}
            newest = sorted(by_id.values(), key=lambda summary: summary.arrived_at.ToNanoseconds(), reverse=True)
            del response.requests[:]
            # Pages behind the first would be of one proxy alone.
            response.next_page_token = ""
            response.requests.extend(newest[: request.page_size or DEFAULT_PAGE_SIZE])
            return response

        return call

    async def _leader(self, context: Any) -> str:
        """Where the leader is reached; empty where it is this proxy. Raises Unavailable where none comes for long."""
        deadline = time.monotonic() + _ELECTION_SECONDS
        while not self._peers.leads:
            if addresses := self._peers.addresses(context):
                return addresses[0]
            if time.monotonic() >= deadline:
                raise Unavailable(
                    "no proxy leads at the moment, and this is the leader's to do; try again",
                    reason="NO_LEADER",
                    retry_after_seconds=2,
                )
            await asyncio.sleep(_ELECTION_LOOK_SECONDS)
        return ""
