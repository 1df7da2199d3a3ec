"""Leases and cordons over the contract, on both databases."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path

import pytest
from sqlalchemy import update

from helios.api.registry.v1.cordon_service_pb2_grpc import add_CordonServiceServicer_to_server
from helios.api.registry.v1.lease_service_pb2_grpc import add_LeaseServiceServicer_to_server
from helios.mesh.errors import Conflict, HeliosError, InvalidRequest, PermissionDenied, QuotaExceeded, Unavailable
from helios.mesh.server import MeshServer, ServerOptions
from helios.registry import access
from helios.registry.client import CordonClient, Grant, LeaseClient, LeaseWish
from helios.registry.cordons import store as cordon_store
from helios.registry.cordons.cordons import Cordons
from helios.registry.cordons.servicer import CordonServicer
from helios.registry.cordons.store import CordonStore
from helios.registry.database import Database
from helios.registry.leases import store as lease_store
from helios.registry.leases.servicer import LeaseServicer
from helios.registry.leases.store import LeaseStore
from helios.registry.tables import leases
from tests.registry.support import Mesh

WISH = LeaseWish("proxy-leader", "proxy-1", 30.0, "unix:/1")
OTHER = LeaseWish("proxy-leader", "proxy-2", 30.0, "unix:/2")


@asynccontextmanager
async def serve(
    database: Database, mesh: Mesh, *, listen: str = "127.0.0.1:0", poll_seconds: float | None = None
) -> AsyncIterator[str]:
    """A registry that has these services alone; yields its address."""
    server = MeshServer(
        listen=listen,
        identity=mesh.identity("registry"),
        policy=access.POLICY,
        options=ServerOptions(drain_seconds=1.0),
    )
    cordons = Cordons(CordonStore(database), poll_seconds=poll_seconds)
    add_LeaseServiceServicer_to_server(LeaseServicer(LeaseStore(database)), server.grpc)
    add_CordonServiceServicer_to_server(CordonServicer(cordons), server.grpc)
    server.serve(access.LEASE_SERVICE, access.CORDON_SERVICE)
    async with server:
        try:
            yield server.address
        finally:
            cordons.close()


@asynccontextmanager
async def clients(database: Database, tmp_path: Path) -> AsyncIterator[tuple[LeaseClient, CordonClient]]:
    """A registry, and a proxy's clients of it."""
    async with AsyncExitStack() as stack:
        mesh = Mesh(tmp_path / "pki")
        address = await stack.enter_async_context(serve(database, mesh))
        dialer = await stack.enter_async_context(mesh.dialer(address, "proxy"))
        yield LeaseClient(dialer), CordonClient(dialer)


async def test_a_lease_passes_on_when_it_is_released(database: Database, tmp_path: Path) -> None:
    async with clients(database, tmp_path) as (client, _):
        is_granted, mine = await client.acquire(WISH)
        assert is_granted
        assert (mine.holder, mine.address, mine.epoch) == ("proxy-1", "unix:/1", 1)
        assert 0 < mine.rest_seconds <= 30
        is_granted, held = await client.acquire(OTHER)
        assert (is_granted, held.holder, held.address, held.epoch) == (False, "proxy-1", "unix:/1", 1)
        grant = Grant("proxy-leader", "proxy-1", 1)
        assert (await client.renew(grant, 30.0)).epoch == 1
        assert (await client.release(grant)).holder == ""
        is_granted, theirs = await client.acquire(OTHER)
        assert (is_granted, theirs.holder, theirs.epoch) == (True, "proxy-2", 2)
        with pytest.raises(Conflict) as caught:
            await client.renew(grant, 30.0)
        assert (caught.value.reason, caught.value.metadata["holder"]) == ("LEASE_LOST", "proxy-2")
        assert (await client.release(grant)).holder == "proxy-2"


async def test_a_lease_that_was_not_renewed_is_lost_and_its_epoch_stays_used(
    database: Database, tmp_path: Path
) -> None:
    async with clients(database, tmp_path) as (client, _):
        await client.acquire(WISH)
        async with database.transaction() as connection:
            # By the database's own clock, whatever this process thinks.
            await connection.execute(update(leases).values(begins_at_us=0, ends_at_us=1))
        assert (await client.list())[0].holder == ""
        with pytest.raises(Conflict):
            await client.renew(Grant("proxy-leader", "proxy-1", 1), 30.0)
        is_granted, lease = await client.acquire(OTHER)
        assert (is_granted, lease.epoch) == (True, 2)


