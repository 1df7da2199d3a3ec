"""keep_running comes back after what may pass, and not after a bug."""

import asyncio

import pytest

from helios.mesh.errors import Unavailable
from helios.mesh.tasks import keep_running


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
