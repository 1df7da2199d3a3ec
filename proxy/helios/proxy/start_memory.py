"""What starts took, told to logs and metrics, and kept on disk: a proxy that starts again promises what it knew."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final, Protocol

import structlog

from helios.proxy import actions, metrics
from helios.proxy.activation.rungs import RungEstimates

log = structlog.get_logger()

# A fleet that comes up measures many starts in a second; one write takes them all.
_SETTLE_SECONDS: Final = 1.0


class StartKeeper(Protocol):
    """Who keeps it."""

    async def save_starts(self, document: Mapping[str, Any]) -> None:
        """Replaces what is kept. Raises OSError."""
        ...


class StartMemory:
    """Takes down what starts took. `run` must be running for it to be kept."""

    def __init__(self, estimates: RungEstimates, keeper: StartKeeper) -> None:
        self._estimates = estimates
        self._keeper = keeper
        self._changed = asyncio.Event()

    def scored(self, action: actions.StartScored) -> None:
        """A start is over, and what was promised of it is compared with what it took."""
        promised, seconds = action.promised_seconds, action.seconds
        log.info(
            "start scored",
            model=action.model,
            replica=action.replica_id,
            rung=action.rung,
            promised_seconds=round(promised, 3),
            seconds=round(seconds, 3),
            mean_error_factor=round(action.score.error_factor, 2),
        )
        metrics.START_ERROR.labels(action.rung.lower()).observe(promised / seconds if seconds else 1.0)
        self._changed.set()

    async def run(self) -> None:
        """Keeps what changed, until cancelled. Raises OSError."""
        while True:
            await self._changed.wait()
            await asyncio.sleep(_SETTLE_SECONDS)
            self._changed.clear()
            await self._keeper.save_starts(self._estimates.document())
