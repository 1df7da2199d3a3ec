"""Both databases: schemas that are brought up to date once, refusals, transactions, and what errors mean."""

import asyncio
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, func, insert, select, text, update

from helios.mesh.errors import (
    Conflict,
    Corrupted,
    HeliosError,
    InvalidRequest,
    PreconditionFailed,
    Unavailable,
)
from helios.registry.database import Database
from helios.registry.manifest import Digest
from helios.registry.migrate import HEAD, SCRIPTS
from helios.registry.policy import ModelPolicy
from helios.registry.store import Store
from helios.registry.tables import blobs, metadata
from tests.registry.stores import Place, opened

FIXTURES = Path(__file__).with_name("databases")
FIRST, SECOND = "sha256:" + "1" * 64, "sha256:" + "2" * 64


async def versions_of(database: Database) -> list[str]:
    async with database.snapshot() as connection:
        rows = await connection.execute(text("SELECT version_num FROM alembic_version"))
        return list(rows.scalars())


async def test_the_tables_are_what_the_steps_make(empty_place: Place) -> None:
    def compare(connection: Connection) -> int:
        return len(compare_metadata(MigrationContext.configure(connection), metadata))

    async with opened(empty_place) as database, database.transaction() as connection:
        assert await connection.run_sync(compare) == 0


def test_the_code_knows_its_newest_step() -> None:
    assert ScriptDirectory(str(SCRIPTS)).get_current_head() == f"{HEAD:04d}"


def test_a_step_has_no_way_back() -> None:
    for step in ScriptDirectory(str(SCRIPTS)).walk_revisions():
        assert not hasattr(step.module, "downgrade"), step.revision


@pytest.mark.parametrize("version", [1, 2, 3])
async def test_a_database_of_an_earlier_version_is_brought_up_to_date_in_place(tmp_path: Path, version: int) -> None:
    path = tmp_path / "registry.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((FIXTURES / f"version-{version}.sql").read_text())
    for _ in range(2):
        database = await Database.open(path)
        assert await versions_of(database) == [f"{HEAD:04d}"]
        store = Store(database)
        first, second = await store.list_models()
        assert (first.name, first.aliases, first.revision.digest) == ("org/first", ("other",), SECOND)
        assert (second.name, second.revision.digest, second.policy) == ("second", FIRST, ModelPolicy(1, 3))
        kept = '{"max_context_tokens": 64}' if version > 1 else "{}"
        assert first.engine_settings.document == kept
        manifest, revision = await store.get_manifest(SECOND)
        assert [entry.digest for entry in manifest.entries] == [Digest("c" * 64, 7), Digest("b" * 64, 200)]
        assert revision.profile.max_context_tokens == 128
        assert await store.find_conversion("f" * 64, "converter-1") == SECOND
        await database.close()


async def test_a_database_of_a_newer_helios_is_refused_and_left_alone(place: Place) -> None:
    async with opened(place) as database:
        async with database.transaction() as connection:
            await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(PreconditionFailed, match="schema 9999, this Helios knows") as caught:
            await Database.open(place)
        assert caught.value.reason == "SCHEMA_MISMATCH"
        assert await versions_of(database) == ["9999"]


async def test_a_database_of_a_newer_helios_from_before_alembic_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((FIXTURES / "version-3.sql").read_text())
        connection.execute("UPDATE schema_version SET version = 99")
        connection.commit()
    with pytest.raises(PreconditionFailed, match="schema 99"):
        await Database.open(path)


async def test_registries_that_start_together_take_each_step_once(empty_place: Place) -> None:
    """A step that ran twice would fail: its tables are there."""

    async def opened() -> Database:
        while True:
            # A registry whose wait for the others' steps was too long ends, and is started again.
            with suppress(Unavailable):
                return await Database.open(empty_place)

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        opening = [group.create_task(opened(), name=f"open {number}") for number in range(4)]
    databases = [task.result() for task in opening]
    assert [await versions_of(database) for database in databases] == [[f"{HEAD:04d}"]] * 4
    for database in databases:
        await database.close()


async def test_a_transaction_that_fails_changes_nothing(database: Database) -> None:
    async def fail() -> None:
        async with database.transaction() as connection:
            await connection.execute(insert(blobs).values(hash="a" * 64, size_bytes=1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    async with database.snapshot() as connection:
        assert (await connection.execute(select(func.count()).select_from(blobs))).scalar_one() == 0


async def test_a_row_that_may_not_be_is_a_conflict(database: Database) -> None:
    for row in ({"hash": "a" * 64, "size_bytes": -1}, {"hash": None, "size_bytes": 1}):
        with pytest.raises(Conflict):
            async with database.transaction() as connection:
                await connection.execute(insert(blobs).values(row))


async def test_writers_queue_so_that_what_they_have_read_still_holds(place: Place) -> None:
    """Each reads the size, waits, and writes one more: without a queue some would count from the same size."""
    async with opened(place) as first, opened(place) as second:
        async with first.transaction() as connection:
            await connection.execute(insert(blobs).values(hash="a" * 64, size_bytes=0))

        async def count(database: Database) -> None:
            async with database.transaction() as connection:
                size = (await connection.execute(select(blobs.c.size_bytes))).scalar_one()
                await asyncio.sleep(0.005)
                await connection.execute(update(blobs).values(size_bytes=size + 1))

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            for number in range(8):
                group.create_task(count(first if number % 2 else second), name=f"count {number}")
        async with second.snapshot() as connection:
            assert (await connection.execute(select(blobs.c.size_bytes))).scalar_one() == 8


async def test_a_snapshot_is_of_one_moment_and_waits_for_nobody(database: Database) -> None:
    async with asyncio.timeout(20), database.snapshot() as reading:
        query = select(func.count()).select_from(blobs)
        assert (await reading.execute(query)).scalar_one() == 0
        async with database.transaction() as writing:
            await writing.execute(insert(blobs).values(hash="a" * 64, size_bytes=1))
        assert (await reading.execute(query)).scalar_one() == 0
    async with database.snapshot() as reading:
        assert (await reading.execute(query)).scalar_one() == 1


async def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database, " * 1000)
    with pytest.raises(Corrupted):
        await Database.open(tmp_path / "registry.db")


@pytest.mark.parametrize(
    "url", ["", "nothing", "mysql://host/name", "postgresql://host", "sqlite:///file.db", "postgresql+asyncpg://h/n"]
)
async def test_a_url_of_nothing_that_is_known_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await Database.open(url.replace("://", "://user:secret@"))
    assert caught.value.reason == "INVALID_DATABASE_URL"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("postgresql://helios@/helios?host=/nowhere", Unavailable),
        ("postgresql://helios@127.0.0.1:1/helios", Unavailable),
    ],
)
async def test_a_server_that_is_not_there_is_unavailable(url: str, kind: type[HeliosError]) -> None:
    with pytest.raises(kind):
        await Database.open(url)
