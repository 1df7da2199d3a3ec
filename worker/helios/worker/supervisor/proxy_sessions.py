"""One session with each proxy: those that are named, and those that a DNS name stands for.

A name (``dns:proxies.helios.svc:9000``, a headless service) is resolved again and again: proxies come and go. An
address that a name does not have any more keeps its session as long as that is open, because a resolver that fails, or
a proxy that is not ready for a moment, is no reason to leave one that works.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

import structlog

from helios.mesh.errors import InvalidRequest
from helios.mesh.tasks import task_scope

log = structlog.get_logger()

DNS: Final = "dns:"
# Each session has an outbox and hears of everything; more proxies than that are no gateway's.
MAX_PROXIES: Final = 64


class Session(Protocol):
    """The session with one proxy, over all its streams."""

    @property
    def is_open(self) -> bool:
        """Whether a stream of it works now."""
        ...

    async def run(self) -> None:
        """Dials again and again. Only cancelling ends it."""
        ...


Resolve = Callable[[str, int], Awaitable[frozenset[str]]]
"""Returns the addresses (``ip:port``) that a name has for a port. Raises OSError."""


class ProxySessions:
    """Keeps a session with each proxy until cancelled. None of them waits for another, or for a name."""

    def __init__(
        self,
        targets: Sequence[str],
        open_session: Callable[[str], Session],
        *,
        resolve_seconds: float,
        resolve: "Resolve | None" = None,
    ) -> None:
        """``targets`` are addresses, and names after ``dns:``. Raises InvalidRequest for a name without a port."""
        self._addresses = tuple(target for target in targets if not target.startswith(DNS))
        self._names = tuple(_split(target) for target in targets if target.startswith(DNS))
        self._open = open_session
        self._resolve = resolve or resolve_name
        self._resolve_seconds = resolve_seconds
        self._sessions: dict[str, tuple[Session, asyncio.Task[None]]] = {}

    @property
    def addresses(self) -> frozenset[str]:
        """The proxies that there are sessions with, open or not."""
        return frozenset(self._sessions)

    async def run(self) -> None:
        """Holds the sessions."""
        async with task_scope() as group:
            self._begin(group, frozenset(self._addresses))
            while self._names:
                found, is_whole = await self._look()
                if is_whole:
                    self._end_gone(found)
                self._begin(group, found)
                await asyncio.sleep(self._resolve_seconds)
            await asyncio.Event().wait()

    async def _look(self) -> tuple[frozenset[str], bool]:
        """Returns the proxies that are found, and whether every name could be resolved: else there may be more."""
        found, is_whole = set(self._addresses), True
        for host, port in self._names:
            try:
                async with asyncio.timeout(self._resolve_seconds):
                    found |= await self._resolve(host, port)
            except (OSError, TimeoutError) as error:
                log.warning("proxies can't be resolved", name=host, error=str(error) or "no answer in time")
                is_whole = False
        return frozenset(found), is_whole

    def _begin(self, group: asyncio.TaskGroup, addresses: frozenset[str]) -> None:
        for address in sorted(addresses - self._sessions.keys())[: MAX_PROXIES - len(self._sessions)]:
            session = self._open(address)
            self._sessions[address] = session, group.create_task(session.run(), name=f"fleet session {address}")

    def _end_gone(self, found: frozenset[str]) -> None:
        for address in self._sessions.keys() - found:
            session, task = self._sessions[address]
            if not session.is_open:
                log.info("proxy gone", proxy=address)
                task.cancel()
                del self._sessions[address]


async def resolve_name(host: str, port: int) -> frozenset[str]:
    """Asks the system's resolver, in a thread. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return frozenset(
        f"[{address[0]}]:{port}" if family == socket.AF_INET6 else f"{address[0]}:{port}"
        for family, _, _, _, address in found
    )


def _split(target: str) -> tuple[str, int]:
    host, _, port = target.removeprefix(DNS).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise InvalidRequest(f"proxies: {target!r} is not dns:NAME:PORT", metadata={"proxies": target})
    return host.strip("[]"), int(port)
