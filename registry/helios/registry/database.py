"""The registry's database, SQLite or PostgreSQL: how it is opened, and the two kinds of transaction.

``snapshot`` reads one state, however many statements it takes. ``transaction`` writes, and writers come one after
another across all replicas of the registry: what one checks still holds when it writes, changes are numbered in the
order in which they become visible, and there is nothing to try again. Writes are people's and ingests', a few a
second at the most, so their queue costs nothing that matters.

SQLite: WAL lets readers go on beside the one writer, who takes its lock before the first statement (a transaction that
has read before is refused when another has written since). `synchronous=FULL` keeps a commit that was answered through
a power cut. Every transaction begins explicitly: the driver's own habit of beginning one only before a write would let
two reads of one method see different states.

PostgreSQL: an advisory lock is the writers' queue (READ COMMITTED sees what the one before has committed), snapshots
are REPEATABLE READ. psycopg rather than asyncpg: it is libpq, so a URL may name several hosts, certificates or a
service as any other client's; asyncpg's speed shows in bulk reads, of which there are none.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, Table, event, make_url, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import QueuePool

from helios.mesh.errors import Conflict, InvalidRequest, Overloaded
from helios.registry.database_errors import error_of
from helios.registry.migrate import bring_up

# Another process (a backup, sqlite3 on the command line) may hold the lock for moments.
_BUSY_MS: Final = 5_000
# "helios" on a telephone's keys, and a number: no other program's advisory locks.
_WRITE_LOCK: Final = 435467_001
# Every wait at the server ends: connecting, a statement, the queue of writers, and a client that went silent in a
# transaction, who would hold all others up.
_POSTGRESQL_TIMEOUTS: Final = {
    "statement_timeout": "60s",
    "lock_timeout": "30s",
    "idle_in_transaction_session_timeout": "60s",
}
_CONNECT_SECONDS: Final = 10
# A migration may rewrite a large table. Who starts meanwhile waits as a writer does, and then is started again.
_MIGRATION_TIMEOUT: Final = "30min"
_POOL_SECONDS: Final = 10.0
_CLOSE_SECONDS: Final = 5.0
_CLOSE_POLL_SECONDS: Final = 0.01

Upsert = sqlite.Insert | postgresql.Insert


class Database:
    """The engine of one database. ``snapshot`` and ``transaction`` are the only ways to it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.is_shared = engine.dialect.name == "postgresql"
        """Whether other replicas of the registry may write to it."""
        self._engine = engine
        self._writes = engine.execution_options(is_write=True)
        self._reads = engine
        if self.is_shared:
            self._reads = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)

    @classmethod
    async def open(cls, where: Path | str) -> "Database":
        """Opens a database and brings its schema up to date, once however many replicas start on it.

        Args:
            where: An SQLite file, made on first use; or the URL of a PostgreSQL database, which must exist:
                ``postgresql://user:password@host:5432/name``, with libpq's parameters after ``?``.

        Raises:
            InvalidRequest: INVALID_DATABASE_URL.
            PreconditionFailed: SCHEMA_MISMATCH, when a newer Helios wrote it.
            Corrupted: When it is not a database.
            Unavailable: When it can't be reached.
        """
        engine = _open_sqlite(where) if isinstance(where, Path) else _open_postgresql(where)
        database = cls(engine)
        try:
            async with database.transaction() as connection:
                if database.is_shared:
                    await connection.execute(text(f"SET LOCAL statement_timeout = '{_MIGRATION_TIMEOUT}'"))
                await connection.run_sync(bring_up)
        except BaseException:
            await engine.dispose()
            raise
        return database

    async def close(self) -> None:
        """Closes all connections, those in use once they are given back.

        A server that has stopped has cancelled its calls, which end a moment later: a connection that came back after
        the others were closed would never be.
        """
        pool = self._engine.pool
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                while isinstance(pool, QueuePool) and pool.checkedout():  # noqa: ASYNC110  (a pool tells nobody)
                    await asyncio.sleep(_CLOSE_POLL_SECONDS)
        except TimeoutError:
            pass
        await self._engine.dispose()

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Yields a connection for reading: all its statements see the database as the first one does.

        Raises:
            HeliosError: What the driver's error means.
        """
        async with _begin(self._reads) as connection:
            yield connection

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Yields a connection for writing, alone; it commits at the end and rolls back on any error.

        Raises:
            Conflict: A row that others refer to, or that must be the only one of its kind.
            HeliosError: What the driver's error means.
        """
        async with _begin(self._writes) as connection:
            if self.is_shared:
                await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITE_LOCK})
            yield connection


def upsert(connection: AsyncConnection, table: Table) -> Upsert:
    """Returns an insert that can say what to do where the row is there: each database has its own."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


async def clock_us(connection: AsyncConnection) -> int:
    """Returns the database's own time, in microseconds since 1970: the one clock that all registries on it share.

    The moment of the call, not of the transaction's begin, which may have waited for its turn since. SQLite's has
    milliseconds.
    """
    if connection.dialect.name == "postgresql":
        query = "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)"
    else:
        query = "SELECT CAST(ROUND((julianday('now') - 2440587.5) * 86400000) AS INTEGER) * 1000"
    return int((await connection.execute(text(query))).scalar_one())


@asynccontextmanager
async def _begin(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    try:
        async with engine.begin() as connection:
            yield connection
    except IntegrityError as error:
        raise Conflict(f"the registry's state changed meanwhile: {error.orig}") from error
    except DBAPIError as error:
        raise error_of(error) from error
    except PoolTimeoutError as error:
        raise Overloaded("all connections to the registry's database are in use", reason="DATABASE_BUSY") from error


def _open_sqlite(path: Path) -> AsyncEngine:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not as a URL in one string: a path may hold what a URL gives a meaning to.
    engine = create_async_engine(URL.create("sqlite+aiosqlite", database=str(path)))
    event.listen(engine.sync_engine, "connect", _configure_sqlite)
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    # busy_timeout first: switching to WAL may already meet a lock.
    for pragma in (f"busy_timeout={_BUSY_MS}", "journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Any) -> None:
    is_write = connection.get_execution_options().get("is_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _open_postgresql(where: str) -> AsyncEngine:
    try:
        url = make_url(where)
    except ArgumentError as error:
        # Not the text itself: it may hold a password.
        raise _bad_url("it is not a URL") from error
    if url.drivername not in {"postgresql", "postgres"} or not url.database:
        raise _bad_url(f"'{url.drivername}' of database '{url.database or ''}' is not postgresql://…/NAME")
    return create_async_engine(
        url.set(drivername="postgresql+psycopg"),
        connect_args={
            "connect_timeout": _CONNECT_SECONDS,
            "application_name": "helios-registry",
            "options": " ".join(f"-c {name}={value}" for name, value in _POSTGRESQL_TIMEOUTS.items()),
        },
        # A server that restarted has closed the connections of the pool: that is noticed here, not by a caller.
        pool_pre_ping=True,
        pool_timeout=_POOL_SECONDS,
    )


def _bad_url(why: str) -> InvalidRequest:
    return InvalidRequest(
        f"the registry's database_url: {why}", reason="INVALID_DATABASE_URL", metadata={"param": "database_url"}
    )
