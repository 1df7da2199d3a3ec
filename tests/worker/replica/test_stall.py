"""An engine that has requests and does nothing is given up; one that has none, or that moves, is not."""

import asyncio
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

from helios.worker.replica.engine import EngineLoad
from helios.worker.replica.main import _Replica
from helios.worker.replica.spec import ReplicaSpec

SPEC = ReplicaSpec(
    replica_id="r",
    model="m",
    revision="sha256:1",
    model_path="/weights",
    engine="simulated",
    created_at=datetime(2026, 1, 1, tzinfo=UTC),
    stall_seconds=0.05,
)
IDLE, BUSY, DEAD = EngineLoad(0, 0, 0.0), EngineLoad(1, 0, 0.5), EngineLoad(0, 0, 0.0, is_dead=True)


async def failure_after(*loads: EngineLoad, pause_seconds: float, is_moving: bool = False) -> str:
    """What a replica says of itself when it looks at these loads, one after the other."""
    replica = _Replica(SPEC, cast("Any", SimpleNamespace()), requested_at=0.0, forked_at=0.0)
    replica._note_engine_moved()
    for load in loads:
        await asyncio.sleep(pause_seconds)
        if is_moving:
            replica._note_engine_moved()
        replica._check_engine(load)
    return replica._condition.failure_reason


async def test_an_engine_that_stands_still_with_requests_is_given_up() -> None:
    assert await failure_after(BUSY, pause_seconds=0.1) == "ENGINE_STALLED"


async def test_an_engine_without_requests_or_that_moves_is_left_alone() -> None:
    assert not await failure_after(IDLE, IDLE, pause_seconds=0.1)
    assert not await failure_after(BUSY, BUSY, BUSY, pause_seconds=0.1, is_moving=True)


async def test_an_engine_that_died_is_told_as_dead() -> None:
    assert await failure_after(DEAD, pause_seconds=0.1) == "ENGINE_DIED"
