"""What this node says in one session, for grpcio to iterate over.

grpcio pulls the next message when it has written the last one, so what a registry does not read stays here, and the
bound ends the session. An iterator rather than `write` calls: with client interceptors, grpcio keeps a task for good
for every stream that the server ended while nothing was being written.
"""

import asyncio
from collections import deque
from typing import Final, Self

from helios.api.registry.v1 import sync_service_pb2 as pb

_MAX_MESSAGES: Final = 4_096
"""More than all fetches of a node say in a minute."""


class SessionRequests:
    """The requests of one session; a heartbeat where there is nothing else. `close` ends it, and must be called."""

    def __init__(self, hello: pb.AgentHello) -> None:
        self._messages = deque([pb.SessionRequest(hello=hello)])
        self._heartbeat_seconds: float | None = None
        self._changed = asyncio.Event()
        self._is_closed = False

    def begin(self, heartbeat_seconds: float) -> None:
        """Says at least a heartbeat, at the pace that the registry asked for."""
        self._heartbeat_seconds = heartbeat_seconds
        self._changed.set()

    def put(self, message: pb.SessionRequest) -> bool:
        """Adds a message; returns False where the registry has too much to read already."""
        if len(self._messages) >= _MAX_MESSAGES:
            return False
        self._messages.append(message)
        self._changed.set()
        return True

    def close(self) -> None:
        """Ends the iteration, also while it waits. Idempotent."""
        self._is_closed = True
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pb.SessionRequest:
        """Waits for the next message. Cancel-safe: what was not returned is returned next time."""
        while not self._is_closed:
            if self._messages:
                return self._messages.popleft()
            self._changed.clear()
            try:
                async with asyncio.timeout(self._heartbeat_seconds):
                    await self._changed.wait()
            except TimeoutError:
                return pb.SessionRequest(heartbeat=pb.SyncHeartbeat())
        raise StopAsyncIteration
