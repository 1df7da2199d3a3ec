"""What replicas were measured to hold, in SQL. Each method is one transaction."""

from collections.abc import Collection, Sequence
from datetime import datetime

from sqlalchemy import select

from helios.registry.database import Database, upsert
from helios.registry.moments import from_us, to_us
from helios.registry.profiles.measure import Measure
from helios.registry.tables import measures, revisions


class MeasureStore:
    """The table of measures; they end with their revision."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def put(self, found: Sequence[Measure], now: datetime) -> None:
        """Keeps the largest of each; revisions that are not known are passed over. Raises InvalidRequest."""
        for measure in found:
            measure.check()
        if not found:
            return
        async with self._database.transaction() as connection:
            asked = {measure.revision for measure in found}
            known = set(
                (await connection.execute(select(revisions.c.digest).where(revisions.c.digest.in_(asked)))).scalars()
            )
            for measure in found:
                if measure.revision not in known:
                    continue
                values = {"fixed_bytes": measure.fixed_bytes, "measured_at_us": to_us(now)}
                statement = upsert(connection, measures).values(
                    revision=measure.revision,
                    settings_sha256=measure.settings_sha256,
                    is_gpu=measure.is_gpu,
                    **values,
                )
                await connection.execute(
                    statement.on_conflict_do_update(
                        index_elements=["revision", "settings_sha256", "is_gpu"],
                        set_=values,
                        where=measures.c.fixed_bytes < measure.fixed_bytes,
                    )
                )

    async def of(self, digests: Collection[str]) -> list[Measure]:
        """Returns what is known of revisions, in an order that does not change."""
        query = select(measures).where(measures.c.revision.in_(digests))
        ordered = query.order_by(measures.c.revision, measures.c.settings_sha256, measures.c.is_gpu)
        async with self._database.snapshot() as connection:
            return [
                Measure(row.revision, row.settings_sha256, row.is_gpu, row.fixed_bytes, from_us(row.measured_at_us))
                for row in await connection.execute(ordered)
            ]
