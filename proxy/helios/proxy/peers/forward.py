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
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Final, cast

from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceServicer, AdminServiceStub
from helios.mesh.calls import messages_of
from helios.mesh.errors import HeliosError, NotFound, Unavailable
from helios.mesh.tasks import outcome_of, task_scope
from helios.proxy.admin.servicer import DEFAULT_PAGE_SIZE
from helios.proxy.peers.calls import CALL_SECONDS, PeerCalls, hops

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
                async with aclosing(self._answers(_ANYBODYS, request, context, _look_seconds(context))) as answers:
                    async for answer in answers:
                        # Else it was not there either, or can't be asked.
                        if not isinstance(answer, HeliosError):
                            return answer
                raise

        return call

    def _of_everybody(self, own: Call) -> Call:
        async def call(request: Any, context: Any) -> Any:
            response = await own(request, context)
            answers = [answer async for answer in self._answers(_EVERYBODYS, request, context)]
            # One that can't be asked is told of, once the others have done it.
            for answer in answers:
                if isinstance(answer, HeliosError):
                    raise answer
            return response

        return call

    def _merged(self, own: Call) -> Call:
        async def call(request: Any, context: Any) -> Any:
            response = await own(request, context)
            if request.page_token or not self._peers.addresses(context):
                return response
            found = list(response.requests)
            async for answer in self._answers(_MERGED, request, context, _look_seconds(context)):
                # What one knows that can't be asked is not known to anybody else.
                if not isinstance(answer, HeliosError):
                    found += answer.requests
            # A follower asks the leader, which asks all followers: what is known here comes twice.
            by_id = {summary.request_id: summary for summary in found}
            newest = sorted(by_id.values(), key=lambda summary: summary.arrived_at.ToNanoseconds(), reverse=True)
            del response.requests[:]
            # Pages behind the first would be of one proxy alone.
            response.next_page_token = ""
            response.requests.extend(newest[: request.page_size or DEFAULT_PAGE_SIZE])
            return response

        return call

    async def _answers(
        self, name: str, request: Any, context: Any, seconds: float = CALL_SECONDS
    ) -> AsyncGenerator[Any, None]:
        """What others answer, or a HeliosError, as it comes: all are asked at once, so one that hangs delays nobody."""
        async with task_scope() as group:
            calls = [
                group.create_task(
                    outcome_of(self._peers.ask(address, AdminServiceStub, name, request, context, seconds=seconds)),
                    name=f"{name} at {address}",
                )
                for address in self._peers.addresses(context)
            ]
            for call in asyncio.as_completed(calls):
                answer = await call
                if isinstance(answer, Exception) and not isinstance(answer, HeliosError):
                    raise answer
                yield answer

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


def _look_seconds(context: Any) -> float:
    """How long others are asked for what they know: whoever asks for another proxy answers before that one gives up."""
    remaining = context.time_remaining()
    return min(_LOOK_SECONDS, remaining / 2) if remaining is not None else _LOOK_SECONDS
