"""Usage of a registry: reports, answers, an hourly run of forecasts, and those who watch warm targets."""

import asyncio
import contextlib
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog

from helios.mesh.errors import Bug, DeadlineExceeded, Draining
from helios.registry import offload
from helios.registry.usage.answers import ModelUsage
from helios.registry.usage.records import BlobHeat, Counts, Delta, Forecast, UsageHour, hour_of, start_of
from helios.registry.usage.score import score_of
from helios.registry.usage.settings import UsageSettings
from helios.registry.usage.store import UsageStore
from helios.registry.usage.targets import Target, target_of

log = structlog.get_logger()

# Forecasts are scored over a week: each hour of the week once.
_SCORED_HOURS: Final = 168
# What a request takes is told by those of the last day.
_RECENT_HOURS: Final = 24
# How often it is looked whether forecasts are due, or another registry has made them.
_LOOK_SECONDS: Final = 15.0
_MODULE: Final = "helios.registry.usage.forecast_run"
_END_SECONDS: Final = 10.0
_LOG_BYTES: Final = 4096


class Usage:
    """Takes reports in, answers, forecasts. ``run`` must be running for forecasts to be made."""

    def __init__(
        self,
        store: UsageStore,
        settings: UsageSettings,
        *,
        database: str,
        environment: Mapping[str, str] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Takes where the database is, for the process that forecasts: a path, or a URL.

        Where the URL leaves something to libpq (a password, TLS), ``environment`` has it.
        """
        self._store = store
        self._settings = settings
        self._database = database
        self._environment = environment or {}
        self._now = now
        self._changed = asyncio.Event()
        # When the newest forecast was made that was told of.
        self._told_us = -1
        self._is_closed = False
        self.run_count = 0
        """How often new forecasts were told of."""

    def now(self) -> datetime:
        """Returns the time."""
        return self._now()

    async def report(self, reporter: str, sequence: int, deltas: Sequence[Delta]) -> int:
        """Adds a report; returns the number of the last one taken."""
        return await self._store.report(reporter, sequence, deltas, now=self._now())

    async def page(self, after: str, limit: int, hour_count: int) -> list[ModelUsage]:
        """Returns the usage of models behind a name, in order, without their hours."""
        return await self._answer(await self._store.page(after, limit), hour_count, listed_count=0)

    async def of(self, names: Sequence[str], hour_count: int) -> list[ModelUsage]:
        """Returns the usage of models."""
        return await self._answer(names, hour_count, listed_count=hour_count)

    async def _answer(self, names: Sequence[str], hour_count: int, *, listed_count: int) -> list[ModelUsage]:
        """Returns the usage of models, with so many of their hours.

        The database sums hours up; single ones are read as far as they are listed, or scored.
        """
        hour = hour_of(self._now())
        sums = await self._store.counts(hour - hour_count + 1, names)
        found = await self._store.hours(names, hour - max(listed_count, _SCORED_HOURS + 1, _RECENT_HOURS) + 1)
        made = await self._store.forecasts(names)
        bounds = await self._store.max_replicas() if made else {}
        policy = self._settings.target_policy

        def usage_of(name: str) -> ModelUsage:
            hours, forecast, target = found.get(name, []), made.get(name), None
            listed = tuple(one for one in hours if one.hour > hour - listed_count)
            scored = [one for one in hours if one.hour > hour - _SCORED_HOURS - 1]
            if forecast is not None:
                recent = sum_of([one for one in hours if one.hour > hour - _RECENT_HOURS])
                target = target_of(name, forecast, recent, hour=hour, policy=policy, max_replicas=bounds.get(name, 0))
            return ModelUsage(name, sums.get(name, Counts()), listed, forecast, score_of(scored, hour), target)

        return await offload.run(lambda _: [usage_of(name) for name in names])

    async def heat(self, hour_count: int, limit: int) -> list[BlobHeat]:
        """Returns the hottest blobs of the last hours."""
        return await self._store.heat(hour_of(self._now()) - hour_count + 1, limit)

    async def targets(self) -> list[Target]:
        """Returns how warm models are best kept now, by name."""
        return [target for target, _ in await self.expected()]

    async def expected(self) -> list[tuple[Target, Forecast]]:
        """Returns the models that something is expected of: how warm each is best kept now, and its forecast."""
        hour, policy = hour_of(self._now()), self._settings.target_policy
        made = await self._store.forecasts()
        recent = await self._store.counts(hour - _RECENT_HOURS + 1)
        bounds = await self._store.max_replicas()
        found = (
            target_of(
                name,
                forecast,
                recent.get(name, Counts()),
                hour=hour,
                policy=policy,
                max_replicas=bounds.get(name, 0),
            )
            for name, forecast in sorted(made.items())
        )
        return [(target, made[target.model]) for target in found if target is not None]

    async def watch_targets(self) -> AsyncGenerator[list[Target], None]:
        """Yields all targets, now and whenever forecasts were made. Raises Draining when the process stops."""
        while not self._is_closed:
            changed = self._changed
            yield await self.targets()
            await changed.wait()
        raise Draining("the registry is stopping; watch another one, or this one when it is back")

    async def run(self) -> None:
        """Makes forecasts once an hour, for ever."""
        while True:
            await self.look()
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self) -> None:
        """Makes the forecasts that are due, unless another registry does; tells those who watch of new ones."""
        now = self._now()
        hour = hour_of(now)
        is_due = now - start_of(hour) >= timedelta(seconds=self._settings.forecast_delay_seconds)
        if is_due and await self._store.last_run() < hour and await self._store.claim_run(hour):
            await self.forecast(hour)
        # Not when a run began: another registry's would be told of before its forecasts are there, and not afterwards.
        newest_us = await self._store.newest_us()
        if newest_us != self._told_us:
            self._told_us = newest_us
            self._announce()

    async def forecast(self, hour: int) -> None:
        """Makes the forecasts of an hour, in a process of its own, and deletes what is too old. Cancel-safe."""
        keep_hours = self._settings.keep_days * 24
        began = self._now()
        job: dict[str, str | int] = {"database": self._database, "since": hour - keep_hours, "hour": hour}
        count = await run_process(job, self._environment, timeout_seconds=self._settings.forecast_seconds)
        pruned = await self._store.prune(hour - keep_hours, now=began)
        seconds = (self._now() - began).total_seconds()
        log.info("forecasts made", models=count, seconds=round(seconds, 1), deleted_hours=pruned)

    def close(self) -> None:
        """Ends all watches."""
        self._is_closed = True
        self._changed.set()

    def _announce(self) -> None:
        self.run_count += 1
        self._changed.set()
        if not self._is_closed:
            self._changed = asyncio.Event()


def sum_of(hours: Sequence[UsageHour]) -> Counts:
    """Returns the sums of hours."""
    return Counts(**{name: sum(getattr(one.counts, name) for one in hours) for name in Counts.__dataclass_fields__})


async def run_process(
    job: dict[str, str | int], environment: Mapping[str, str], *, timeout_seconds: float, module: str = _MODULE
) -> int:
    """Runs a job of ``forecast_run``; returns how many models it made forecasts of. The process is gone afterwards.

    Of the environment it gets what libpq reads. ``module`` is what ``python -m`` runs; tests put another one there.

    Raises:
        DeadlineExceeded: FORECAST_TIMEOUT.
        Bug: It failed.
    """
    # Packages are found where this process finds them; credentials of clouds are none of its business.
    own = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry), "OMP_NUM_THREADS": "1"}
    # The files that libpq looks for where nobody names them (passwords, certificates) are below HOME.
    libpq = {name: value for name, value in environment.items() if name.startswith("PG") or name == "HOME"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", "-m", module, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=libpq | own
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_seconds):
            assert process.stdin is not None
            process.stdin.write(json.dumps(job).encode() + b"\n")
            await process.stdin.drain()
            output, errors = await _outputs(process)
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"forecasts took longer than {timeout_seconds:g} s", reason="FORECAST_TIMEOUT"
        ) from error
    except (BrokenPipeError, ConnectionResetError):
        output, errors = b"", b"it ended before it was told what to do"
    finally:
        await offload.uninterrupted(_end(process))
    if process.returncode or not output:
        log.error("forecasts failed", status=process.returncode, output=errors[-_LOG_BYTES:].decode("utf-8", "replace"))
        raise Bug(f"the process that forecasts failed with status {process.returncode}; the log has its output")
    return int(json.loads(output)["model_count"])


async def _outputs(process: Process) -> tuple[bytes, bytes]:
    """Reads both outputs to their ends, at the same time; the input stays open, as its lifeline."""
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.TaskGroup() as group:
        output = group.create_task(process.stdout.read(), name="read forecasts")
        errors = group.create_task(process.stderr.read(), name="read errors of forecasts")
    await process.wait()
    return output.result(), errors.result()


async def _end(process: Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if process.stdin is not None:
        process.stdin.close()
    async with asyncio.timeout(_END_SECONDS):
        await process.wait()
