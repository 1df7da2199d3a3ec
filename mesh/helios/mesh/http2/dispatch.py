"""From a path to its handler, and from what the handler did to the status of its call.

Interceptors of grpc.aio are asked once for each method, not for each call: what they return is a wrapped handler, and
it is kept.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import grpc.aio

from helios.mesh import status
from helios.mesh.errors import InvalidRequest
from helios.mesh.http2.call import Call
from helios.mesh.interceptors import as_coroutine, as_helios_error

Lookup = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Details(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: Any


@dataclass(frozen=True, slots=True)
class _Method:
    handler: Any
    behave: Callable[[Any, Call], Awaitable[Any]]
    """What the handler does, as a coroutine function whatever its kind."""


class Dispatcher:
    """Holds the handlers of a server and runs calls with them."""

    def __init__(self, interceptors: Iterable[grpc.aio.ServerInterceptor]) -> None:
        self._generic: list[grpc.GenericRpcHandler] = []
        self._resolved: dict[str, _Method] = {}
        self._lookup: Lookup = self._find
        for interceptor in reversed(tuple(interceptors)):
            self._lookup = partial(interceptor.intercept_service, self._lookup)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Registers handlers; generated ``add_XServicer_to_server`` functions call this."""
        self._generic.extend(generic_rpc_handlers)

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Generated functions call this with what they gave to ``add_generic_rpc_handlers`` before."""

    async def run(self, call: Call) -> None:
        """Runs a call to its end. Raises nothing but a cancellation."""
        path = call.head.path
        try:
            method = self._resolved.get(path) or await self._resolve(call)
            if method is None:
                call.finish(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
                return
            call.bind(method.handler.request_deserializer, method.handler.response_serializer)
            await _invoke(method, call)
            call.finish(call.code(), call.details())
        except asyncio.CancelledError:
            call.finish(grpc.StatusCode.CANCELLED, "the handler of the call was cancelled")
            raise
        except grpc.aio.AbortError:
            pass
        except Exception as error:  # noqa: BLE001 - it would end the server
            # Interceptors see what handlers raise; this is of what lies around them: no request, an answer above the
            # limit or one that can't be serialized.
            call.finish(*status.ending(as_helios_error(error, path)))

    async def _resolve(self, call: Call) -> _Method | None:
        path = call.head.path
        handler = await self._lookup(_Details(path, call.head.metadata))
        if handler is None:
            return None
        method = self._resolved[path] = _Method(handler, as_coroutine(handler))
        return method

    async def _find(self, details: grpc.HandlerCallDetails) -> Any:
        for generic in self._generic:
            handler = generic.service(details)
            if handler is not None:
                return handler
        return None


async def _invoke(method: _Method, call: Call) -> None:
    request: Any = call
    if not method.handler.request_streaming:
        request = await call.read()
        if request is grpc.aio.EOF:
            raise InvalidRequest("the request has no message")
    response = await method.behave(request, call)
    if not method.handler.response_streaming and call.code() is grpc.StatusCode.OK and not call.is_over:
        await call.write(response)
