"""VersionService over mTLS: every call through the client, who may call what, watches that go on where they ended."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

import pytest

from helios.mesh.errors import (
    Conflict,
    Draining,
    HeliosError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PermissionDenied,
    PreconditionFailed,
    RevisionNotFound,
)
from helios.registry.catalog import Catalog
from helios.registry.client import (
    Cause,
    EngineSettings,
    Event,
    EventKind,
    EventsMissed,
    ModelPolicy,
    ModelSnapshot,
    ModelUpserted,
    RegistryClient,
    VersionClient,
)
from helios.registry.database import Database
from helios.registry.events import Mutation
from helios.registry.store import Store
from helios.registry.watch import WatchHub
from tests.registry.support import Mesh, Parts, open_parts, serve
from tests.registry.test_store import A, B, C, new

T = TypeVar("T")


@pytest.fixture
async def address(parts: Parts, mesh: Mesh) -> AsyncIterator[str]:
    for seed in "abd":
        await parts.catalog.put_model("org/m", ("x",), new(seed))
    async with serve(parts, mesh) as served:
        yield served


@pytest.fixture
async def versions(address: str, mesh: Mesh) -> AsyncIterator[VersionClient]:
    async with mesh.versions(address) as opened:
        yield opened


@pytest.fixture
async def registry(address: str, mesh: Mesh) -> AsyncIterator[RegistryClient]:
    async with mesh.client(address) as opened:
        yield opened


async def next_of(events: AsyncGenerator[T, None]) -> T:
    async with asyncio.timeout(20):
        return await anext(events)


async def test_every_call_of_the_contract(versions: VersionClient, registry: RegistryClient, parts: Parts) -> None:
    assert (await versions.resolve("x")).revision.digest == C
    tagged = await versions.put_tag(f"x@{A[7:19]}", "prod")
    assert tagged == await registry.get_model("org/m")
    assert [(tag.name, tag.revision.digest) for tag in tagged.tags] == [("prod", A)]
    assert (await versions.resolve("org/m@prod")).revision.digest == A
    assert (await versions.put_tag(f"org/m@{B}", "prod")).tags[0].revision.digest == B
    assert (await versions.roll_back("x", "prod")).tags[0].revision.digest == A
    assert (await versions.roll_back("org/m", to=A[7:])).revision.digest == A
    pinned = await versions.put_pin("org/m@prod", "audit")
    assert [(pin.revision, pin.reason) for pin in pinned.pins] == [(A, "audit")]
    assert (await versions.delete_tag("org/m", "prod")).tags == ()
    assert (await versions.delete_pin("org/m")).pins == ()
    assert (await versions.delete_revision(f"org/m@{C}"))[0].revision.digest == A
    assert "d" * 64 not in await parts.store.blobs.read()
    moves = await versions.list_moves("org/m", tag="")
    assert [(move.revision, move.cause, move.actor) for move in moves] == [
        (A, Cause.ROLLBACK, "admin-edge"),
        (C, Cause.INGEST, ""),
        (B, Cause.INGEST, ""),
        (A, Cause.INGEST, ""),
    ]
    every = await versions.list_moves("x")
    assert [move.tag for move in every] == ["prod", "", "prod", "prod", "prod", "", "", ""]
    assert every[0].revision is None
    assert await versions.list_moves("x", limit=3) == every[:3]


async def test_errors_arrive_as_they_were_raised(versions: VersionClient) -> None:
    calls: list[tuple[object, type[HeliosError], str]] = [
        (versions.resolve("n"), ModelNotFound, "MODEL_NOT_FOUND"),
        (versions.resolve("x@prod"), NotFound, "TAG_NOT_FOUND"),
        (versions.resolve("x@000000"), RevisionNotFound, "REVISION_NOT_FOUND"),
        (versions.resolve("x@"), InvalidRequest, "INVALID_TAG"),
        (versions.resolve("x@a b"), InvalidRequest, "INVALID_TAG"),
        (versions.resolve("@prod"), InvalidRequest, "INVALID_MODEL_NAME"),
        (versions.put_tag("x", "cafe12"), InvalidRequest, "INVALID_TAG"),
        (versions.put_tag("x", "prod", expected_version=1), Conflict, "STALE_VERSION"),
        (versions.delete_tag("x", "prod"), NotFound, "TAG_NOT_FOUND"),
        (versions.roll_back("x", to="abc"), InvalidRequest, "INVALID_DIGEST"),
        (versions.roll_back("x", to=C), PreconditionFailed, "NOTHING_TO_ROLL_BACK_TO"),
        (versions.put_pin("x", "two\nlines"), InvalidRequest, "INVALID_REASON"),
        (versions.delete_revision("x"), InvalidRequest, "INVALID_DIGEST"),
        (versions.delete_revision(f"x@{C}"), PreconditionFailed, "REVISION_IN_USE"),
        (versions.list_moves("n"), ModelNotFound, "MODEL_NOT_FOUND"),
    ]
    for call, kind, reason in calls:
        with pytest.raises(kind) as caught:
            await call  # type: ignore[misc]
        assert caught.value.reason == reason


async def test_a_proxy_may_look_and_not_move(address: str, mesh: Mesh) -> None:
    async with mesh.versions(address, "proxy") as proxy:
        assert (await proxy.resolve("x")).revision.digest == C
        assert await proxy.list_moves("x")
        for call in (
            proxy.put_tag("x", "prod"),
            proxy.delete_tag("x", "prod"),
            proxy.roll_back("x"),
            proxy.put_pin("x"),
            proxy.delete_pin("x"),
            proxy.delete_revision(f"x@{A}"),
        ):
            with pytest.raises(PermissionDenied):
                await call
    async with mesh.versions(address, "worker") as worker:
        with pytest.raises(PermissionDenied):
            await worker.resolve("x")


async def test_calls_of_the_registry_are_refused_when_stale_and_made_once(
    versions: VersionClient, registry: RegistryClient, parts: Parts
) -> None:
    seen = (await registry.get_model("x")).version
    await registry.update_policy("x", ModelPolicy(1, 1))
    with pytest.raises(Conflict) as caught:
        await parts.catalog.put_alias("y", "org/m", Mutation(expected_version=seen))
    assert caught.value.reason == "STALE_VERSION"
    for _ in range(2):
        assert (await versions.roll_back("x", request_id="once")).revision.digest == B
    await versions.put_pin("x")
    with pytest.raises(PreconditionFailed) as used:
        await registry.delete_model("org/m")
    assert used.value.reason == "MODEL_IN_USE"
    await registry.delete_model("org/m", is_forced=True)
    assert await registry.list_models() == ()


async def test_settings_that_another_has_changed_meanwhile_are_not_replaced(registry: RegistryClient) -> None:
    seen = await registry.get_model("org/m")
    first = EngineSettings('{"max_context_tokens": 1024}')
    changed = await registry.update_engine_settings("org/m", first, expected_version=seen.version)
    with pytest.raises(Conflict) as caught:
        await registry.update_engine_settings("org/m", EngineSettings(), expected_version=seen.version)
    assert caught.value.reason == "STALE_VERSION"
    assert (await registry.get_model("org/m")).engine_settings == first
    await registry.update_engine_settings("org/m", EngineSettings(), expected_version=changed.version)


async def test_an_ingest_can_leave_alone_what_is_served(
    parts: Parts, mesh: Mesh, model_directory: Path, tmp_path: Path
) -> None:
    first = await parts.ingest("m", model_directory, tags=("prod",))
    (model_directory / "generation_config.json").write_text('{"temperature": 0.5}')
    second = await parts.ingest("m", model_directory, tags=("canary",), keep_served=True)
    tags = {tag.name: tag.revision for tag in second.model.tags}
    assert second.model.revision == tags["prod"] == first.model.revision
    assert tags["canary"] != first.model.revision
    with pytest.raises(InvalidRequest) as caught:
        await parts.ingest("m", model_directory, tags=("cafe12",))
    assert caught.value.reason == "INVALID_TAG"


async def test_events_are_watched_from_a_version(versions: VersionClient, parts: Parts) -> None:
    head = await parts.store.changes.version()
    async with aclosing(versions.watch_events(head - 1)) as old, aclosing(versions.watch_events()) as fresh:
        assert (await next_of(old)).version == head
        waiting = asyncio.ensure_future(anext(fresh))  # noqa: TID251 - awaited below; the watch begins before the change
        try:
            await asyncio.sleep(0.3)
            await versions.put_tag("x", "prod")
            event = await next_of(old)
            assert isinstance(event, Event)
            assert (event.kind, event.model, event.actor) == (EventKind.TAG_MOVED, "org/m", "admin-edge")
            assert event.detail == {"tag": "prod", "revision": C, "cause": "tag"}
            async with asyncio.timeout(20):
                assert await waiting == event
        finally:
            waiting.cancel()


async def test_who_asks_for_more_than_is_known_is_told_so(versions: VersionClient, parts: Parts) -> None:
    head = await parts.store.changes.version()
    async with aclosing(versions.watch_events(head + 5)) as events:
        assert await next_of(events) == EventsMissed(head)
        await versions.put_tag("x", "prod")
        event = await next_of(events)
        assert isinstance(event, Event)
        assert event.version == head + 1


async def test_a_watch_of_events_ends_when_the_registry_stops(parts: Parts) -> None:
    await parts.catalog.put_model("m", (), new("a"))
    async with aclosing(parts.versions.watch_events(0)) as events:
        for _ in range(3):
            await next_of(events)
        parts.hub.close()
        with pytest.raises(Draining):
            await next_of(events)


async def test_a_watch_of_models_goes_on_where_it_ended(versions: VersionClient, registry: RegistryClient) -> None:
    async with aclosing(registry.watch_models()) as models:
        snapshot = await next_of(models)
    assert isinstance(snapshot, ModelSnapshot)
    assert snapshot.version
    tagged = await versions.put_tag("x", "prod")
    async with aclosing(registry.watch_models(snapshot.version)) as models:
        changed = await next_of(models)
        assert changed == ModelUpserted(tagged)
        pinned = await versions.put_pin("x")
        assert await next_of(models) == ModelUpserted(pinned)
    # A version of another registry: everything.
    async with aclosing(registry.watch_models(snapshot.version + 1000)) as models:
        assert await next_of(models) == ModelSnapshot((pinned,))


async def test_watchers_of_one_registry_see_what_another_changes(database: Database, tmp_path: Path) -> None:
    """Two registries on one database: the second one's watcher is told in the order of the changes, once each."""
    async with open_parts(tmp_path / "parts") as parts:
        here, there = (Catalog(Store(database), parts.blobs, WatchHub(), parts.uploads.store) for _ in range(2))
        async with asyncio.TaskGroup() as group:
            following = group.create_task(here.follow(0.02), name="follow")
            async with aclosing(here.watch()) as events:
                assert await next_of(events) == ModelSnapshot(())
                first = await there.put_model("m", (), new("a"))
                assert await next_of(events) == ModelUpserted(first)
                second = await here.put_model("n", (), new("b"))
                assert await next_of(events) == ModelUpserted(second)
                third = await there.update_policy("n", ModelPolicy(1, 1))
                assert await next_of(events) == ModelUpserted(third)
            following.cancel()
