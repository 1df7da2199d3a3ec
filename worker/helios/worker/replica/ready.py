"""Joining what is ready at the same time: one message instead of several, at no delay.

Each message costs the same work whatever its size (its frame, a call through the servicer, its parsing by Envoy), and
vLLM yields several events in a row at the start and the end of a stream, and whenever the writer was slower than the
engine. A task that reads ahead would cost a switch for every event; this drives the iterator by hand instead and looks
whether the next item is there before it waits for it.
"""

import asyncio
from collections.abc import AsyncIterator, Generator
from contextlib import suppress
from typing import Any, Final, Generic, Self, TypeVar

T = TypeVar("T")

# Bounds what one message may hold when the reader was away for long.
_BATCH_LIMIT: Final = 256


class ReadyTogether(Generic[T]):
    """Iterates over lists of items that were ready together; each has at least one.

    Close it when it is not read to its end. One task uses it.
    """

    def __init__(self, items: AsyncIterator[T]) -> None:
        self._items = items
        self._step: _Step[T] | None = None
        self._is_ended = False
        self._error: BaseException | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[T]:
        """Waits for one item, then takes what is there. Cancel-safe: a cancel ends the iteration."""
        if self._error is not None:
            error, self._error, self._is_ended = self._error, None, True
            raise error
        if self._is_ended:
            raise StopAsyncIteration
        step, self._step = self._step or _Step(self._items), None
        try:
            batch = [await step]
        except BaseException:
            self._is_ended = True
            raise
        while len(batch) < _BATCH_LIMIT:
            step = _Step(self._items)
            try:
                is_there = step.poll()
            except StopAsyncIteration:
                self._is_ended = True
                break
            except BaseException as error:  # noqa: BLE001  raised by the next call: what came before it is not lost
                self._error = error
                break
            if not is_there:
                self._step = step
                break
            batch.append(step.value)
        return batch

    async def aclose(self) -> None:
        """Cancels what is waited for and closes the iterator."""
        self._is_ended = True
        step, self._step = self._step, None
        if step is not None:
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await step.cancelled()
        close = getattr(self._items, "aclose", None)
        if close is not None:
            await close()


class _Step(Generic[T]):
    """One ``anext`` that can be tried before it is awaited.

    Awaiting runs a coroutine until it yields a future, which the task then waits for. ``poll`` runs it that far;
    ``__await__`` hands the future over later. That is allowed: a future keeps the mark of being awaited until a task
    takes it.
    """

    def __init__(self, items: AsyncIterator[T]) -> None:
        self._steps: Generator[Any, Any, T] = items.__anext__().__await__()
        self._is_started = False
        self._waits_for: Any = None
        self.value: T

    def poll(self) -> bool:
        """Returns whether the item is there, in ``value``. Raises StopAsyncIteration at the iterator's end."""
        self._is_started = True
        try:
            self._waits_for = self._steps.send(None)
        except StopIteration as done:
            self.value = done.value
            return True
        return False

    def __await__(self) -> Generator[Any, Any, T]:
        if not self._is_started and self.poll():
            return self.value
        return (yield from self._drive(self._waits_for))

    async def cancelled(self) -> T:
        """Cancels a step that was polled, and waits until it has cleaned up."""
        try:
            waits_for = self._steps.throw(asyncio.CancelledError())
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]
        return await _Driven(self._drive(waits_for))

    def _drive(self, waits_for: Any) -> Generator[Any, Any, T]:
        while True:
            try:
                try:
                    sent = yield waits_for
                except BaseException as error:  # noqa: BLE001  whatever the task throws belongs to the step
                    waits_for = self._steps.throw(error)
                else:
                    waits_for = self._steps.send(sent)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]


class _Driven(Generic[T]):
    def __init__(self, steps: Generator[Any, Any, T]) -> None:
        self._steps = steps

    def __await__(self) -> Generator[Any, Any, T]:
        return self._steps
