"""The one way to dial another component: mTLS, keepalive, and a channel that is rebuilt when the leaf is renewed.

grpcio reads a client's certificate once, when the channel is made. A Dialer therefore looks whether the files changed
each time a stub is asked for (at most once a second), makes a new channel when they did, and closes the old one once
its calls have ended, session streams included: grpcio cancels what a channel still carries when it is closed, and a
reader of a cancelled call can't tell that from being cancelled itself.
"""

import asyncio
import os
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final, Protocol, Self, TypeVar

import grpc
import grpc.aio
import structlog

from helios.mesh.errors import Bug
from helios.mesh.identity import IdentityFiles, server_name
from helios.mesh.tasks import task_scope
from helios.mesh.telemetry import client_interceptors

log = structlog.get_logger()
S = TypeVar("S")

_CHECK_SECONDS: Final = 1.0
# A year, for grpcio wants a number: a replaced channel stays as long as one of its streams does.
_OLD_CHANNEL_GRACE_SECONDS: Final = 365 * 86400.0
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", 33 << 20),
    ("grpc.max_send_message_length", 33 << 20),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A component that comes back is met within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name: how long one attempt may take. A busy peer needs more for its handshake than a back-off.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Loopback and unix sockets never go through an HTTP proxy of the environment.
    ("grpc.enable_http_proxy", 0),
)


class StubSource(Protocol):
    """What typed clients need of a channel: a stub for the next call."""

    def stub(self, stub_class: Callable[[grpc.aio.Channel], S]) -> S:
        """Returns a stub that is good for one call."""
        ...


class Dialer:
    """Holds the channel to one component.

    Ask for a stub anew before every call; give every call a timeout. A long stream keeps the channel that it began on.
    ``identity`` None dials without TLS (under a sidecar that adds it).
    """

    def __init__(self, target: str, *, identity: IdentityFiles | None, peer: str) -> None:
        self._target = target
        self._identity = identity
        self._peer = peer
        self._channel: grpc.aio.Channel | None = None
        self._generation = ""
        self._next_check = 0.0
        self._closing: asyncio.TaskGroup | None = None
        self._stack = AsyncExitStack()

    @property
    def target(self) -> str:
        """The address that is dialled."""
        return self._target

    async def __aenter__(self) -> Self:
        """Opens the channel; connecting happens with the first call."""
        async with AsyncExitStack() as stack:
            self._closing = await stack.enter_async_context(task_scope())
            self._channel = self._connect()
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Closes the channel; calls that still run are cancelled."""
        channel, self._channel, self._closing = self._channel, None, None
        if channel is not None:
            await channel.close(None)
        await self._stack.aclose()

    def stub(self, stub_class: Callable[[grpc.aio.Channel], S]) -> S:
        """Returns a stub on a channel with the current certificate."""
        if self._channel is None or self._closing is None:
            raise Bug("the dialer is not open")
        now = time.monotonic()
        if self._identity is not None and now >= self._next_check:
            self._next_check = now + _CHECK_SECONDS
            if os.path.realpath(self._identity.certificate) != self._generation:
                self._renew(self._channel, self._closing)
        return stub_class(self._channel)

    def _renew(self, old: grpc.aio.Channel, closing: asyncio.TaskGroup) -> None:
        try:
            self._channel = self._connect()
        except OSError as error:
            # The leaf in force is good for hours; the next look may find the files whole again.
            log.warning("certificate can't be read", target=self._target, error=str(error))
            return
        closing.create_task(old.close(_OLD_CHANNEL_GRACE_SECONDS), name=f"close {self._target}")

    def _connect(self) -> grpc.aio.Channel:
        if self._identity is None:
            return grpc.aio.insecure_channel(self._target, options=_OPTIONS, interceptors=client_interceptors())
        generation = os.path.realpath(self._identity.certificate)
        pem = self._identity.read()
        self._generation = generation
        credentials = grpc.ssl_channel_credentials(pem.ca, pem.key, pem.certificate)
        # The leaf is checked against the component's name, not against the address that happened to be dialled.
        options = (*_OPTIONS, ("grpc.ssl_target_name_override", server_name(self._peer)))
        return grpc.aio.secure_channel(self._target, credentials, options=options, interceptors=client_interceptors())
