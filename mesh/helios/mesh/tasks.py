"""Keeping a coroutine alive: what a session to another component needs when that component goes away.

tenacity does the back-off (kept, tested, and async) rather than a loop of our own. Full jitter, so that a hundred
workers that lost one proxy do not come back at the same instant. Source: AWS Architecture Blog, "Exponential Backoff
And Jitter".
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import grpc.aio
import structlog
import tenacity

from helios.mesh.errors import DeadlineExceeded, HeliosError, Unavailable

log = structlog.get_logger()

T = TypeVar("T")

RECOVERABLE: Final = (HeliosError, OSError, TimeoutError, grpc.aio.AioRpcError)
# A run this long was a success: the next failure starts from the shortest wait again.
_SETTLED_SECONDS: Final = 5.0


async def keep_running(
    name: str, factory: Callable[[], Awaitable[None]], *, base_seconds: float = 0.1, cap_seconds: float = 5.0
) -> None:
    """Runs ``factory()`` again and again until cancelled, with full-jitter back-off after a failure.

    A normal return is run again too, after ``base_seconds`` on average, and so is a run that ended because something
    that it awaited was cancelled. Errors that nobody foresaw (not in RECOVERABLE) are raised: a bug must end the
    process, which its parent restarts, rather than be retried for ever.
    """
    while True:
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(RECOVERABLE),
            wait=tenacity.wait_random_exponential(multiplier=base_seconds, max=cap_seconds),
            before_sleep=_Reporter(name),
        )
        await retrying(_run_once, name, factory)
        await asyncio.sleep(random.uniform(0, 2 * base_seconds))  # noqa: S311 - no secret


async def retried(work: Callable[[], Awaitable[T]], *, within_seconds: float) -> T:
    """Returns what ``work()`` returns, run anew with full-jitter back-off while it fails in a way that may pass.

    For what somebody waits for and may be done twice: the last try is cancelled when ``within_seconds`` have passed.

    Raises:
        HeliosError: One that is not ``is_retryable``, at once; the last one, when the time is over.
        DeadlineExceeded: No try came to an end in that time.
    """
    failed: HeliosError | None = None

    def may_pass(error: BaseException) -> bool:
        nonlocal failed
        if not isinstance(error, HeliosError) or not error.is_retryable:
            return False
        failed = error
        return True

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.1, max=1),
        stop=tenacity.stop_after_delay(within_seconds),
        reraise=True,
    )
    limit = asyncio.timeout(within_seconds)
    try:
        async with limit:
            return await retrying(work)
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise failed or DeadlineExceeded(f"no answer came within {within_seconds:g} s") from error


@asynccontextmanager
async def task_scope() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose tasks are cancelled, not awaited, when its body ends.

    What the body raises is raised as it is; what a task raises cancels the body and comes as an ExceptionGroup. A
    cancellation that comes while the tasks are ending is raised once they have ended.
    """
    owner = asyncio.current_task()
    cancelling_count = 0
    raised: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            try:
                yield group
            except BaseException as error:
                raised = error
                cancelling_count = owner.cancelling() if owner else 0
                raise
            cancelling_count = owner.cancelling() if owner else 0
            raise _EndOfScopeError
    except BaseExceptionGroup as errors:
        # Python 3.11's TaskGroup drops a cancellation that reaches it while it aborts.
        is_cancelled = owner is not None and owner.cancelling() > cancelling_count
        if raised is not None and errors.exceptions == (raised,):
            if is_cancelled:
                raise asyncio.CancelledError from raised
            raise raised from None
        _, others = errors.split(_EndOfScopeError)
        if others is not None:
            raise others from None
        if is_cancelled:
            raise asyncio.CancelledError from None


async def outcome_of(work: Awaitable[T]) -> T | Exception:
    """Returns what ``work`` returns, or the exception that it raised; a cancellation is raised.

    For work that a task does for others: its error is theirs, whatever it is, and would end a task group's other work.
    """
    try:
        return await work
    except Exception as error:  # noqa: BLE001 - whoever waits for the work raises it, where it is logged if unforeseen
        return error


class _EndOfScopeError(Exception):
    """Ends the tasks of a scope."""


async def _run_once(name: str, factory: Callable[[], Awaitable[None]]) -> None:
    started = time.monotonic()
    try:
        await _uncancelled(factory())
    except RECOVERABLE as error:
        if time.monotonic() - started < _SETTLED_SECONDS:
            raise
        log.warning("task ended", task=name, error=_describe(error))


async def _uncancelled(work: Awaitable[None]) -> None:
    """Tells a cancellation of this task from one of what it awaits (a call whose channel was closed, for instance).

    One that was swallowed takes effect here: a stream of grpc.aio that is cancelled before its call has begun goes on,
    and fails like any other (Source: grpcio 1.85, `_prepare_rpc`). Of other failures the count says nothing: Python
    3.11's TaskGroup leaves it raised where a task of its fails.
    """
    task = asyncio.current_task()
    assert task is not None
    try:
        await work
    except asyncio.CancelledError as error:
        if task.cancelling():
            raise
        raise Unavailable("what it waited for was cancelled") from error
    except (grpc.aio.AioRpcError, HeliosError) as error:
        is_of_call = isinstance(error, grpc.aio.AioRpcError) or isinstance(error.__cause__, grpc.aio.AioRpcError)
        if is_of_call and task.cancelling():
            raise asyncio.CancelledError from error
        raise


class _Reporter:
    """Logs the first failure of a row as a warning and the rest for debugging only."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        report = log.warning if state.attempt_number == 1 else log.debug
        report("task failed", task=self._name, error=_describe(error), attempt=state.attempt_number)


def _describe(error: BaseException | None) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"
