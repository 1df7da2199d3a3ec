"""The cordons' rows."""

import re
from datetime import datetime
from typing import Final

from sqlalchemy import delete, func, insert, select

from helios.mesh.errors import InvalidRequest, QuotaExceeded
from helios.registry.cordons.records import Cordon
from helios.registry.database import Database
from helios.registry.moments import from_us, to_us
from helios.registry.tables import cordons

# All of them are told to each proxy in one message.
MAX_CORDONS: Final = 10_000
_WORKER: Final = re.compile(r"[!-~]{1,128}")


class CordonStore:
    """Operations on the table of cordons."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def set(self, worker_id: str, now: datetime, *, is_cordoned: bool) -> bool:
        """Cordons a worker, or lifts its cordon; returns whether that changed anything.

        Raises:
            InvalidRequest: INVALID_CORDON.
            QuotaExceeded: TOO_MANY_CORDONS.
        """
        if _WORKER.fullmatch(worker_id) is None:
            raise InvalidRequest("a worker's id is 1 to 128 printable characters", reason="INVALID_CORDON")
        is_it = cordons.c.worker_id == worker_id
        async with self._database.transaction() as connection:
            found = (await connection.execute(select(cordons.c.worker_id).where(is_it))).first()
            if (found is not None) == is_cordoned:
                return False
            if not is_cordoned:
                await connection.execute(delete(cordons).where(is_it))
                return True
            count = (await connection.execute(select(func.count()).select_from(cordons))).scalar_one()
            if count >= MAX_CORDONS:
                raise QuotaExceeded(f"{count} workers are cordoned; uncordon some", reason="TOO_MANY_CORDONS")
            row = {"worker_id": worker_id, "created_at_us": to_us(now)}
            await connection.execute(insert(cordons).values(row))
            return True

    async def all(self) -> tuple[Cordon, ...]:
        """Returns all cordons, by worker."""
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(select(cordons).order_by(cordons.c.worker_id))).all()
        return tuple(Cordon(row.worker_id, from_us(row.created_at_us)) for row in rows)
