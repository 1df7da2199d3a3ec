"""The one way to serve gRPC: mTLS with rotation, who-may-call-what, status mapping, health, reflection, graceful drain.

The policy names, for each service, the components that may call it; the peer's component comes from the SPIFFE id in
its certificate, which the transport authenticates but does not look at. A service without an entry is refused to
everybody, so that a forgotten entry fails closed.

Two transports carry the same servicers behind the same interceptors: grpc.aio, and `helios.mesh.http2` for the paths
where each message counts.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, Self, cast

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from helios.mesh.errors import Bug, InvalidRequest
from helios.mesh.http2.limits import Limits
from helios.mesh.http2.server import Http2Server
from helios.mesh.identity import Identity, IdentityFiles
from helios.mesh.interceptors import (
    ANY_COMPONENT,
    NO_TLS_COMPONENT,
    Answer,
    Policy,
    PolicyInterceptor,
    StatusInterceptor,
    check_peer,
    guarded_answer,
    peer_component,
)
from helios.mesh.telemetry import server_interceptors

__all__ = [
    "ANY_COMPONENT",
    "HEALTH_SERVICE",
    "NO_TLS_COMPONENT",
    "REFLECTION_SERVICE",
    "MeshServer",
    "Policy",
    "ServerOptions",
    "check_peer",
    "peer_component",
]

log = structlog.get_logger()

HEALTH_SERVICE: Final = "grpc.health.v1.Health"
REFLECTION_SERVICE: Final = reflection.SERVICE_NAME
_MAX_METADATA_BYTES: Final = 128 << 10


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
    transport: Literal["grpc", "http2"] = "grpc"
    """What carries the calls: grpc.aio, or `helios.mesh.http2`, which costs a fraction for each message of a stream but
    more for each byte of a large one."""
    header_table_bytes: int = 4096
    """Of `http2`; see `helios.mesh.http2.limits.Limits`."""


class Transport(Protocol):
    """What MeshServer needs of a server."""

    async def start(self, listen: str, identity: IdentityFiles | None) -> str:
        """Listens; returns the address. Raises OSError, RuntimeError or ValueError where it can't."""
        ...

    async def stop(self, grace_seconds: float | None) -> None:
        """Takes nothing new, gives running calls ``grace_seconds``, cancels the rest. Idempotent."""
        ...


class MeshServer:
    """A gRPC server of the mesh; open it with ``async with`` after servicers were added to ``grpc``.

    ``grpc`` is what the generated ``add_XServicer_to_server`` functions take, whichever the transport. ``address`` is
    set on entry and is what clients dial. On exit the server drains: health says NOT_SERVING, running calls get
    ``drain_seconds``, then they are cancelled.
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
            policy_check = PolicyInterceptor(rules, own=identity.spiffe_id() if identity is not None else None)
            interceptors = [*server_interceptors(), StatusInterceptor(), policy_check]
        self.grpc: grpc.aio.Server
        self._transport: Transport
        if self._options.transport == "http2":
            limits = Limits(
                max_message_bytes=self._options.max_message_bytes,
                max_header_bytes=_MAX_METADATA_BYTES,
                header_table_bytes=self._options.header_table_bytes,
            )
            http2 = Http2Server(interceptors=interceptors, limits=limits)
            # It has the two methods that registering needs, and is not asked for others.
            self._transport, self.grpc = http2, cast("grpc.aio.Server", http2)
        else:
            self.grpc = grpc.aio.server(interceptors=interceptors, options=_channel_options(self._options))
            self._transport = _GrpcTransport(self.grpc)
        self.address = ""

    def answer_at_once(self, path: str, answer: Answer) -> None:
        """Has a function answer a unary method, without a task and without interceptors: message in, message out.

        It may not wait. ``path`` is the method's ("/package.Service/Method"). Raises Bug: the transport is not http2.
        """
        if not isinstance(self._transport, Http2Server):
            raise Bug("only http2 answers at once")
        self._transport.answers[path] = guarded_answer(answer, path)

    def serve(self, *service_names: str, with_reflection: bool = True) -> None:
        """Names the services that health answers for and that reflection lists. Call it once, before entering."""
        self._services = service_names
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        if with_reflection:
            # reflection.enable_server_reflection would take a server that is not grpc.aio's for a blocking one.
            names = (*service_names, HEALTH_SERVICE, reflection.SERVICE_NAME)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
                reflection.aio.ReflectionServicer(names), self.grpc
            )

    async def __aenter__(self) -> Self:
        """Binds and starts. Raises InvalidRequest where the address is taken or not understood."""
        try:
            self.address = await self._transport.start(self._listen, self._identity)
        except (RuntimeError, OSError, ValueError) as error:
            raise InvalidRequest(
                f"can't listen on {self._listen}: the address is in use or can't be bound; choose another one",
                metadata={"listen": self._listen},
            ) from error
        await self.set_serving(is_serving=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Drains; a drain that was begun before and given up is ended at once."""
        await self.drain(self._options.drain_seconds)
        await self._transport.stop(None)

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
        await self._transport.stop(timeout_seconds)


class _GrpcTransport:
    """grpc.aio's server behind the interface of a transport."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    async def start(self, listen: str, identity: IdentityFiles | None) -> str:
        """Listens; returns the address."""
        if identity is None:
            port = self._server.add_insecure_port(listen)
        else:
            port = self._server.add_secure_port(listen, server_credentials(identity))
        await self._server.start()
        host, separator, _ = listen.rpartition(":")
        return listen if listen.startswith("unix:") or not separator else f"{host}:{port}"

    async def stop(self, grace_seconds: float | None) -> None:
        """Takes nothing new, gives running calls ``grace_seconds``, cancels the rest."""
        await self._server.stop(grace_seconds)


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
