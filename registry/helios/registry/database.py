"""The SQLite database of the registry: how it is opened, and what its driver's errors mean.

WAL lets readers go on beside the one writer; `synchronous=FULL` keeps a commit that was answered through a power cut
(there are few writes, so the extra fsync costs nothing that matters). Every transaction begins explicitly: the
driver's own habit of beginning one only before a write would let two reads of one method see different states.
"""

import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import event, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from helios.mesh.errors import Bug, Conflict, Corrupted, DiskFull, HeliosError, PreconditionFailed, Unavailable
from helios.registry import tables

# Another process (a backup, sqlite3 on the command line) may hold the lock for moments.
_BUSY_MS: Final = 5_000

_ERRORS: Final[dict[int, tuple[type[HeliosError], str]]] = {
    sqlite3.SQLITE_FULL: (DiskFull, "the disk of the registry's database is full"),
    sqlite3.SQLITE_BUSY: (Unavailable, "the registry's database is locked by another program"),
    sqlite3.SQLITE_LOCKED: (Unavailable, "the registry's database is locked by another program"),
    sqlite3.SQLITE_CORRUPT: (Corrupted, "the registry's database is damaged"),
    sqlite3.SQLITE_NOTADB: (Corrupted, "the registry's database is not an SQLite file"),
    sqlite3.SQLITE_READONLY: (Unavailable, "the registry's database can't be written"),
    sqlite3.SQLITE_CANTOPEN: (Unavailable, "the registry's database can't be opened"),
    sqlite3.SQLITE_IOERR: (Unavailable, "the disk of the registry's database fails"),
}


class Database:
    """The engine of one SQLite file. ``transaction`` is the only way to it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine

    @classmethod
    async def open(cls, path: Path) -> "Database":
        """Opens the database, making file and tables on first use, and bringing those of an older Helios up to date.

        Raises:
            PreconditionFailed: SCHEMA_MISMATCH, when a newer Helios wrote it.
            Corrupted: When it is not a database.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        engine = create_async_engine(f"sqlite+aiosqlite:///{path}")
        event.listen(engine.sync_engine, "connect", _configure)
        event.listen(engine.sync_engine, "begin", _begin)
        database = cls(engine)
        try:
            async with database.transaction() as connection:
                await connection.run_sync(tables.metadata.create_all)
                await _check_version(connection)
        except BaseException:
            await engine.dispose()
            raise
        return database

    async def close(self) -> None:
        """Closes all connections."""
        await self._engine.dispose()

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Yields a connection in a transaction that commits at the end and rolls back on any error.

        Raises:
            HeliosError: What the driver's error means.
        """
        try:
            async with self._engine.begin() as connection:
                yield connection
        except IntegrityError as error:
            raise Conflict(f"the registry's state changed meanwhile: {error.orig}") from error
        except DBAPIError as error:
            raise _translate(error) from error


def _translate(error: DBAPIError) -> HeliosError:
    code = getattr(error.orig, "sqlite_errorcode", None)
    if isinstance(code, int) and code & 0xFF in _ERRORS:
        kind, message = _ERRORS[code & 0xFF]
        return kind(f"{message} ({error.orig})")
    return Bug(f"the registry's database refused a statement: {error.orig}")


def _configure(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    # busy_timeout first: switching to WAL may already meet a lock.
    for pragma in (f"busy_timeout={_BUSY_MS}", "journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN")


async def _check_version(connection: AsyncConnection) -> None:
    found = (await connection.execute(select(tables.schema_version.c.version))).scalar_one_or_none()
    if found is None:
        await connection.execute(tables.schema_version.insert().values(version=tables.SCHEMA_VERSION))
        return
    if 1 <= found < tables.SCHEMA_VERSION:
        for version in range(found + 1, tables.SCHEMA_VERSION + 1):
            for statement in tables.MIGRATIONS[version]:
                await connection.exec_driver_sql(statement)
        await connection.execute(tables.schema_version.update().values(version=tables.SCHEMA_VERSION))
    elif found != tables.SCHEMA_VERSION:
        raise PreconditionFailed(
            f"the registry's database has schema {found}, this Helios knows {tables.SCHEMA_VERSION}:"
            " use the version that wrote it, or start with an empty state directory",
            reason="SCHEMA_MISMATCH",
        )
