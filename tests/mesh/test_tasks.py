"""keep_running comes back after what may pass, and not after a bug; a scope ends its tasks and loses nothing."""

import asyncio
import contextlib

import grpc.aio
import pytest

from helios.mesh.errors import DeadlineExceeded, HeliosError, NotFound, Unavailable
from helios.mesh.tasks import keep_running, outcome_of, retried, task_scope


async def test_runs_again_after_recoverable_errors() -> None:
    runs = 0

    async def flaky() -> None:
        nonlocal runs
        runs += 1
        if runs < 4:
            raise Unavailable("not yet")
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(2):
            await keep_running("flaky", flaky, base_seconds=0.001, cap_seconds=0.01)
    assert runs == 4


async def test_a_bug_ends_it() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(2):
            await keep_running("broken", broken)


async def test_runs_again_when_what_it_awaited_was_cancelled() -> None:
    runs = 0

    async def session() -> None:
        nonlocal runs
        runs += 1
        call = asyncio.get_running_loop().create_future()
        if runs < 3:
            call.cancel()
        await call

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await keep_running("session", session, base_seconds=0.001, cap_seconds=0.01)
    assert runs == 3


def failed_call() -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "no such file")


@pytest.mark.parametrize("is_told", [False, True])
async def test_a_cancellation_that_a_call_swallowed_ends_it(is_told: bool) -> None:
    async def swallow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if is_told:
                raise Unavailable("away") from failed_call()
            raise failed_call() from None

    async with task_scope() as group:
        task = group.create_task(keep_running("swallower", swallow, base_seconds=0.001))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert task.cancelled()


async def test_a_cancellation_hides_no_bug() -> None:
    async def fail() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise KeyError("a bug")

    async with task_scope() as group:
        task = group.create_task(outcome_of(keep_running("failing", fail)))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task], timeout=5)
        assert isinstance(task.result(), KeyError)


async def test_a_group_of_tasks_that_failed_is_no_cancellation() -> None:
    runs = 0

    async def fail() -> None:
        await asyncio.sleep(0)
        raise Unavailable("away")

    async def chore() -> None:
        nonlocal runs
        runs += 1
        with contextlib.suppress(ExceptionGroup):
            # It fails while it is waited for, for which Python 3.11 cancels who waits, and does not take that back.
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())

    async with task_scope() as group:
        group.create_task(keep_running("chore", chore, base_seconds=0.001))
        async with asyncio.timeout(5):
            while runs < 3:
                await asyncio.sleep(0.001)


async def test_a_timeout_of_the_work_itself_is_not_told_as_its_time_being_over() -> None:
    async def late() -> None:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        await retried(late, within_seconds=5)


async def test_work_that_swallows_its_cancellation_is_not_run_again() -> None:
    runs = 0

    async def swallow() -> None:
        nonlocal runs
        runs += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise Unavailable("away") from None

    with pytest.raises(Unavailable, match="away"):
        await retried(swallow, within_seconds=0.1)
    assert runs == 1


@pytest.mark.parametrize(("error", "is_run_again"), [(Unavailable("away"), True), (NotFound("none"), False)])
async def test_what_may_pass_is_run_again_until_its_time_is_over(error: HeliosError, is_run_again: bool) -> None:
    runs = 0

    async def refused() -> None:
        nonlocal runs
        runs += 1
        raise error

    with pytest.raises(type(error)) as raised:
        async with asyncio.timeout(5):
            await retried(refused, within_seconds=0.5)
    assert raised.value is error
    assert (runs > 1) is is_run_again


@pytest.mark.parametrize("error", [None, Unavailable("away")])
async def test_what_hangs_is_given_up_when_its_time_is_over(error: HeliosError | None) -> None:
    async def hang() -> None:
        nonlocal error
        if error is not None:
            before, error = error, None
            raise before
        await asyncio.sleep(60)

    expected = error or DeadlineExceeded("")
    with pytest.raises(type(expected)):
        async with asyncio.timeout(5):
            await retried(hang, within_seconds=0.5)


async def test_a_scope_cancels_its_tasks_when_its_body_ends() -> None:
    async with task_scope() as group:
        task = group.create_task(asyncio.sleep(60), name="sleeper")
    assert task.cancelled()


async def test_a_scope_raises_what_its_body_raised() -> None:
    error = ExceptionGroup("of the body", [Unavailable("no")])
    with pytest.raises(ExceptionGroup) as caught:
        async with task_scope():
            raise error
    assert caught.value is error


@pytest.mark.parametrize("is_failing", [False, True])
async def test_a_scope_keeps_a_cancellation_that_comes_while_its_tasks_end(*, is_failing: bool) -> None:
    is_ending = asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            is_ending.set()
            await asyncio.sleep(0.1)

    async def owner() -> None:
        async with task_scope() as group:
            group.create_task(slow_to_end(), name="slow to end")
            await asyncio.sleep(0)
            if is_failing:
                raise Unavailable("no")
        await asyncio.sleep(60)

    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        owning = tasks.create_task(owner(), name="owner")
        await is_ending.wait()
        owning.cancel()
    assert owning.cancelled()


async def test_an_outcome_is_what_came_or_what_was_raised_and_never_a_cancellation() -> None:
    async def work(error: BaseException | None) -> int:
        if error is not None:
            raise error
        return 1

    failure = ZeroDivisionError()
    assert await outcome_of(work(None)) == 1
    assert await outcome_of(work(failure)) is failure
    with pytest.raises(asyncio.CancelledError):
        await outcome_of(work(asyncio.CancelledError()))
