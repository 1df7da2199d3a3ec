"""Blocking work off the event loop, and shared work with several waiters.

`BlockingPool.run` returns only when its thread has returned, cancelled or not: a thread can't be stopped, and whoever
cancels must not go on while it still writes. `Flights` runs one piece of work for all who want it and cancels it when
the last one has left.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, ParamSpec, Self, TypeVar

from helios.mesh.tasks import outcome_of

P = ParamSpec("P")
T = TypeVar("T")


class BlockingPool:
    """A bounded pool of threads."""

    def __init__(self, name: str, thread_count: int) -> None:
        self.executor = ThreadPoolExecutor(max_workers=thread_count, thread_name_prefix=name)

    async def run(
        self,
        function: Callable[P, T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        """Runs a function in a thread; a cancelled caller still waits for it to return."""
        return await self.run_cancellable(lambda: function(*args, **kwargs), cancel=lambda: None)

    async def run_cancellable(self, function: Callable[[], T], *, cancel: Callable[[], None]) -> T:
        """Runs a function; `cancel` is called when the caller is cancelled, and should make the function return
        soon.
        """
        future = asyncio.get_running_loop().run_in_executor(self.executor, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            cancel()
            while not future.done():
                try:
                    await asyncio.wait({future})
                except asyncio.CancelledError:
                    continue
            if not future.cancelled():
                future.exception()
            raise

    async def close(self) -> None:
        """Waits for running functions."""
        await asyncio.to_thread(self.executor.shutdown, wait=True, cancel_futures=True)


class Flights(Generic[T]):
    """Work that is shared by key. An async context manager; leaving it cancels what is left."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._group = asyncio.TaskGroup()
        self._flights: dict[str, _Flight[T]] = {}

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        for flight in list(self._flights.values()):
            flight.task.cancel()
        await self._group.__aexit__(None, None, None)

    async def join(self, key: str, work: Callable[[], Awaitable[T]]) -> T:
        """Returns the result of the work under a key, which is started unless it runs already.

        A failure goes to everybody who waits. A caller that is cancelled leaves; the others go on. Once the last one
        has left, the work is cancelled, and its end is waited for.
        """
        while (flight := self._flights.get(key)) is not None and flight.is_abandoned:
            # Work that was cancelled cleans up first: two runs must not overlap.
            await asyncio.wait({flight.task})
        if flight is None:
            flight = _Flight(asyncio.get_running_loop().create_future())
            self._flights[key] = flight
            flight.task = self._group.create_task(_run(flight, work), name=f"{self._name} {key}")
            # A callback, not a `finally` of the task: a task that is cancelled before its first step runs nothing.
            flight.task.add_done_callback(functools.partial(self._end, key, flight))
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.outcome)
        finally:
            flight.waiters -= 1
            if flight.waiters == 0 and not flight.outcome.done():
                flight.is_abandoned = True
                flight.task.cancel()
                await asyncio.wait({flight.task})

    def _end(self, key: str, flight: "_Flight[T]", _: "asyncio.Task[None]") -> None:
        del self._flights[key]
        flight.outcome.cancel()


class _Flight(Generic[T]):
    """One run of some work."""

    task: "asyncio.Task[None]"

    def __init__(self, outcome: "asyncio.Future[T]") -> None:
        self.outcome = outcome
        self.waiters = 0
        self.is_abandoned = False


async def _run(flight: _Flight[T], work: Callable[[], Awaitable[T]]) -> None:
    outcome = await outcome_of(work())
    if isinstance(outcome, Exception):
        flight.outcome.set_exception(outcome)
        # Marked as seen: all waiters may have left in the same turn of the loop.
        flight.outcome.exception()
    else:
        flight.outcome.set_result(outcome)
