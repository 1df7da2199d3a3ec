"""``python -m helios.registry.usage.forecast_run``: makes the forecasts of an hour and ends.

A process of its own: river brings 120 MB, and replaying all models holds the interpreter for minutes; neither is for a
process that answers calls. It has the lowest priority, and ends with the registry, which holds its standard input open.
The first line there says what to do; the database's URL may hold a password, so it is no argument.
"""

import asyncio
import json
import os
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from helios.registry.database import Database
from helios.registry.usage.forecasting import forecast_of
from helios.registry.usage.records import Forecast
from helios.registry.usage.store import UsageStore

HORIZON_HOURS: Final = 24
"""How far forecasts reach: a day, so that each hour of it is expected once."""

_NICENESS: Final = 19


async def run(database: Database, *, since: int, hour: int) -> int:
    """Makes forecasts from the hours ``since`` up to ``hour``, which is the first that is forecast.

    Returns how many models have one.
    """
    store, count = UsageStore(database), 0
    async for batch in store.histories(since, hour):
        made = {model: _forecast(history, hour) for model, history in batch.items()}
        await store.save_forecasts(made)
        count += len(made)
    return count


def _forecast(history: list[float], hour: int) -> Forecast:
    outlook = forecast_of(history, HORIZON_HOURS)
    return Forecast(outlook.method, outlook.history_hours, hour, outlook.hours, datetime.now(UTC))


async def _main(job: dict[str, str | int]) -> None:
    where = str(job["database"])
    database = await Database.open(where if "://" in where else Path(where))
    try:
        count = await run(database, since=int(job["since"]), hour=int(job["hour"]))
    finally:
        await database.close()
    sys.stdout.write(json.dumps({"model_count": count}) + "\n")


def _end_with_the_registry() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    os.nice(_NICENESS)
    wanted = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_registry, name="lifeline", daemon=True).start()
    asyncio.run(_main(wanted))
