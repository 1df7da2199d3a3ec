"""Followed sources while other things happen: what is asked for meanwhile wins, and what fails ends nothing else."""

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from helios.mesh.errors import Conflict, Unavailable
from helios.mesh.tasks import task_scope
from helios.registry.client import EventKind
from helios.registry.database import Database
from helios.registry.follow.following import Following, Policy, Wish
from helios.registry.follow.store import FOLLOWED_OTHERWISE, FollowStore, StillFollows
from helios.registry.state import StateDirectory
from helios.registry.store import Store
from tests.registry.support import Parts
from tests.registry.test_follow import HUB, LATER, files_of, hub_and_registry, kinds, look
from tests.registry.test_store import NOW, new

MOVE = replace(HUB, policy=Policy.MOVE)
ROLLOUT = replace(HUB, policy=Policy.ROLLOUT, weight_percent=5)
HOLD = timedelta(minutes=1)
# For what takes a fraction of it, on any machine.
PATIENCE = 60


@asynccontextmanager
async def changed_source(root: Path, wish: Wish) -> AsyncIterator[tuple[Parts, str]]:
    """Yields a registry whose model ``m`` follows a hub that has something new, and the revision that it serves."""
    async with hub_and_registry(root) as (hub, _, parts):
        first = (await parts.ingest("m", "hf:org/m")).model.revision.digest
        await parts.followed.put("m", wish, NOW)
        await look(parts)
        hub.repositories["org/m"].push(files_of(root, 2))
        await parts.followed.look_now("m", datetime.now(UTC))
        yield parts, first


async def claim(store: FollowStore) -> Following:
    due = await store.claim_due(datetime.now(UTC), HOLD)
    assert due is not None
    return due


async def wait_for_change(parts: Parts) -> None:
    async with asyncio.timeout(PATIENCE):
        while (await parts.followed.get("m")).changed_at is None:
            await asyncio.sleep(0.02)


