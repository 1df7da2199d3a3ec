"""What every call passes on its way to a handler: who may call, what an error becomes, what can't be read.

Both transports of `helios.mesh.server` ask these interceptors: grpc.aio for each call, `helios.mesh.http2` once for
each method. What they return must therefore not depend on the call.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError

from helios.mesh import status
from helios.mesh.errors import Bug, DeadlineExceeded, HeliosError, InvalidRequest, PermissionDenied
from helios.mesh.identity import SpiffeId

log = structlog.get_logger()

ANY_COMPONENT: Final = "*"
# Component names are spoken for by certificates; without TLS (under Istio's sidecars) nobody can be told apart here.
NO_TLS_COMPONENT: Final = "unauthenticated"

_INSECURE: Final = b"insecure"

Policy = Mapping[str, frozenset[str]]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]
Answer = Callable[[bytes, Any], bytes]
"""Makes the answer of a message at once. The second argument has the caller's `auth_context()`, as grpcio's contexts
do. Raises what handlers raise."""


def peer_component(context: Any, own: SpiffeId | None = None) -> str | None:
    """Returns the component of the caller from its certificate, NO_TLS_COMPONENT without TLS, None where it has
    none.

    With ``own`` also None for a caller of another trust domain or namespace: an authority that signs for several of
    them makes nobody a member of this mesh. Without it, for handlers behind the policy, which has looked at that.
    """
    auth = context.auth_context()
    # grpcio says so of a port without TLS; our own transport says nothing.
    if _INSECURE in auth.get("transport_security_type", (_INSECURE,)):
        return NO_TLS_COMPONENT
    for name in auth.get("x509_subject_alternative_name", ()):
        if name.startswith(b"spiffe://"):
            peer = _spiffe_id(name)
            if peer is None:
                return None
            is_stranger = own is not None and (peer.trust_domain, peer.namespace) != (own.trust_domain, own.namespace)
            return None if is_stranger else peer.component
    return None


@lru_cache(maxsize=256)
def _spiffe_id(name: bytes) -> SpiffeId | None:
    """The id, None where it has another form. Each call asks for its caller's, and callers are few."""
    try:
        return SpiffeId.parse(name.decode("utf-8", "replace"))
    except InvalidRequest:
        return None


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Ends calls that raised: a HeliosError with its own status, anything else as INTERNAL and in the log."""

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        guarded = _rebuild(handler, _guarded(as_coroutine(handler), handler_call_details.method))
        return guarded._replace(request_deserializer=_reader(handler))


class PolicyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses callers whose component the policy does not name for the service."""

    def __init__(self, policy: Policy, *, own: SpiffeId | None) -> None:
        """``own`` is who the server is; None lets everybody in (no TLS)."""
        self._policy = dict(policy)
        self._own = own

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler with the check."""
        handler = await continuation(handler_call_details)
        if handler is None or self._own is None:
            return handler
        service = handler_call_details.method.rpartition("/")[0].lstrip("/")
        allowed = self._policy.get(service, frozenset())
        return _rebuild(handler, _checked(as_coroutine(handler), allowed, service, self._own))


def check_peer(context: Any, allowed: frozenset[str], service: str, own: SpiffeId | None = None) -> None:
    """Raises PermissionDenied unless the caller's component is one of ``allowed``; ``own`` as in peer_component."""
    component = peer_component(context, own)
    if component is not None and (component in allowed or ANY_COMPONENT in allowed):
        return
    raise PermissionDenied(
        f"{component or 'a caller without a SPIFFE id of this mesh'} may not call {service}",
        metadata={"component": component or "", "service": service},
    )


def _checked(behavior: Any, allowed: frozenset[str], service: str, own: SpiffeId) -> Any:
    async def checked(request: Any, context: Any) -> Any:
        check_peer(context, allowed, service, own)
        return await behavior(request, context)

    return checked


@dataclass(frozen=True, slots=True)
class _Unreadable:
    """Stands for a message that could not be parsed until the guard can say so."""

    error: DecodeError


def _reader(handler: Any) -> Any:
    """Returns a deserializer that leaves complaining to the guard.

    gRPC answers what a deserializer raises with UNKNOWN and the exception's text, and logs a traceback: for bytes that
    any client can send, such as a REST path with `%ff` in a name.
    """
    read = handler.request_deserializer
    if read is None:
        return None

    def deserialize(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError as error:
            # A stream's messages are read by the handler, where an exception reaches the guard by itself.
            if handler.request_streaming:
                raise _unreadable() from error
            return _Unreadable(error)

    return deserialize


def _check_readable(request: Any) -> None:
    if isinstance(request, _Unreadable):
        raise _unreadable() from request.error


def _unreadable() -> InvalidRequest:
    return InvalidRequest(
        "the request message can't be parsed: it is no message of this method, or holds invalid UTF-8"
    )


def _guarded(behavior: Any, method: str) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            _check_readable(request)
            return await behavior(request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001 - the interceptor maps every error
            await status.abort(context, as_helios_error(error, method))

    return guarded


def guarded_answer(answer: Answer, method: str) -> Answer:
    """Returns an answer made at once whose every failure is a HeliosError, as a handler's are behind the guard."""

    def guarded(message: bytes, caller: Any) -> bytes:
        try:
            return _checked_bytes(answer(message, caller))
        except DecodeError as error:
            raise _unreadable() from error
        except Exception as error:  # as above: whoever answers at once knows how to send a HeliosError, and no other
            raise as_helios_error(error, method) from error

    return guarded


def _checked_bytes(data: object) -> bytes:
    if not isinstance(data, bytes):
        raise TypeError(f"an answer is bytes, not {type(data).__name__}")
    return data


def as_helios_error(error: Exception, method: str) -> HeliosError:
    """Returns what the caller is told of an exception; one that nobody foresaw is logged with its traceback.

    A group of one stands for that one: a handler's task group wraps what its task raised.
    """
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, HeliosError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        return status.error_from_rpc(error)
    if isinstance(error, TimeoutError):
        return DeadlineExceeded("the server ran out of time; try again or give the call a longer deadline")
    log.error("call failed", method=method, exc_info=error)
    return Bug(f"internal error ({type(error).__name__}); the server's log has the details")


def as_coroutine(handler: Any) -> Any:
    """Returns what a handler does as a coroutine function, whatever its kind.

    A handler of a stream is an async generator, or a coroutine that writes to the context. Here both become the latter,
    so that layers around it cost something once a call, and nothing for a message.
    """
    if not handler.response_streaming:
        return handler.stream_unary if handler.request_streaming else handler.unary_unary
    behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream

    async def stream(request: Any, context: Any) -> None:
        result = behavior(request, context)
        if not hasattr(result, "__aiter__"):
            await result
            return
        async with aclosing(result):
            async for response in result:
                await context.write(response)

    return stream


def _rebuild(handler: Any, behavior: Any) -> Any:
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[handler.request_streaming, handler.response_streaming]
    return make(behavior, handler.request_deserializer, handler.response_serializer)
