"""Usage in SQL, beside the models. Each method is one transaction. Time is passed in, as hours and moments."""

import json
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import delete, exists, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.registry import offload
from helios.registry.database import Database, upsert
from helios.registry.moments import from_us, to_us
from helios.registry.tables import (
    blobs,
    entries,
    forecast_runs,
    forecasts,
    models,
    revisions,
    usage_hours,
    usage_reporters,
)
from helios.registry.usage.records import BlobHeat, Counts, Delta, Expectation, Forecast, UsageHour

# Runs of proxies that sent nothing for so long are over, and send nothing again.
_REPORTER_KEPT: Final = timedelta(days=7)
# Below this an expectation and none are the same, and an hour of nothing keeps having no row.
_MIN_EXPECTED: Final = 0.05
# Rows in one statement: SQLite takes 32,766 variables.
_BATCH: Final = 1_000
_COUNTS: Final = tuple(Counts.__dataclass_fields__)


class UsageStore:
    """The tables of usage as operations."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # Reports.
    async def report(self, reporter: str, sequence: int, deltas: Sequence[Delta], *, now: datetime) -> int:
        """Adds a report unless it, or a later one of its reporter, was taken; returns the number of the last one."""
        async with self._database.transaction() as connection:
            query = select(usage_reporters.c.sequence).where(usage_reporters.c.reporter == reporter)
            taken = (await connection.execute(query)).scalar_one_or_none() or 0
            if sequence <= taken:
                return taken
            row = {"sequence": sequence, "at_us": to_us(now)}
            statement = upsert(connection, usage_reporters).values(reporter=reporter, **row)
            await connection.execute(statement.on_conflict_do_update(index_elements=["reporter"], set_=row))
            known = await _existing(connection, {delta.model for delta in deltas})
            rows = [_row(delta) for delta in deltas if delta.model in known]
            added = upsert(connection, usage_hours)
            more = {name: usage_hours.c[name] + added.excluded[name] for name in _COUNTS}
            if rows:
                await connection.execute(added.on_conflict_do_update(index_elements=["model", "hour"], set_=more), rows)
        return sequence

    # Answers.
    async def page(self, after: str, limit: int) -> list[str]:
        """Returns names of models behind a name, in order."""
        query = select(models.c.name).where(models.c.name > after).order_by(models.c.name).limit(limit)
        async with self._database.snapshot() as connection:
            return list((await connection.execute(query)).scalars())

    async def hours(self, names: Collection[str], since: int) -> dict[str, list[UsageHour]]:
        """Returns the hours of models from one on, the oldest first; for models without any there is nothing."""
        query = (
            select(usage_hours)
            .where(usage_hours.c.model.in_(names), usage_hours.c.hour >= since)
            .order_by(usage_hours.c.model, usage_hours.c.hour)
        )
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(query)).all()
        # Tens of thousands of them: a tenth of a second.
        return await offload.run(lambda _: _by_model(rows))

    async def heat(self, since: int, limit: int) -> list[BlobHeat]:
        """Returns the blobs whose models were asked for most since an hour, the hottest first."""
        used = (
            select(usage_hours.c.model, func.sum(usage_hours.c.requests).label("requests"))
            .where(usage_hours.c.hour >= since)
            .group_by(usage_hours.c.model)
            .subquery()
        )
        # A revision may have one blob under two paths.
        held = select(entries.c.revision, entries.c.blob).distinct().subquery()
        total = func.sum(used.c.requests).label("total")
        query = (
            select(blobs.c.hash, blobs.c.size_bytes, total, func.count().label("model_count"))
            .select_from(
                used.join(models, models.c.name == used.c.model)
                .join(held, held.c.revision == models.c.revision)
                .join(blobs, blobs.c.hash == held.c.blob)
            )
            .where(used.c.requests > 0)
            .group_by(blobs.c.hash, blobs.c.size_bytes)
            .order_by(total.desc(), blobs.c.hash)
            .limit(limit)
        )
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(query)).all()
        return [BlobHeat(row.hash, row.size_bytes, int(row.total), row.model_count) for row in rows]

    async def forecasts(self, names: Collection[str] | None = None) -> dict[str, Forecast]:
        """Returns the newest forecasts, of all models or of some."""
        query = select(forecasts)
        if names is not None:
            query = query.where(forecasts.c.model.in_(names))
        async with self._database.snapshot() as connection:
            return {row.model: _forecast(row) for row in await connection.execute(query)}

    async def counts(self, since: int, names: Collection[str] | None = None) -> dict[str, Counts]:
        """Returns the sums of each model since an hour, for models that were used: all of them, or of some."""
        sums = [func.sum(usage_hours.c[name]).label(name) for name in _COUNTS]
        query = select(usage_hours.c.model, *sums).where(usage_hours.c.hour >= since).group_by(usage_hours.c.model)
        if names is not None:
            query = query.where(usage_hours.c.model.in_(names))
        async with self._database.snapshot() as connection:
            return {row.model: _counts(row) for row in await connection.execute(query)}

    async def served(self, names: Collection[str]) -> dict[str, tuple[str, int]]:
        """Returns the served revision of models, each with the bytes of its blobs."""
        query = (
            select(models.c.name, models.c.revision, revisions.c.size_bytes)
            .join(revisions, revisions.c.digest == models.c.revision)
            .where(models.c.name.in_(names))
        )
        async with self._database.snapshot() as connection:
            return {row.name: (row.revision, row.size_bytes) for row in await connection.execute(query)}

    async def max_replicas(self) -> dict[str, int]:
        """Returns the bounds of models that have one."""
        query = select(models.c.name, models.c.max_replicas).where(models.c.max_replicas > 0)
        async with self._database.snapshot() as connection:
            return {row.name: row.max_replicas for row in await connection.execute(query)}

    # Forecasting.
    async def claim_run(self, hour: int) -> bool:
        """Returns whether the forecasts of an hour are the caller's to make: the first one who asks."""
        statement = update(forecast_runs).where(forecast_runs.c.hour < hour).values(hour=hour)
        async with self._database.transaction() as connection:
            return bool((await connection.execute(statement)).rowcount)

    async def last_run(self) -> int:
        """Returns the hour that forecasts were made for last; 0: none."""
        async with self._database.snapshot() as connection:
            return int((await connection.execute(select(forecast_runs.c.hour))).scalar_one())

    async def newest_us(self) -> int:
        """Returns when the newest forecast was made, in microseconds since 1970; 0: there is none."""
        async with self._database.snapshot() as connection:
            return int((await connection.execute(select(func.max(forecasts.c.made_at_us)))).scalar_one() or 0)

    async def histories(self, since: int, until: int) -> AsyncIterator[dict[str, list[float]]]:
        """Yields the requests of models, hour for hour from their first one on, up to ``until``, which is left out.

        Models that were not used have none. They come in batches, each of a transaction of its own.
        """
        after = ""
        while True:
            names = (
                select(usage_hours.c.model)
                .where(usage_hours.c.model > after, usage_hours.c.hour >= since, usage_hours.c.hour < until)
                .where(usage_hours.c.requests > 0)
                .distinct()
                .order_by(usage_hours.c.model)
                .limit(_BATCH // 4)
            )
            async with self._database.snapshot() as connection:
                batch = list((await connection.execute(names)).scalars())
            if not batch:
                return
            found = await self.hours(batch, since)
            yield {model: _filled(found.get(model, []), until) for model in batch}
            after = batch[-1]

    async def save_forecasts(self, made: Mapping[str, Forecast]) -> None:
        """Replaces models' forecasts, and notes beside the first hour's usage what is expected of it."""
        # Before the transaction: the process that forecasts has the lowest priority, and all writers wait for it there.
        every = {model: _forecast_row(model, forecast) for model, forecast in made.items()}
        expected = {model: _expected_row(model, forecast) for model, forecast in made.items()}
        async with self._database.transaction() as connection:
            known = await _existing(connection, made.keys())
            rows = [every[model] for model in known]
            first = [expected[model] for model in known if _is_worth_a_row(made[model])]
            if rows:
                statement = upsert(connection, forecasts)
                changed = {name: statement.excluded[name] for name in rows[0] if name != "model"}
                await connection.execute(statement.on_conflict_do_update(index_elements=["model"], set_=changed), rows)
            if first:
                statement = upsert(connection, usage_hours)
                changed = {name: statement.excluded[name] for name in ("expected", "expected_low", "expected_high")}
                await connection.execute(
                    statement.on_conflict_do_update(index_elements=["model", "hour"], set_=changed), first
                )

    async def prune(self, before: int, *, now: datetime) -> int:
        """Deletes hours before one, forecasts of models without hours, and old reporters; returns how many hours."""
        rest = exists().where(usage_hours.c.model == forecasts.c.model, usage_hours.c.requests > 0)
        async with self._database.transaction() as connection:
            gone = await connection.execute(delete(usage_hours).where(usage_hours.c.hour < before))
            await connection.execute(delete(forecasts).where(~rest))
            silent = usage_reporters.c.at_us < to_us(now - _REPORTER_KEPT)
            await connection.execute(delete(usage_reporters).where(silent))
        return gone.rowcount


async def _existing(connection: AsyncConnection, names: Collection[str]) -> set[str]:
    listed, found = sorted(names), set[str]()
    for start in range(0, len(listed), _BATCH):
        query = select(models.c.name).where(models.c.name.in_(listed[start : start + _BATCH]))
        found.update((await connection.execute(query)).scalars())
    return found


def _by_model(rows: Iterable[Any]) -> dict[str, list[UsageHour]]:
    found: dict[str, list[UsageHour]] = {}
    for row in rows:
        found.setdefault(row.model, []).append(_hour(row))
    return found


def _filled(hours: Iterable[UsageHour], until: int) -> list[float]:
    """Returns requests hour for hour from the first used one on; hours without a row had none."""
    requests = {hour.hour: float(hour.counts.requests) for hour in hours if hour.counts.requests}
    return [requests.get(hour, 0.0) for hour in range(min(requests), until)] if requests else []


def _is_worth_a_row(forecast: Forecast) -> bool:
    return forecast.hours[0].requests >= _MIN_EXPECTED


def _row(delta: Delta) -> dict[str, Any]:
    return {"model": delta.model, "hour": delta.hour, **asdict(delta.counts)}


def _expected_row(model: str, forecast: Forecast) -> dict[str, Any]:
    expected = forecast.hours[0]
    return {
        "model": model,
        "hour": forecast.first_hour,
        "expected": expected.requests,
        "expected_low": expected.low,
        "expected_high": expected.high,
    }


def _forecast_row(model: str, forecast: Forecast) -> dict[str, Any]:
    hours = [[round(value, 3) for value in (hour.requests, hour.low, hour.high)] for hour in forecast.hours]
    return {
        "model": model,
        "made_at_us": to_us(forecast.made_at),
        "method": forecast.method,
        "history_hours": forecast.history_hours,
        "first_hour": forecast.first_hour,
        "hours": json.dumps(hours),
    }


def _forecast(row: Any) -> Forecast:
    return Forecast(
        method=row.method,
        history_hours=row.history_hours,
        first_hour=row.first_hour,
        hours=tuple(Expectation(*hour) for hour in json.loads(row.hours)),
        made_at=from_us(row.made_at_us),
    )


def _hour(row: Any) -> UsageHour:
    expectation = None
    if row.expected is not None:
        expectation = Expectation(row.expected, row.expected_low, row.expected_high)
    return UsageHour(row.hour, _counts(row), expectation)


def _counts(row: Any) -> Counts:
    return Counts(**{name: int(getattr(row, name)) for name in _COUNTS})
