"""Who is told of changes: one bounded queue a watcher, and a watcher that can't keep up is sent away.

Changes carry the whole model, so a watcher that starts over loses nothing; waiting for a slow one would let it hold up
every ingest, and dropping changes for it would leave it wrong for ever.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final

from helios.mesh.errors import Draining, HeliosError, Unavailable
from helios.registry.records import ModelChange

DEFAULT_QUEUE_SIZE: Final = 256


class Watcher:
    """The changes for one watcher since it subscribed, in order."""

    def __init__(self, queue_size: int) -> None:
        # One place more than asked for: the error that ends the watch always fits.
        self._queue: asyncio.Queue[ModelChange | HeliosError] = asyncio.Queue(queue_size + 1)
        self._queue_size = queue_size
        self._is_ended = False

    def offer(self, change: ModelChange) -> None:
        """Queues a change; when the queue is full, ends the watch instead."""
        if self._is_ended:
            return
        if self._queue.qsize() >= self._queue_size:
            self.end(_overflow())
        else:
            self._queue.put_nowait(change)

    def end(self, error: HeliosError) -> None:
        """Ends the watch with an error once the changes before it are read."""
        if not self._is_ended:
            self._is_ended = True
            self._queue.put_nowait(error)

    async def changes(self) -> AsyncGenerator[ModelChange, None]:
        """Yields changes until the watch ends. Raises the error it was ended with."""
        while True:
            item = await self._queue.get()
            if isinstance(item, HeliosError):
                raise item
            yield item


class WatchHub:
    """All watchers of a registry."""

    def __init__(self, queue_size: int = DEFAULT_QUEUE_SIZE) -> None:
        self._queue_size = queue_size
        self._watchers: set[Watcher] = set()
        self._is_closed = False
        self._news = asyncio.Event()

    @property
    def watcher_count(self) -> int:
        """How many watch now."""
        return len(self._watchers)

    @contextmanager
    def subscribe(self) -> Iterator[Watcher]:
        """Yields a watcher that gets every change published from now on."""
        watcher = Watcher(self._queue_size)
        if self._is_closed:
            watcher.end(_draining())
        self._watchers.add(watcher)
        try:
            yield watcher
        finally:
            self._watchers.discard(watcher)

    def publish(self, change: ModelChange) -> None:
        """Tells every watcher; never waits."""
        for watcher in self._watchers:
            watcher.offer(change)

    def restart(self) -> None:
        """Ends all watches that run: what they missed is not known any more, and they begin anew."""
        for watcher in self._watchers:
            watcher.end(_overflow())

    def announce(self) -> None:
        """Wakes those who wait for news."""
        self._news.set()
        self._news = asyncio.Event()

    def next_news(self) -> Callable[[], Coroutine[Any, Any, object]]:
        """Returns what waits for news from now on: take it, then look, then wait. Raises Draining at the end."""
        if self._is_closed:
            raise _draining()
        return self._news.wait

    def close(self) -> None:
        """Ends all watches, now and later: the process stops, and watches would never end by themselves."""
        self._is_closed = True
        for watcher in self._watchers:
            watcher.end(_draining())
        self.announce()


def _overflow() -> Unavailable:
    return Unavailable("the watcher is too slow; watch again from the start", reason="WATCH_OVERFLOW")


def _draining() -> Draining:
    return Draining("the registry stops; watch again")
