"""The leases' rows. Writers come one after another across all registries, and the database's clock is the only one."""

from dataclasses import asdict
from typing import Any, Final

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from helios.mesh.errors import QuotaExceeded
from helios.registry.database import Database, clock_us, upsert
from helios.registry.leases.lease import Grant, Lease, Wish, acquired, check_ttl, check_wish, released, renewed
from helios.registry.tables import leases

# Names are the program's own; a row is never deleted, for its epoch must not be granted again.
MAX_LEASES: Final = 100


class LeaseStore:
    """Operations on the table of leases. Each returns the lease with how long it is held for, in seconds."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def acquire(self, wish: Wish) -> tuple[bool, Lease, float]:
        """Grants a lease, or says who holds it; whether it was granted comes first.

        Raises:
            InvalidRequest: INVALID_LEASE.
            QuotaExceeded: TOO_MANY_LEASES.
        """
        check_wish(wish)
        # Those who wait ask again and again: they don't take the writers' turn, nor sync the disk.
        async with self._database.snapshot() as connection:
            found = await _read(connection, wish.name)
            now_us = await clock_us(connection)
            if found is not None and acquired(found, wish, now_us) is found:
                return False, found, found.rest_seconds(now_us)
        async with self._database.transaction() as connection:
            found = await _read(connection, wish.name)
            if found is None:
                count = (await connection.execute(select(func.count()).select_from(leases))).scalar_one()
                if count >= MAX_LEASES:
                    raise QuotaExceeded(f"there are {count} leases already", reason="TOO_MANY_LEASES")
                found = Lease(wish.name)
            now_us = await clock_us(connection)
            lease = acquired(found, wish, now_us)
            if lease is not found:
                await _write(connection, lease)
            return lease.epoch != found.epoch, lease, lease.rest_seconds(now_us)

    async def renew(self, grant: Grant, ttl_seconds: float) -> tuple[Lease, float]:
        """Has a lease end later. Raises InvalidRequest (INVALID_LEASE), Conflict (LEASE_LOST)."""
        check_ttl(ttl_seconds)
        async with self._database.transaction() as connection:
            found = await _read(connection, grant.name) or Lease(grant.name)
            now_us = await clock_us(connection)
            lease = renewed(found, grant, ttl_seconds, now_us)
            await _write(connection, lease)
            return lease, lease.rest_seconds(now_us)

    async def release(self, grant: Grant) -> tuple[Lease, float]:
        """Ends a lease where it is still held with this epoch."""
        async with self._database.transaction() as connection:
            found = await _read(connection, grant.name) or Lease(grant.name)
            lease = released(found, grant)
            if lease is not found:
                await _write(connection, lease)
            return lease, lease.rest_seconds(await clock_us(connection))

    async def list(self) -> list[tuple[Lease, float]]:
        """Returns all leases by name; nobody's where they have ended."""
        async with self._database.snapshot() as connection:
            rows = (await connection.execute(select(leases).order_by(leases.c.name))).all()
            now_us = await clock_us(connection)
        return [(lease, lease.rest_seconds(now_us)) for lease in map(_lease_of, rows)]


async def _read(connection: AsyncConnection, name: str) -> Lease | None:
    row = (await connection.execute(select(leases).where(leases.c.name == name))).first()
    return _lease_of(row) if row is not None else None


async def _write(connection: AsyncConnection, lease: Lease) -> None:
    row = asdict(lease)
    statement = upsert(connection, leases).values(row)
    await connection.execute(statement.on_conflict_do_update(index_elements=["name"], set_=row))


def _lease_of(row: Any) -> Lease:
    return Lease(row.name, row.holder, row.address, row.epoch, row.begins_at_us, row.ends_at_us)