async def test_an_epoch_that_was_seen_elsewhere_is_never_granted(database: Database, tmp_path: Path) -> None:
    async with clients(database, tmp_path) as (client, _):
        wish = LeaseWish("proxy-leader", "proxy-1", 30.0, seen_epoch=41)
        assert (await client.acquire(wish))[1].epoch == 42


async def test_of_many_that_ask_at_once_one_is_granted(database: Database) -> None:
    store = LeaseStore(database)
    async with asyncio.TaskGroup() as group:
        asked = [group.create_task(store.acquire(LeaseWish("one", f"h{index}", 30.0))) for index in range(8)]
    assert sum(task.result()[0] for task in asked) == 1
    assert len({task.result()[1].holder for task in asked}) == 1


async def test_names_are_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_store, "MAX_LEASES", 1)
    store = LeaseStore(database)
    await store.acquire(WISH)
    with pytest.raises(QuotaExceeded, match="1 leases"):
        await store.acquire(LeaseWish("other", "proxy-1", 30.0))
    with pytest.raises(InvalidRequest):
        await store.acquire(LeaseWish("proxy-leader", "proxy-1", 0.1))


async def test_all_proxies_hear_of_a_cordon(database: Database, tmp_path: Path) -> None:
    async with clients(database, tmp_path) as (_, client), aclosing(client.watch()) as told:
        assert await anext(told) == ()
        cordons = await client.set("node-1", is_cordoned=True)
        assert [cordon.worker_id for cordon in cordons] == ["node-1"]
        assert await anext(told) == cordons
        assert await client.set("node-1", is_cordoned=True) == cordons
        assert await client.set("node-1", is_cordoned=False) == ()
        assert await anext(told) == ()


async def test_a_cordon_waits_for_a_registry_that_is_just_starting(database: Database, tmp_path: Path) -> None:
    mesh, listen = Mesh(tmp_path / "pki"), f"unix:{tmp_path}/registry"
    async with mesh.dialer(listen, "proxy") as dialer, asyncio.TaskGroup() as group:
        setting = group.create_task(CordonClient(dialer).set("node-1", is_cordoned=True))
        # Time for the first connection to be refused.
        await asyncio.sleep(0.5)
        assert not setting.done()
        async with serve(database, mesh, listen=listen):
            assert [cordon.worker_id for cordon in await setting] == ["node-1"]


async def test_a_cordon_of_another_registry_is_heard_of(database: Database, tmp_path: Path) -> None:
    cordons = Cordons(CordonStore(database), poll_seconds=0.05)
    async with aclosing(cordons.watch()) as told, asyncio.timeout(20):
        assert await anext(told) == ()
        await Cordons(CordonStore(database)).set("node-1", "proxy", is_cordoned=True)
        assert [cordon.worker_id for cordon in await anext(told)] == ["node-1"]
        cordons.close()
        with pytest.raises(Unavailable):
            await anext(told)


async def test_cordons_are_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cordon_store, "MAX_CORDONS", 1)
    cordons = Cordons(CordonStore(database))
    await cordons.set("node-1", "proxy", is_cordoned=True)
    with pytest.raises(QuotaExceeded):
        await cordons.set("node-2", "proxy", is_cordoned=True)
    with pytest.raises(InvalidRequest):
        await cordons.set("node 3", "proxy", is_cordoned=True)


async def test_people_look_and_proxies_lead(tmp_path: Path) -> None:
    mesh = Mesh(tmp_path / "pki")
    database = await Database.open(tmp_path / "registry.db")
    async with serve(database, mesh) as address, mesh.dialer(address, "admin-edge") as admin:
        assert await LeaseClient(admin).list() == []
        with pytest.raises(PermissionDenied):
            await LeaseClient(admin).acquire(WISH)
        async with mesh.dialer(address, "worker") as worker:
            with pytest.raises(HeliosError):
                await LeaseClient(worker).list()
    await database.close()
