"""The registry's targets, as the proxy's scaling takes them in (`scaling/forecast`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Final

from helios.proxy.scaling.forecast import Expected
from helios.proxy.scaling.ladder import Rung
from helios.registry.client import Rung as ToldRung
from helios.registry.client import Target, UsageClient

RUNGS: Final = {
    ToldRung.DISK: Rung.DISK,
    ToldRung.MEMORY: Rung.STAGED,
    ToldRung.ASLEEP: Rung.ASLEEP,
    ToldRung.READY: Rung.READY,
}


async def watch_advice(
    client: UsageClient,
    take: Callable[[Mapping[str, Expected]], None],
    monotonic: Callable[[], float],
    *,
    wall: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> None:
    """Hands targets on whenever there are new ones. Raises HeliosError where the watch breaks; call it again."""
    async with aclosing(client.watch_targets()) as watched:
        async for targets in watched:
            now, at = monotonic(), wall()
            take({target.model: _expected(target, now, at) for target in targets})


def _expected(target: Target, now: float, at: datetime) -> Expected:
    return Expected(
        rung=RUNGS[target.rung],
        replica_count=target.replica_count,
        reason=target.reason,
        until=now + (target.expires_at - at).total_seconds(),
        idle_seconds=target.idle_seconds,
    )
