"""The same for many things, several at a time."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def each(things: Iterable[T], work: Callable[[T], Awaitable[None]], *, at_once: int) -> None:
    """Does something with each thing, in their order, so many at a time; the first failure ends the others.

    Raises:
        Exception: The first failure, as it was raised.
    """
    free = asyncio.Semaphore(at_once)

    async def one(thing: T) -> None:
        async with free:
            await work(thing)

    try:
        async with asyncio.TaskGroup() as group:
            for thing in things:
                group.create_task(one(thing), name=f"each of {thing}"[:80])
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures
