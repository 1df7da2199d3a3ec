"""What was decided of models, and what their starts took: told to logs and metrics, and kept on disk.

A proxy that starts again promises by what it had measured, and says why there are as many replicas as there are.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import structlog

from helios.proxy import actions, metrics
from helios.proxy.activation.rungs import RungEstimates
from helios.proxy.scaling.decisions import Cause, Decisions, Scaled

log = structlog.get_logger()

# A fleet that comes up measures many starts in a second; one write takes them all.
_SETTLE_SECONDS: Final = 1.0


class ChronicleKeeper(Protocol):
    """Who keeps it. Both raise OSError."""

    async def save_starts(self, document: Mapping[str, Any]) -> None:
        """Replaces what is kept of starts."""
        ...

    async def save_decisions(self, documents: Sequence[Mapping[str, Any]]) -> None:
        """Replaces what is kept of decisions."""
        ...


class Chronicle:
    """Takes down what happens. `run` must be running for it to be kept."""

    def __init__(
        self,
        estimates: RungEstimates,
        decisions: Decisions,
        keeper: ChronicleKeeper,
        wall_offset: Callable[[], float],
    ) -> None:
        """``wall_offset`` is by how many seconds the clock on the wall, since 1970, is ahead of decisions' times."""
        self._estimates = estimates
        self._decisions = decisions
        self._keeper = keeper
        self._wall_offset = wall_offset
        self._changed = asyncio.Event()
        self._has_starts = self._has_decisions = False

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
        self._has_starts = True
        self._changed.set()

    def decided(self, decision: Scaled) -> None:
        """A model is to have another number of replicas, or to be kept otherwise warm."""
        model, count = decision.model, decision.to_count
        if decision.cause is Cause.LOAD:
            if count > 1:
                metrics.LOAD_REPLICAS.labels(model).set(count)
            elif decision.from_count > 1:
                metrics.LOAD_REPLICAS.remove(model)
        log.info(
            "model would be scaled" if decision.is_advice else "model is scaled",
            model=model,
            before=decision.from_count,
            after=count,
            cause=decision.cause.name.lower(),
            reason=decision.reason,
        )
        self._has_decisions = True
        self._changed.set()

    async def run(self) -> None:
        """Keeps what changed, until cancelled. Raises OSError: what was not kept is with the next call."""
        await save_changes(self._changed, self._save)

    async def _save(self) -> None:
        await asyncio.sleep(_SETTLE_SECONDS)
        try:
            if self._has_starts:
                self._has_starts = False
                await self._keeper.save_starts(self._estimates.document())
            if self._has_decisions:
                self._has_decisions = False
                await self._keeper.save_decisions(self._decisions.documents(self._wall_offset()))
        except OSError:
            self._has_starts = self._has_decisions = True
            raise


async def save_changes(changed: asyncio.Event, save: Callable[[], Awaitable[None]]) -> None:
    """Saves whenever something changed, until cancelled. Raises OSError: what was not saved has changed still."""
    while True:
        await changed.wait()
        changed.clear()
        try:
            await save()
        except OSError:
            changed.set()
            raise
