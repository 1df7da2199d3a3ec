"""The server: it listens, keeps its connections, and ends in order."""

import asyncio
import ssl
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Final

import grpc.aio

from helios.mesh.errors import Bug
from helios.mesh.http2.call import Call
from helios.mesh.http2.connection import Connection
from helios.mesh.http2.dispatch import Dispatcher
from helios.mesh.http2.limits import Limits
from helios.mesh.http2.tls import ServerTls
from helios.mesh.identity import IdentityFiles
from helios.mesh.interceptors import Answer
from helios.mesh.tasks import task_scope

_BACKLOG: Final = 1024
# After the last word a peer has this long to say goodbye; then its socket is closed anyway.
_GOODBYE_SECONDS: Final = 1.0


class Http2Server(Dispatcher):
    """Serves gRPC. ``start`` once, ``stop`` at the end, both on the loop that serves."""

    def __init__(
        self, *, interceptors: Iterable[grpc.aio.ServerInterceptor] = (), limits: Limits | None = None
    ) -> None:
        super().__init__(interceptors)
        self.is_draining = False
        self.answers: dict[str, Answer] = {}
        self._limits = limits or Limits()
        self._connections: set[Connection] = set()
        self._is_empty = asyncio.Event()
        self._is_empty.set()
        self._listener: asyncio.Server | None = None
        self._tasks: asyncio.TaskGroup | None = None
        self._stack = AsyncExitStack()

    async def start(self, listen: str, identity: IdentityFiles | None) -> str:
        """Listens on "host:port" or "unix:/path"; returns the address, with the port that was given.

        Raises:
            OSError: The address is taken or can't be bound, or the certificate can't be read.
            ValueError: The address is not understood.
        """
        context = None if identity is None else ServerTls(identity).context
        self._tasks = await self._stack.enter_async_context(task_scope())
        try:
            return await self._listen(listen, context)
        except BaseException:
            await self._stack.aclose()
            raise

    async def stop(self, grace_seconds: float | None) -> None:
        """Takes nothing new, lets calls run for ``grace_seconds`` (None: not at all), ends the rest. Idempotent, and
        may be called again with less patience after a first try was cancelled.
        """
        self.is_draining = True
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            connection.drain()
        if not await self._wait_empty(grace_seconds or 0.0):
            for connection in tuple(self._connections):
                connection.end()
            if not await self._wait_empty(_GOODBYE_SECONDS):
                for connection in tuple(self._connections):
                    connection.abort()
        await self._stack.aclose()

    # What connections say (Host).

    def opened(self, connection: Connection) -> None:
        """A connection stands."""
        self._connections.add(connection)
        self._is_empty.clear()

    def start_call(self, call: Call) -> asyncio.Task[None]:
        """Runs a call in a task of its own."""
        if self._tasks is None:
            raise Bug("the server does not run")
        return self._tasks.create_task(self.run(call), name=call.head.path)

    def closed(self, connection: Connection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)
        if not self._connections:
            self._is_empty.set()

    async def _listen(self, listen: str, context: ssl.SSLContext | None) -> str:
        loop = asyncio.get_running_loop()
        limits = self._limits
        # asyncio takes times for TLS only together with TLS.
        handshake_seconds = limits.handshake_seconds if context is not None else None
        shutdown_seconds = _GOODBYE_SECONDS if context is not None else None
        if listen.startswith("unix:"):
            path = listen.removeprefix("unix:")
            self._listener = await loop.create_unix_server(
                self._accept,
                "/" + path.lstrip("/") if path.startswith("//") else path,
                backlog=_BACKLOG,
                ssl=context,
                ssl_handshake_timeout=handshake_seconds,
                ssl_shutdown_timeout=shutdown_seconds,
            )
            return listen
        host, _, port = listen.rpartition(":")
        self._listener = await loop.create_server(
            self._accept,
            host.strip("[]"),
            int(port),
            backlog=_BACKLOG,
            # Two servers at one port would be a mistake that nobody hears of.
            reuse_port=False,
            ssl=context,
            ssl_handshake_timeout=handshake_seconds,
            ssl_shutdown_timeout=shutdown_seconds,
        )
        return f"{host}:{self._listener.sockets[0].getsockname()[1]}"

    def _accept(self) -> Connection:
        return Connection(self, self._limits)

    async def _wait_empty(self, timeout_seconds: float) -> bool:
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._is_empty.wait()
        except TimeoutError:
            return False
        return True
