"""From a path to its handler, and from what the handler did to the status of its call.

Interceptors of grpc.aio are asked once for each method, not for each call: what they return is a wrapped handler, and
it is kept.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
import grpc.aio
import structlog

from helios.mesh import status
from helios.mesh.errors import HeliosError, InvalidRequest
from helios.mesh.http2.call import Call

log = structlog.get_logger()

Lookup = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class _Details(grpc.HandlerCallDetails):
    method: str
    invocation_metadata: Any


class Dispatcher:
    """Holds the handlers of a server and runs calls with them."""

    def __init__(self, interceptors: Iterable[grpc.aio.ServerInterceptor]) -> None:
        self._generic: list[grpc.GenericRpcHandler] = []
        self._resolved: dict[str, Any] = {}
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
            handler = self._resolved.get(path) or await self._resolve(call)
            if handler is None:
                call.finish(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
                return
            call.bind(handler.request_deserializer, handler.response_serializer)
            await _invoke(handler, call)
            call.finish(call.code(), call.details())
        except asyncio.CancelledError:
            call.finish(grpc.StatusCode.CANCELLED, "the handler of the call was cancelled")
            raise
        except grpc.aio.AbortError:
            pass
        except HeliosError as error:
            call.finish(grpc.StatusCode[error.grpc_code], error.message, status.trailing_metadata(error))
        except Exception as error:
            # A bug in one call must not end the server.
            log.exception("call failed", method=path)
            call.finish(grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}); see the server's log")

    async def _resolve(self, call: Call) -> Any:
        path = call.head.path
        handler = await self._lookup(_Details(path, call.head.metadata))
        if handler is not None:
            self._resolved[path] = handler
        return handler

    async def _find(self, details: grpc.HandlerCallDetails) -> Any:
        for generic in self._generic:
            handler = generic.service(details)
            if handler is not None:
                return handler
        return None


async def _invoke(handler: Any, call: Call) -> None:
    request: Any = call
    if not handler.request_streaming:
        request = await call.read()
        if request is grpc.aio.EOF:
            raise InvalidRequest("the request has no message")
    if not handler.response_streaming:
        behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
        response = await behavior(request, call)
        if call.code() is grpc.StatusCode.OK and not call.is_over:
            await call.write(response)
        return
    result = (handler.stream_stream if handler.request_streaming else handler.unary_stream)(request, call)
    if not hasattr(result, "__aiter__"):
        await result
        return
    async with aclosing(result):
        async for response in result:
            await call.write(response)
