"""Operators' calls that are not this proxy's own: passed on to the leader, or asked of all.

    what changes something, or what only the leader decides     the leader's
    a request's explanation                                     whoever picked it: here first, then elsewhere
    the newest requests                                         all proxies', by their times
    a breaker's reset                                           everybody's, since each proxy has breakers of its own
    the rest                                                    answered here

An operator's call reaches any proxy. A call is passed on once by whoever got it and once by the leader, so that two
that take each other for the leader don't pass it on for ever.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from typing import Any, Final, Protocol, Self, cast

import grpc.aio

from helios.api.admin.v1.admin_service_pb2_grpc import AdminServiceServicer, AdminServiceStub
from helios.mesh.channel import Dialer
from helios.mesh.errors import HeliosError, NotFound, Unavailable
from helios.mesh.identity import IdentityFiles
from helios.mesh.status import error_from_rpc
from helios.proxy.admin.servicer import DEFAULT_PAGE_SIZE

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
_FORWARDED: Final = "x-helios-forwarded"
_MOST_HOPS: Final = 2
_CALL_SECONDS: Final = 10.0
# One that does not answer must not hide what others know.
_LOOK_SECONDS: Final = 2.0


class Others(Protocol):
    """The other proxies, as far as this one knows them."""

    @property
    def leads(self) -> bool:
        """Whether this proxy leads."""
        ...

    def addresses(self) -> list[str]:
        """Where they are reached: of a follower's, the leader; of the leader's, all followers."""
        ...


class SharedAdmin:
    """An AdminService of several proxies, over this one's own. To gRPC it is one; open it with ``async with``."""

    def __init__(self, own: AdminServiceServicer, others: Others, *, identity: IdentityFiles | None) -> None:
        self._own = own
        self._others = others
        self._identity = identity
        self._dialers: dict[str, Dialer] = {}
        self._stack = AsyncExitStack()

    def as_servicer(self) -> AdminServiceServicer:
        """What `add_AdminServiceServicer_to_server` takes: it asks for methods by their names, and nothing else."""
        return cast("AdminServiceServicer", self)

    async def __aenter__(self) -> Self:
        """Nothing is dialled yet."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the channels."""
        await self._stack.aclose()

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
            if self._others.leads:
                return await own(request, context)
            return await self._ask(self._leader(context), name, request, context)

        return call

    def _watch(self, own: Callable[[Any, Any], AsyncIterator[Any]]) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def watch(request: Any, context: Any) -> AsyncIterator[Any]:
            if self._others.leads:
                async for event in own(request, context):
                    yield event
                return
            stub = (await self._dialer(self._leader(context))).stub(AdminServiceStub)
            call = stub.WatchEvents(request, metadata=_hops(context))
            try:
                async for event in call:
                    yield event
            except grpc.aio.AioRpcError as error:
                raise error_from_rpc(error) from error
            finally:
                call.cancel()

        return watch

    def _of_anybody(self, own: Call) -> Call:
        async def call(request: Any, context: Any) -> Any:
            try:
                return await own(request, context)
            except NotFound:
                for address in self._others_of(context):
                    try:
                        return await self._ask(address, _ANYBODYS, request, context, _LOOK_SECONDS)
                    except HeliosError:
                        # It was not there either, or can't be asked.
                        continue
                raise

        return call

    def _of_everybody(self, own: Call) -> Call:
        async def call(request: Any, context: Any) -> Any:
            response = await own(request, context)
            for address in self._others_of(context):
                await self._ask(address, _EVERYBODYS, request, context)
            return response

        return call

    def _merged(self, own: Call) -> Call:
        async def call(request: Any, context: Any) -> Any:
            response = await own(request, context)
            others = list(self._others_of(context)) if not request.page_token else []
            if not others:
                return response
            found = list(response.requests)
            for address in others:
                try:
                    found += (await self._ask(address, _MERGED, request, context, _LOOK_SECONDS)).requests
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

    def _leader(self, context: Any) -> str:
        addresses = self._others_of(context)
        if not addresses:
            raise Unavailable(
                "no proxy leads at the moment, and this is the leader's to do; try again",
                reason="NO_LEADER",
                retry_after_seconds=2,
            )
        return next(iter(addresses))

    def _others_of(self, context: Any) -> Iterable[str]:
        return self._others.addresses() if _hop_count(context) < _MOST_HOPS else []

    async def _ask(self, address: str, name: str, request: Any, context: Any, seconds: float = _CALL_SECONDS) -> Any:
        method = getattr((await self._dialer(address)).stub(AdminServiceStub), name)
        remaining = context.time_remaining()
        timeout = min(seconds, remaining) if remaining is not None else seconds
        try:
            return await method(request, timeout=timeout, metadata=_hops(context))
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error

    async def _dialer(self, address: str) -> Dialer:
        dialer = self._dialers.get(address)
        if dialer is None:
            dialer = Dialer(address, identity=self._identity, peer="proxy")
            self._dialers[address] = await self._stack.enter_async_context(dialer)
        return dialer


def _hop_count(context: Any) -> int:
    metadata = context.invocation_metadata() or ()
    text = next((str(value) for key, value in metadata if key == _FORWARDED), "0")
    return int(text) if text.isdecimal() else _MOST_HOPS


def _hops(context: Any) -> tuple[tuple[str, str], ...]:
    return ((_FORWARDED, str(_hop_count(context) + 1)),)
