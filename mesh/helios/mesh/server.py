"""The one way to serve gRPC: mTLS with rotation, who-may-call-what, status mapping, health, reflection, graceful drain.

The policy names, for each service, the components that may call it; the peer's component comes from the SPIFFE id in
its certificate, which grpcio authenticates but does not look at. A service without an entry is refused to everybody, so
that a forgotten entry fails closed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

import grpc
import grpc.aio
import structlog
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from helios.mesh import status
from helios.mesh.errors import Bug, DeadlineExceeded, HeliosError, InvalidRequest, PermissionDenied
from helios.mesh.identity import Identity, IdentityFiles, SpiffeId
from helios.mesh.telemetry import server_interceptors

log = structlog.get_logger()

ANY_COMPONENT: Final = "*"
HEALTH_SERVICE: Final = "grpc.health.v1.Health"
REFLECTION_SERVICE: Final = reflection.SERVICE_NAME
# Component names are spoken for by certificates; without TLS (under Istio's sidecars) nobody can be told apart here.
NO_TLS_COMPONENT: Final = "unauthenticated"
_MAX_METADATA_BYTES: Final = 128 << 10

Policy = Mapping[str, frozenset[str]]
Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits of a server."""

    max_message_bytes: int = 33 << 20
    """Largest message in either direction: 32 MiB of request body and room for its frame."""
    drain_seconds: float = 10.0
    """How long calls may go on when the server is closed."""
    intercept: bool = True
    """False leaves the interceptors out: a hot path then checks callers and maps errors by itself."""
    health_components: frozenset[str] = frozenset({ANY_COMPONENT})
    """Who may call health and reflection."""


