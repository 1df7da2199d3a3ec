"""What a client says in one stream, for grpcio to iterate over.

grpcio pulls the next message when it has written the last one, so what a server does not read stays here, and the bound
says so. An iterator rather than `write` calls: with client interceptors, grpcio keeps a task for good for every stream
that the server ended while nothing was being written.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, Self, TypeVar

M = TypeVar("M")


class StreamRequests(Generic[M]):
    """Messages in order; a heartbeat, from `beat` on, where there is nothing else.

    `close` or `finish` ends it, and one of them must be called. Used on one event loop.
    """

    def __init__(self, *first: M, max_count: int) -> None:
        """Takes what is said first, and how many messages may wait."""
        self._messages = deque(first)
        self._max_count = max_count
        self._heartbeat: Callable[[], M] | None = None
        self._heartbeat_seconds: float | None = None
        self._changed = asyncio.Event()
        self._is_finished = False
        self._is_closed = False

    def beat(self, seconds: float, make: Callable[[], M]) -> None:
        """Says something at least this often."""
        self._heartbeat, self._heartbeat_seconds = make, seconds
        self._changed.set()

    def put(self, message: M) -> bool:
        """Adds a message; returns False where the server has too much to read already."""
        if len(self._messages) >= self._max_count:
            return False
        self._messages.append(message)
        self._changed.set()
        return True

    def finish(self) -> None:
        """Ends the iteration once everything was said. Idempotent."""
        self._is_finished = True
        self._changed.set()

    def close(self) -> None:
        """Ends the iteration at once, also while it waits; what was not said is dropped. Idempotent."""
        self._is_closed = True
        self._changed.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> M:
        """Waits for the next message. Cancel-safe: what was not returned is returned next time."""
        while not self._is_closed:
            if self._messages:
                return self._messages.popleft()
            if self._is_finished:
                break
            self._changed.clear()
            try:
                async with asyncio.timeout(self._heartbeat_seconds):
                    await self._changed.wait()
            except TimeoutError:
                assert self._heartbeat is not None, "only a heartbeat has a time"
                return self._heartbeat()
        raise StopAsyncIteration