def before(work: Callable[..., Awaitable[Any]], first: Callable[[], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """Returns ``work`` with something that happens right before it."""

    async def both(*arguments: Any, **more: Any) -> Any:
        await first()
        return await work(*arguments, **more)

    return both


Change = Callable[[Parts], Awaitable[object]]
CHANGES: dict[str, Change] = {
    "deleted": lambda parts: parts.catalog.delete_model("m", is_forced=True),
    "stopped": lambda parts: parts.followed.remove("m", NOW),
    "of another policy": lambda parts: parts.followed.put("m", HUB, NOW),
    "of other files": lambda parts: parts.followed.put("m", replace(MOVE, exclude=("*.md",)), NOW),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_what_is_asked_for_during_an_ingest_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    async with changed_source(tmp_path, MOVE) as (parts, first):
        commit = before(parts.catalog.put_model, lambda: CHANGES[change](parts))
        monkeypatch.setattr(parts.catalog, "put_model", commit)
        files = parts.files()
        await parts.follower.look(await claim(parts.followed))
        found = await parts.store.list_models()
        assert [(model.revision.digest, model.tags) for model in found] == (
            [(first, ())] if change != "deleted" else []
        )
        # Nothing of what was ingested is left, and it is nobody's failure.
        assert parts.files() <= files
        assert not {EventKind.SOURCE_CHANGED, EventKind.SOURCE_FAILED} & set(await kinds(parts))


async def test_how_often_a_source_is_looked_at_may_change_during_an_ingest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with changed_source(tmp_path, MOVE) as (parts, first):
        rarely = replace(MOVE, interval=timedelta(days=1))
        commit = before(parts.catalog.put_model, lambda: parts.followed.put("m", rarely, NOW))
        monkeypatch.setattr(parts.catalog, "put_model", commit)
        await parts.follower.look(await claim(parts.followed))
        assert (await parts.store.get_model("m")).revision.digest != first
        assert (await parts.followed.get("m")).next_at == NOW


@pytest.mark.parametrize("change", ["stopped", "of another policy"])
async def test_no_rollout_begins_that_is_not_wanted_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    async with changed_source(tmp_path, ROLLOUT) as (parts, first):
        put = before(parts.rollouts.put, lambda: CHANGES[change](parts))
        monkeypatch.setattr(parts.rollouts, "put", put)
        await parts.follower.look(await claim(parts.followed))
        model = await parts.store.get_model("m")
        assert (model.revision.digest, model.rollout) == (first, None)
        assert EventKind.SOURCE_FAILED not in await kinds(parts)


async def test_an_ingest_that_nobody_wants_any_more_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def never(*_: object) -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    monkeypatch.setattr("helios.registry.follow.follower._KEEP_SECONDS", 0.01)
    async with changed_source(tmp_path, MOVE) as (parts, first), task_scope() as group:
        monkeypatch.setattr(parts.catalog, "put_model", never)
        group.create_task(parts.follower.run(), name="follow")
        async with asyncio.timeout(PATIENCE):
            await begun.wait()
            await parts.followed.remove("m", NOW)
            await ended.wait()
        assert (await parts.store.get_model("m")).revision.digest == first


async def test_a_database_that_fails_for_a_while_ends_no_ingest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = {"claim_due": asyncio.Event(), "keep": asyncio.Event()}

    def failing(name: str) -> Callable[..., Awaitable[None]]:
        async def fail(*_: object) -> None:
            fails[name].set()
            raise Unavailable("the server of the database is another one now")

        return fail

    async def failed() -> None:
        for event in fails.values():
            await event.wait()

    monkeypatch.setattr("helios.registry.follow.follower._KEEP_SECONDS", 0.01)
    async with changed_source(tmp_path, MOVE) as (parts, first), task_scope() as group:
        claim_due = parts.followed.claim_due

        async def claim_once(*arguments: Any) -> Following | None:
            for name in fails:
                monkeypatch.setattr(parts.followed, name, failing(name))
            return await claim_due(*arguments)

        monkeypatch.setattr(parts.followed, "claim_due", claim_once)
        monkeypatch.setattr(parts.catalog, "put_model", before(parts.catalog.put_model, failed))
        following = group.create_task(parts.follower.run(), name="follow")
        await wait_for_change(parts)
        assert (await parts.store.get_model("m")).revision.digest != first
        assert not following.done()


async def test_an_ingest_that_fails_as_nobody_foresaw_is_noted_with_its_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: StateDirectory) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with changed_source(tmp_path, MOVE) as (parts, first):
        with monkeypatch.context() as patch:
            patch.setattr(StateDirectory, "workspace", full)
            found = await look(parts)
        assert (found.error_reason, found.failure_count) == ("INTERNAL", 1)
        assert "OSError" in found.error
        assert (await parts.store.get_model("m")).revision.digest == first
        assert (await look(parts)).error == ""


@pytest.mark.parametrize(
    "other",
    [replace(HUB, include=("*.json",)), MOVE, replace(ROLLOUT, policy=Policy.KEEP), replace(HUB, interval=LATER)],
    ids=["patterns", "policy", "weight", "interval"],
)
async def test_a_look_says_nothing_of_a_wish_that_came_after_it(database: Database, other: Wish) -> None:
    store = Store(database)
    await store.put_model("m", (), new("a"), NOW)
    followed = FollowStore(database, store.changes)
    await followed.put("m", HUB, NOW)
    seen = await followed.claim_due(NOW, HOLD)
    assert seen is not None
    assert await followed.keep(seen, NOW + HOLD)
    await followed.put("m", other, NOW + HOLD)
    await followed.looked(seen, "print", NOW + HOLD, LATER)
    await followed.changed(seen, "print", "sha256:0", NOW + HOLD, LATER)
    expected = Following("m", other, NOW + HOLD)
    assert await followed.get("m") == expected
    guard = StillFollows("m", HUB)
    is_same_manner = other == replace(HUB, interval=other.interval)
    assert await followed.keep(seen, NOW + HOLD) == is_same_manner
    if not is_same_manner:
        async with database.transaction() as connection:
            with pytest.raises(Conflict) as caught:
                await guard.require(connection)
        assert caught.value.reason == FOLLOWED_OTHERWISE
    # Back to what it began with.
    await followed.put("m", HUB, NOW)
    await followed.looked(seen, "print", NOW, LATER)
    assert (await followed.get("m")).fingerprint == "print"
