"""Tells the registry what was counted, and keeps what it has not got over a restart.

Every interval what was counted is sent. Where that fails, and when the process stops, it is written to a file, from
which the next run sends it under the same numbers. So a crash loses what was counted since the last interval, and a
clean stop loses nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final, Protocol
from uuid import uuid4

import structlog

from helios.mesh.errors import HeliosError
from helios.proxy import metrics
from helios.proxy.usage.meter import Meter, Outgoing, Report, Tally
from helios.registry.client import Counts, Delta

log = structlog.get_logger()

# A stop waits no longer than this for a registry that is slow; the rest is in the file.
_LAST_SECONDS: Final = 2.0


class UsageSink(Protocol):
    """Takes reports. ``UsageClient`` is one. Idempotent by reporter and sequence; cancel-safe."""

    async def report(self, reporter: str, sequence: int, deltas: list[Delta]) -> int:
        """Takes a report. Raises HeliosError."""
        ...


class UsageMemory(Protocol):
    """Keeps what the registry has not got over restarts."""

    async def save_usage(self, document: Mapping[str, Any]) -> None:
        """Replaces what is kept. Raises OSError."""
        ...


class UsageReporter:
    """Sends. ``run`` must be running; ``close`` is for the end of the process."""

    def __init__(
        self, meter: Meter, sink: UsageSink, memory: UsageMemory, left: object, *, interval_seconds: float
    ) -> None:
        """Takes up what an earlier run has left: the document that its memory kept; None: nothing."""
        self._meter = meter
        self._sink = sink
        self._memory = memory
        self._interval_seconds = interval_seconds
        reports, running = _restore(left)
        meter.adopt(running)
        self._is_saved = bool(reports or running)
        self._outgoing = Outgoing(uuid4().hex, reports)

    async def run(self) -> None:
        """Sends once an interval, for ever. Raises OSError."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            await self.send()

    async def send(self) -> None:
        """Sends what was counted; keeps it on disk where the registry does not take it. Raises OSError."""
        self._outgoing.add(self._meter.take())
        lost_count = self._outgoing.lost_count
        error = await self._deliver()
        if error is not None:
            log.info("usage not reported", reason=error.reason, error=error.message, reports=len(self._outgoing.all()))
            await self._save([])
        elif self._is_saved:
            await self._save([])
        if lost_count:
            log.warning("usage lost: the registry was away for too long", hours_of_models=lost_count)
            metrics.USAGE_LOST.inc(lost_count)
            self._outgoing.lost_count = 0

    async def close(self) -> None:
        """Sends the rest, and writes to disk what is not taken within two seconds."""
        self._outgoing.add(self._meter.take())
        try:
            async with asyncio.timeout(_LAST_SECONDS):
                await self._deliver()
        except TimeoutError:
            log.info("usage not reported at the end", reports=len(self._outgoing.all()))
        try:
            await self._save(self._meter.running())
        except OSError as error:
            log.warning("usage that was not reported is lost", error=str(error))

    async def _deliver(self) -> HeliosError | None:
        while (report := self._outgoing.next()) is not None:
            deltas = [Delta(model, hour, Counts(*tally)) for (model, hour), tally in report.tallies.items()]
            try:
                await self._sink.report(report.reporter, report.sequence, deltas)
            except HeliosError as error:
                return error
            self._outgoing.delivered(report)
        return None

    async def _save(self, running: list[str]) -> None:
        reports = [
            {
                "reporter": report.reporter,
                "sequence": report.sequence,
                "tallies": [[*key, *tally] for key, tally in report.tallies.items()],
            }
            for report in self._outgoing.all()
        ]
        self._is_saved = bool(reports or running)
        await self._memory.save_usage({"reports": reports, "running": running})


def _restore(document: Any) -> tuple[list[Report], list[str]]:
    if document is None:
        return [], []
    try:
        reports = [
            Report(
                str(item["reporter"]),
                int(item["sequence"]),
                {(str(model), int(hour)): Tally(*map(int, counts)) for model, hour, *counts in item["tallies"]},
            )
            for item in document["reports"]
        ]
        return reports, [str(request_id) for request_id in document["running"]]
    except (KeyError, TypeError, ValueError) as error:
        log.warning("usage on disk can't be used", error=str(error))
        return [], []
