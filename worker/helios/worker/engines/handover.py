"""From a thread that computes to the event loop that hands out: the one place where the two meet."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from helios.mesh.errors import HeliosError

T = TypeVar("T")


class Handover(Generic[T]):
    """Items of one request on their way from a thread to the loop in which this was made.

    Every method but ``read`` may be called in any thread. What is put after the end, or when the loop is closed because
    the process is about to end, is dropped. Whoever puts items bounds their number.

    Attributes:
        is_cancelled: Set when nobody waits for the items any more; the thread looks at it between two of them.
    """

    def __init__(self) -> None:
        self.is_cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[tuple[T] | HeliosError | None] = asyncio.Queue()

    def put(self, item: T) -> None:
        """Hands an item over."""
        self.call(self._items.put_nowait, (item,))

    def fail(self, error: HeliosError) -> None:
        """Ends the items with an error."""
        self.call(self._items.put_nowait, error)

    def end(self) -> None:
        """Ends the items."""
        self.call(self._items.put_nowait, None)

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Has a function called in the loop."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)

    @property
    def unread_count(self) -> int:
        """Items that nobody has read yet."""
        return self._items.qsize()

    async def read(self) -> tuple[T] | None:
        """Waits for an item, in a tuple of its own; None at the end. Raises what the items failed with."""
        item = await self._items.get()
        if isinstance(item, HeliosError):
            raise item
        return item
