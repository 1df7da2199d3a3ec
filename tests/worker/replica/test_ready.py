"""Joining what is ready at the same time."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from helios.worker.replica.ready import ReadyTogether


async def test_items_that_need_no_wait_come_together() -> None:
    async def items() -> AsyncIterator[int]:
        yield 1
        yield 2
        await asyncio.sleep(0.01)
        yield 3
        await asyncio.sleep(0)
        yield 4
        yield 5

    assert [batch async for batch in ReadyTogether(items())] == [[1, 2], [3], [4, 5]]


async def test_an_item_is_handed_out_before_the_next_one_is_waited_for() -> None:
    gate = asyncio.Event()

    async def items() -> AsyncIterator[str]:
        yield "now"
        await gate.wait()
        yield "later"

    batches = ReadyTogether(items())
    async with asyncio.timeout(1):
        assert await anext(batches) == ["now"]
        gate.set()
        assert await anext(batches) == ["later"]
        with pytest.raises(StopAsyncIteration):
            await anext(batches)


async def test_a_future_that_is_done_while_the_caller_does_something_else_is_not_lost() -> None:
    future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def items() -> AsyncIterator[str]:
        yield "first"
        yield await future

    batches = ReadyTogether(items())
    assert await anext(batches) == ["first"]
    future.set_result("second")
    await asyncio.sleep(0.01)
    async with asyncio.timeout(1):
        assert await anext(batches) == ["second"]


@pytest.mark.parametrize("waits", [True, False])
async def test_an_error_comes_after_the_items_before_it(waits: bool) -> None:
    async def items() -> AsyncIterator[int]:
        yield 1
        if waits:
            await asyncio.sleep(0)
        raise KeyError("broken")

    batches = ReadyTogether(items())
    assert await anext(batches) == [1]
    with pytest.raises(KeyError):
        await anext(batches)
    with pytest.raises(StopAsyncIteration):
        await anext(batches)


@pytest.mark.parametrize("is_waiting", [False, True], ids=["between items", "while waiting"])
async def test_a_cancel_reaches_the_iterator_which_may_await_while_it_cleans_up(is_waiting: bool) -> None:
    said: list[str] = []
    started = asyncio.Event()

    async def items() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(60)
            yield 2
        except (asyncio.CancelledError, GeneratorExit) as error:
            said.append(type(error).__name__)
            await asyncio.sleep(0.01)
            said.append("cleaned up")
            raise

    async def consume() -> None:
        batches = ReadyTogether(items())
        try:
            assert await anext(batches) == [1]
            started.set()
            if is_waiting:
                await anext(batches)
            else:
                await asyncio.sleep(60)
        finally:
            await batches.aclose()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(consume())
        await started.wait()
        await asyncio.sleep(0.01)
        task.cancel()
    assert said == ["CancelledError", "cleaned up"]


async def test_a_timeout_inside_the_iterator_works_across_batches() -> None:
    async def items() -> AsyncIterator[str]:
        yield "before"
        try:
            async with asyncio.timeout(0.02):
                await asyncio.sleep(60)
        except TimeoutError:
            yield "timed out"

    assert [batch async for batch in ReadyTogether(items())] == [["before"], ["timed out"]]
