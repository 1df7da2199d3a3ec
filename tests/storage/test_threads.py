"""Shared work and blocking work under cancellation."""

import asyncio
import threading

import pytest

from helios.storage.threads import BlockingPool, Flights


async def test_work_is_done_once_for_all_who_want_it() -> None:
    runs = 0
    go = asyncio.Event()

    async def work() -> int:
        nonlocal runs
        runs += 1
        await go.wait()
        return 7

    async with Flights[int]("t") as flights, asyncio.TaskGroup() as group:
        tasks = [group.create_task(flights.join("k", work), name="join") for _ in range(5)]
        await asyncio.sleep(0.01)
        tasks[0].cancel()
        go.set()
        assert [await task for task in tasks[1:]] == [7] * 4
        assert tasks[0].cancelled()
        assert runs == 1


async def test_a_failure_goes_to_all_and_the_next_one_tries_again() -> None:
    async def fail() -> int:
        await asyncio.sleep(0.01)
        raise OSError("once")

    async def succeed() -> int:
        return 1

    async with Flights[int]("t") as flights:

        async def outcome() -> str:
            with pytest.raises(OSError, match="once") as raised:
                await flights.join("k", fail)
            return str(raised.value)

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(outcome(), name="join") for _ in range(3)]
        assert [task.result() for task in tasks] == ["once"] * 3
        assert await flights.join("k", succeed) == 1


async def test_work_that_everybody_left_ends_before_it_is_begun_again() -> None:
    running = peak = 0

    async def work() -> int:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        try:
            await asyncio.sleep(0.05)
        finally:
            # Cleaning up takes time.
            await asyncio.sleep(0.02)
            running -= 1
        return 1

    async with Flights[int]("t") as flights, asyncio.TaskGroup() as group:
        first = group.create_task(flights.join("k", work), name="first")
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.sleep(0)
        assert await flights.join("k", work) == 1
        assert peak == 1


async def test_a_flight_that_is_left_before_it_starts_can_be_begun_again() -> None:
    async def work() -> int:
        return 1

    async with Flights[int]("t") as flights, asyncio.TaskGroup() as group:
        first = group.create_task(flights.join("k", work), name="first")
        await asyncio.sleep(0)
        first.cancel()
        async with asyncio.timeout(5):
            assert await flights.join("k", work) == 1


async def test_a_cancelled_caller_waits_for_its_thread() -> None:
    pool = BlockingPool("t", 1)
    released, done = threading.Event(), threading.Event()

    def work() -> None:
        released.wait(10)
        done.set()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(pool.run_cancellable(work, cancel=released.set), name="work")
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done.is_set()
    await pool.close()