class MeshServer:
    """A gRPC server of the mesh; open it with ``async with`` after servicers were added to ``grpc``.

    ``address`` is set on entry and is what clients dial. On exit the server drains: health says NOT_SERVING, running
    calls get ``drain_seconds``, then they are cancelled.
    """

    def __init__(
        self,
        *,
        listen: str,
        identity: IdentityFiles | None,
        policy: Policy,
        options: ServerOptions | None = None,
    ) -> None:
        self._listen = listen
        self._identity = identity
        self._options = options or ServerOptions()
        self._health = health.aio.HealthServicer()
        self._services: tuple[str, ...] = ()
        self._is_drained = False
        interceptors: list[grpc.aio.ServerInterceptor] = []
        if self._options.intercept:
            own = {HEALTH_SERVICE, REFLECTION_SERVICE}
            rules = dict(policy) | {name: self._options.health_components for name in own if name not in policy}
            policy_check = PolicyInterceptor(rules, is_enforced=identity is not None)
            interceptors = [*server_interceptors(), StatusInterceptor(), policy_check]
        self.grpc = grpc.aio.server(interceptors=interceptors, options=_channel_options(self._options))
        self.address = ""

    def serve(self, *service_names: str, with_reflection: bool = True) -> None:
        """Names the services that health answers for and that reflection lists. Call it once, before entering."""
        self._services = service_names
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        if with_reflection:
            reflection.enable_server_reflection((*service_names, HEALTH_SERVICE, reflection.SERVICE_NAME), self.grpc)

    async def __aenter__(self) -> Self:
        """Binds and starts. Raises InvalidRequest where the address is taken or not understood."""
        try:
            if self._identity is None:
                port = self.grpc.add_insecure_port(self._listen)
            else:
                port = self.grpc.add_secure_port(self._listen, server_credentials(self._identity))
        except RuntimeError as error:
            raise InvalidRequest(
                f"can't listen on {self._listen}: the address is in use or can't be bound; choose another one",
                metadata={"listen": self._listen},
            ) from error
        host, separator, _ = self._listen.rpartition(":")
        is_unix = self._listen.startswith("unix:")
        self.address = self._listen if is_unix or not separator else f"{host}:{port}"
        await self.grpc.start()
        await self.set_serving(is_serving=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drains; a drain that was begun before and given up is ended at once."""
        await self.drain(self._options.drain_seconds)
        await self.grpc.stop(None)

    async def set_serving(self, *, is_serving: bool) -> None:
        """Sets what health says of every service and of the server as a whole."""
        serving = health_pb2.HealthCheckResponse.ServingStatus
        value = serving.SERVING if is_serving else serving.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, value)

    async def drain(self, timeout_seconds: float) -> None:
        """Takes no new calls, lets running ones end for ``timeout_seconds``, cancels the rest. Idempotent."""
        if self._is_drained:
            return
        self._is_drained = True
        await self.set_serving(is_serving=False)
        await self.grpc.stop(timeout_seconds)


def server_credentials(identity: IdentityFiles) -> grpc.ServerCredentials:
    """Returns credentials that demand a client certificate and follow renewals of the leaf without a restart."""
    held: list[Identity] = [identity.read()]

    def fetch() -> Any:
        # Called at every handshake; None keeps what is in force.
        try:
            fresh = identity.read()
        except OSError as error:
            log.warning("certificate can't be read", directory=str(identity.directory), error=str(error))
            return None
        if fresh == held[0]:
            return None
        held[0] = fresh
        return _certificate_configuration(fresh)

    return grpc.dynamic_ssl_server_credentials(
        _certificate_configuration(held[0]), fetch, require_client_authentication=True
    )


def peer_component(context: Any) -> str | None:
    """Returns the component of the caller from its certificate, NO_TLS_COMPONENT without TLS, None where it has
    none.
    """
    auth = context.auth_context()
    if not auth.get("transport_security_type"):
        return NO_TLS_COMPONENT
    for name in auth.get("x509_subject_alternative_name", ()):
        uri = name.decode("utf-8", "replace")
        if uri.startswith("spiffe://"):
            try:
                return SpiffeId.parse(uri).component
            except InvalidRequest:
                return None
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
        method = handler_call_details.method
        if handler.response_streaming:
            guarded = _rebuild(handler, _guard_stream(_stream_behavior(handler), method))
        else:
            guarded = _rebuild(handler, _guard_unary(_unary_behavior(handler), method))
        return guarded._replace(request_deserializer=_reader(handler))


class PolicyInterceptor(grpc.aio.ServerInterceptor):
    """Refuses callers whose component the policy does not name for the service."""

    def __init__(self, policy: Policy, *, is_enforced: bool) -> None:
        self._policy = dict(policy)
        self._is_enforced = is_enforced

    async def intercept_service(
        self,
        continuation: Continuation,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler with the check."""
        handler = await continuation(handler_call_details)
        if handler is None or not self._is_enforced:
            return handler
        service = handler_call_details.method.rpartition("/")[0].lstrip("/")
        allowed = self._policy.get(service, frozenset())
        if handler.response_streaming:
            return _rebuild(handler, _check_stream(_stream_behavior(handler), allowed, service))
        return _rebuild(handler, _check_unary(_unary_behavior(handler), allowed, service))


def check_peer(context: Any, allowed: frozenset[str], service: str) -> None:
    """Raises PermissionDenied unless the caller's component is one of ``allowed``."""
    component = peer_component(context)
    if component is not None and (component in allowed or ANY_COMPONENT in allowed):
        return
    raise PermissionDenied(
        f"{component or 'a caller without a SPIFFE id'} may not call {service}",
        metadata={"component": component or "", "service": service},
    )


def _check_unary(behavior: Any, allowed: frozenset[str], service: str) -> Any:
    async def checked(request: Any, context: Any) -> Any:
        check_peer(context, allowed, service)
        return await behavior(request, context)

    return checked


def _check_stream(behavior: Any, allowed: frozenset[str], service: str) -> Any:
    async def checked(request: Any, context: Any) -> Any:
        check_peer(context, allowed, service)
        async for response in behavior(request, context):
            yield response

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


def _guard_unary(behavior: Any, method: str) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            _check_readable(request)
            return await behavior(request, context)
        except (grpc.aio.AbortError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001 - the interceptor maps every error
            await status.abort(context, as_helios_error(error, method))

    return guarded


def _guard_stream(behavior: Any, method: str) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        try:
            _check_readable(request)
            async for response in behavior(request, context):
                yield response
        except (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # noqa: BLE001 - the interceptor maps every error
            await status.abort(context, as_helios_error(error, method))

    return guarded


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


def _unary_behavior(handler: Any) -> Any:
    return handler.stream_unary if handler.request_streaming else handler.unary_unary


def _stream_behavior(handler: Any) -> Any:
    behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream

    async def stream(request: Any, context: Any) -> Any:
        # A handler is an async generator, or a coroutine that writes to the context.
        result = behavior(request, context)
        if hasattr(result, "__aiter__"):
            try:
                async for response in result:
                    yield response
            finally:
                await result.aclose()
        else:
            await result

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


def _certificate_configuration(identity: Identity) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(identity.key, identity.certificate)], root_certificates=identity.ca
    )


def _channel_options(options: ServerOptions) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_send_message_length", options.max_message_bytes),
        # Above Envoy's limit for a request's headers (60 KiB). gRPC's own 16 KiB would refuse as RESOURCE_EXHAUSTED, to
        # REST callers 429, what Envoy let pass: many cookies, a long URL.
        ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", _MAX_METADATA_BYTES),
        # SO_REUSEPORT would let two servers share a port by mistake; a taken port must be an error.
        ("grpc.so_reuseport", 0),
        # Envoy and our own clients ping idle connections; without these the server answers with GOAWAY.
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
        ("grpc.keepalive_time_ms", 10_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
