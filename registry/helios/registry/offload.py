"""Blocking work off the event loop, in a way that a cancelled caller stops it.

A thread can't be cancelled, and leaving it running would let it write after its ingest was cleaned up. So the work
gets a ``Stop`` that it asks at every buffer, and a cancelled caller waits (milliseconds) until the thread has seen
it.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Stopped(Exception):
    """The work was asked to stop; nobody waits for its result."""


class Stop:
    """A flag that the event loop sets and the working thread reads."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def set(self) -> None:
        """Asks the work to stop."""
        self._event.set()

    def check(self) -> None:
        """Raises Stopped if the work shall stop."""
        if self._event.is_set():
            raise Stopped


async def run(work: Callable[[Stop], T]) -> T:
    """Runs ``work`` in a thread and returns its result.

    Cancel-safe: on cancellation the work is asked to stop and awaited, so nothing of it runs on afterwards.
    """
    stop = Stop()
    future = asyncio.get_running_loop().run_in_executor(None, work, stop)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        stop.set()
        await _settle(future)
        raise


async def uninterrupted(work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` to its end even if the caller is cancelled meanwhile; the cancellation is raised afterwards."""
    # Not a task group's task: it ends before this function does, and its error belongs to this caller alone.
    task = asyncio.get_running_loop().create_task(work, name="uninterrupted")
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _settle(task)
        raise


async def _settle(future: "asyncio.Future[T]") -> None:
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            # A second cancellation changes nothing: the first one is raised once the thread is out of the way.
            continue
    # Read, so that the loop does not report an error that nobody awaited.
    if not future.cancelled():
        future.exception()
