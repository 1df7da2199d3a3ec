"""API keys: told once, recognised by their hashes, refused as soon as they end, and every change in the audit log."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import structlog.testing

from helios.api.registry.v1.key_service_pb2_grpc import add_KeyServiceServicer_to_server
from helios.mesh.errors import (
    HeliosError,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    Unavailable,
)
from helios.mesh.names import KEY_PREFIX
from helios.mesh.server import MeshServer, ServerOptions
from helios.registry import access
from helios.registry.client import KeyClient, KeySpec, Priority, StoredKey, hash_secret
from helios.registry.database import Database
from helios.registry.keys import store as key_store
from helios.registry.keys.keys import Keys
from helios.registry.keys.servicer import KeyServicer
from helios.registry.keys.store import KeyStore
from tests.registry.support import Mesh

NOW = datetime(2026, 11, 22, tzinfo=UTC)
SPEC = KeySpec(
    "web", "shop", ("smol*",), requests_per_minute=60, tokens_per_minute=10_000, priority=Priority.HIGH, weight=3
)


@asynccontextmanager
async def serve(keys: Keys, mesh: Mesh) -> AsyncIterator[str]:
    server = MeshServer(
        listen="127.0.0.1:0",
        identity=mesh.identity("registry"),
        policy=access.POLICY,
        options=ServerOptions(drain_seconds=1.0),
    )
    add_KeyServiceServicer_to_server(KeyServicer(keys), server.grpc)
    server.serve(access.KEY_SERVICE)
    async with server:
        try:
            yield server.address
        finally:
            keys.close()


async def test_the_secret_is_told_once_and_only_its_hash_is_kept(database: Database) -> None:
    keys = Keys(KeyStore(database))
    key, secret = await keys.create(SPEC, "admin-edge")
    stored = await anext(keys.watch())
    assert stored == (StoredKey(key, hash_secret(secret)),)
    assert secret.startswith(KEY_PREFIX)
    assert (key.tenant, key.models, key.priority, key.weight) == ("shop", ("smol*",), Priority.HIGH, 3)
    async with database.snapshot() as connection:
        rows = (await connection.exec_driver_sql("SELECT * FROM api_keys")).all()
    assert secret not in repr(rows)
    assert secret.removeprefix(KEY_PREFIX) not in repr(rows)


async def test_an_ended_key_is_told_to_nobody(database: Database) -> None:
    now = [NOW]
    keys = Keys(KeyStore(database), now=lambda: now[0])
    brief, _ = await keys.create(KeySpec("brief", ttl=timedelta(hours=1)), "admin-edge")
    await keys.create(KeySpec("gone"), "admin-edge")
    await keys.revoke("gone", "admin-edge")
    assert [stored.key.id for stored in await anext(keys.watch())] == [brief.id]
    now[0] = NOW + timedelta(hours=1)
    assert await anext(keys.watch()) == ()
    assert await keys.list(show_ended=False) == []
    assert {key.name for key in await keys.list(show_ended=True)} == {"brief", "gone"}
    # The name is free again.
    again, _ = await keys.create(KeySpec("gone"), "admin-edge")
    assert (await keys.revoke("gone", "admin-edge")).id == again.id


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        (KeySpec(""), "name"),
        (KeySpec("Upper"), "name"),
        (KeySpec("web", tenant="a/b"), "tenant"),
        (KeySpec("web", models=("",)), "models"),
        (KeySpec("web", models=("m",) * 65), "models"),
        (KeySpec("web", weight=1001), "weight"),
        (KeySpec("web", ttl=timedelta()), "ttl"),
        (KeySpec("web", ttl=timedelta(days=9_999_999 * 40)), "ttl"),
        (KeySpec("taken"), "name"),
    ],
)
async def test_a_key_that_can_not_be_is_refused_with_the_field(database: Database, spec: KeySpec, param: str) -> None:
    keys = Keys(KeyStore(database))
    await keys.create(KeySpec("taken"), "admin-edge")
    with pytest.raises(InvalidRequest) as caught:
        await keys.create(spec, "admin-edge")
    assert (caught.value.reason, caught.value.metadata["param"]) == ("INVALID_KEY", param)


async def test_a_key_that_is_not_there_can_not_be_revoked(database: Database) -> None:
    with pytest.raises(NotFound) as caught:
        await Keys(KeyStore(database)).revoke("nobody", "admin-edge")
    assert caught.value.reason == "KEY_NOT_FOUND"


async def test_changes_are_in_the_audit_log_and_secrets_are_not(database: Database) -> None:
    keys = Keys(KeyStore(database))
    with structlog.testing.capture_logs() as lines:
        key, secret = await keys.create(SPEC, "admin-edge")
        await keys.revoke(key.id, "admin-edge")
    audits = [line for line in lines if line["event"] == "audit"]
    assert [(line["what"], line["actor"], line["key"]) for line in audits] == [
        ("create key", "admin-edge", key.id),
        ("revoke key", "admin-edge", key.id),
    ]
    assert secret.removeprefix(KEY_PREFIX) not in repr(lines)


async def test_whoever_watches_is_told_of_each_change(tmp_path: Path, mesh: Mesh) -> None:
    database = await Database.open(tmp_path / "registry.db")
    keys = Keys(KeyStore(database))
    async with (
        serve(keys, mesh) as address,
        mesh.dialer(address, "proxy") as dialer,
        mesh.dialer(address, "admin-edge") as people,
        asyncio.timeout(20),
    ):
        watch = KeyClient(dialer).watch()
        assert await anext(watch) == ()
        key, secret = await KeyClient(people).create(SPEC)
        assert await anext(watch) == (StoredKey(key, hash_secret(secret)),)
        assert await KeyClient(people).list() == [key]
        assert (await KeyClient(people).revoke("web")).revoked_at is not None
        assert await anext(watch) == ()
        keys.close()
        with pytest.raises(Unavailable):
            await anext(watch)
    await database.close()


class Counting(KeyStore):
    """Counts how often the table is looked at, and how often its keys are read."""

    looks = 0
    reads = 0

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.has_looked_often = asyncio.Event()

    async def changes(self) -> tuple[int, int]:
        self.looks += 1
        if self.looks >= 6:
            self.has_looked_often.set()
        return await super().changes()

    async def alive(self, now: datetime) -> tuple[StoredKey, ...]:
        self.reads += 1
        return await super().alive(now)


async def test_one_look_is_for_all_who_watch(database: Database) -> None:
    store = Counting(database)
    keys = Keys(store, poll_seconds=600)
    async with asyncio.timeout(60), aclosing(keys.watch()) as one, aclosing(keys.watch()) as other:
        assert (await anext(one), await anext(other)) == ((), ())
        assert (store.looks, store.reads) == (2, 1)
        key, secret = await keys.create(SPEC, "admin-edge")
        stored = (StoredKey(key, hash_secret(secret)),)
        assert (await anext(one), await anext(other)) == (stored, stored)
        assert (store.looks, store.reads) == (3, 2)


async def test_another_registrys_changes_are_told_and_keys_are_read_only_then(database: Database) -> None:
    store, elsewhere = Counting(database), Keys(KeyStore(database))
    keys = Keys(store, poll_seconds=0.02)
    async with asyncio.timeout(60), aclosing(keys.watch()) as watch, asyncio.TaskGroup() as group:
        assert await anext(watch) == ()
        told = group.create_task(anext(watch), name="watch")
        await store.has_looked_often.wait()
        assert store.reads == 1
        key, secret = await elsewhere.create(SPEC, "admin-edge")
        assert await told == (StoredKey(key, hash_secret(secret)),)
        await elsewhere.revoke(key.id, "admin-edge")
        assert await anext(watch) == ()
        assert store.reads == 3


async def test_lists_and_keys_are_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_store, "_MAX_ENDED", 2)
    now = [NOW]
    keys = Keys(KeyStore(database), now=lambda: now[0])
    for name in ("first", "a", "b", "c"):
        now[0] += timedelta(seconds=1)
        await keys.create(KeySpec(name), "admin-edge")
    for name in ("a", "b", "c"):
        await keys.revoke(name, "admin-edge")
    assert [key.name for key in await keys.list(show_ended=False)] == ["first"]
    assert [key.name for key in await keys.list(show_ended=True)] == ["c", "b", "first"], "who lives is never left out"
    monkeypatch.setattr(key_store, "MAX_KEYS", 1)
    with pytest.raises(PreconditionFailed) as refused:
        await keys.create(KeySpec("more"), "admin-edge")
    assert refused.value.reason == "TOO_MANY_KEYS"


@pytest.mark.parametrize("component", ["proxy", "worker", "edge"])
async def test_only_people_manage_keys(tmp_path: Path, mesh: Mesh, component: str) -> None:
    database = await Database.open(tmp_path / "registry.db")
    async with serve(Keys(KeyStore(database)), mesh) as address, mesh.dialer(address, component) as dialer:
        client = KeyClient(dialer)
        for call in (client.create(SPEC), client.list(), client.revoke("web")):
            with pytest.raises(HeliosError) as caught:
                await call
            assert isinstance(caught.value, PermissionDenied)
    await database.close()


async def test_people_are_not_told_what_recognises_keys(tmp_path: Path, mesh: Mesh) -> None:
    database = await Database.open(tmp_path / "registry.db")
    async with serve(Keys(KeyStore(database)), mesh) as address, mesh.dialer(address, "admin-edge") as dialer:
        with pytest.raises(PermissionDenied):
            await anext(KeyClient(dialer).watch())
    await database.close()
