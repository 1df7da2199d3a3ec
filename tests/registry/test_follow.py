"""Followed sources: a hub, a web directory and a bucket that change; policies, failures, restarts, registries."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from helios.mesh.errors import HeliosError, InvalidRequest, NotFound, PermissionDenied
from helios.mesh.tasks import task_scope
from helios.registry.client import EventKind, FollowClient
from helios.registry.follow.following import MAX_INTERVAL, Following, Policy, Wish, next_pause
from helios.registry.follow.store import FollowStore
from helios.registry.names import Reference
from helios.registry.sources.settings import HuggingFaceSettings, SourceSettings, StoreSettings
from helios.registry.store import Store
from tests.emulators import faulty_proxy as faults
from tests.emulators.buckets import s3_client
from tests.emulators.faulty_proxy import FaultyProxy
from tests.emulators.hugging_face import HuggingFace, hugging_face
from tests.emulators.servers import Emulator
from tests.registry import tiny
from tests.registry.stores import Place, opened
from tests.registry.support import Mesh, Parts, open_parts, serve
from tests.registry.test_pull_places import Server, serving
from tests.registry.test_store import NOW, new

HUB = Wish("hf:org/m")
LATER = timedelta(days=1)


def files_of(directory: Path, seed: int) -> dict[str, bytes]:
    made = tiny.write_model(directory / f"seed-{seed}", seed=seed)
    return {path.name: path.read_bytes() for path in made.iterdir()}


@asynccontextmanager
async def hub_and_registry(root: Path) -> AsyncIterator[tuple[HuggingFace, FaultyProxy, Parts]]:
    async with hugging_face() as hub:
        hub.repository("org/m", files_of(root, 1))
        with FaultyProxy(hub.address) as proxy:
            endpoint = HuggingFaceSettings(endpoint=f"http://{proxy.address}", token_file=None)
            async with open_parts(root / "registry", source_settings=SourceSettings(hugging_face=endpoint)) as parts:
                yield hub, proxy, parts


async def look(parts: Parts, name: str = "m") -> Following:
    """Looks at what a model follows, as the follower does when it is due; returns how that went."""
    await parts.followed.look_now(name, datetime.now(UTC))
    due = await parts.followed.claim_due(datetime.now(UTC), timedelta(minutes=1))
    assert due is not None
    assert due.model == name
    await parts.follower.look(due)
    return await parts.followed.get(name)


async def kinds(parts: Parts) -> list[EventKind]:
    events = await parts.store.changes.list_events(after=0, limit=1000)
    assert events is not None
    return [event.kind for event in events if event.kind.name.startswith("SOURCE")]


async def test_a_hub_that_has_nothing_new_costs_two_requests_and_no_bytes(tmp_path: Path) -> None:
    async with hub_and_registry(tmp_path) as (hub, _, parts):
        done = await parts.ingest("m", "hf:org/m")
        await parts.followed.put("m", HUB, NOW)
        before = await parts.store.get_model("m")
        hub.requests.clear()
        for _ in range(2):
            found = await look(parts)
            assert (found.error, found.changed_at) == ("", None)
            assert found.checked_at is not None
            assert found.next_at - found.checked_at >= timedelta(minutes=54)
        assert all("/api/models/" in path for _, path, _ in hub.requests)
        assert len(hub.requests) == 4
        after = await parts.store.get_model("m")
        assert after.revision.digest == done.model.revision.digest
        # Who watches models hears nothing of looks.
        assert after.version == before.version
        assert await kinds(parts) == [EventKind.SOURCE_FOLLOWED]


@pytest.mark.parametrize("policy", list(Policy))
async def test_a_commit_becomes_a_revision_and_the_policy_says_who_gets_it(tmp_path: Path, policy: Policy) -> None:
    async with hub_and_registry(tmp_path) as (hub, _, parts):
        first = (await parts.ingest("m", "hf:org/m")).model.revision.digest
        await parts.followed.put("m", replace(HUB, policy=policy, weight_percent=5), NOW)
        await look(parts)
        hub.repositories["org/m"].push(files_of(tmp_path, 2))
        found = await look(parts)
        assert (found.error, found.changed_at) == ("", found.checked_at)
        model = await parts.store.get_model("m")
        revisions = [revision.digest for _, revision in await parts.store.list_revisions("m", before=None, limit=9)]
        newest = revisions[0]
        assert revisions == [newest, first]
        tags = {tag.name: tag.revision.digest for tag in model.tags}
        rollout = (model.rollout.revision.digest, model.rollout.weight_percent) if model.rollout else None
        expected = {
            Policy.KEEP: (first, {"next": newest}, None),
            Policy.MOVE: (newest, {}, None),
            Policy.ROLLOUT: (first, {"next": newest}, (newest, 5)),
        }
        assert (model.revision.digest, tags, rollout) == expected[policy]
        assert await kinds(parts) == [EventKind.SOURCE_FOLLOWED, EventKind.SOURCE_CHANGED]
        assert await look(parts) != found
        assert (await parts.store.get_model("m")).version == model.version


async def test_a_web_directory_is_followed_by_its_etags(tmp_path: Path) -> None:
    files = files_of(tmp_path, 1)
    async with serving(Server(files)) as server, open_parts(tmp_path / "registry") as parts:
        await follows_what_changes(parts, f"{server.address}/files", files, files_of(tmp_path, 2))
        assert {method for method, _ in server.requests} == {"HEAD", "GET"}
        # Without a hash or an ETag there is no telling; that is said rather than all of it fetched at each look.
        server.is_ranged = False
        found = await look(parts)
        assert (found.error_reason, found.failure_count) == ("SOURCE_NOT_FOLLOWABLE", 1)


async def test_a_bucket_is_followed_by_its_etags(
    tmp_path: Path, seaweedfs_server: Emulator, seaweedfs_bucket: str
) -> None:
    first, second = files_of(tmp_path, 1), files_of(tmp_path, 2)
    options = {name.removeprefix("aws_"): SecretStr(value) for name, value in seaweedfs_server.options.items()}
    options |= {"allow_http": SecretStr("true")}
    prefix = f"followed-{tmp_path.name}"
    with closing(s3_client(seaweedfs_server)) as client:

        class Bucket(dict[str, bytes]):
            def update(self, files: Mapping[str, bytes]) -> None:  # type: ignore[override]
                for path, content in files.items():
                    client.put_object(Bucket=seaweedfs_bucket, Key=f"{prefix}/{path}", Body=content)

        bucket = Bucket()
        bucket.update(first)
        settings = SourceSettings(stores=StoreSettings(s3=options))
        async with open_parts(tmp_path / "registry", source_settings=settings) as parts:
            await follows_what_changes(parts, f"s3://{seaweedfs_bucket}/{prefix}", bucket, second)


async def follows_what_changes(parts: Parts, source: str, place: dict[str, bytes], second: dict[str, bytes]) -> None:
    first = (await parts.ingest("m", source)).model.revision.digest
    await parts.followed.put("m", Wish(source, policy=Policy.MOVE), NOW)
    assert (await look(parts)).changed_at is None
    assert (await parts.store.get_model("m")).revision.digest == first
    place.update(second)
    found = await look(parts)
    assert (found.error, found.changed_at) == ("", found.checked_at)
    assert (await parts.store.get_model("m")).revision.digest != first


async def test_a_place_that_fails_is_asked_later_and_later_and_told_of_once(tmp_path: Path) -> None:
    async with hub_and_registry(tmp_path) as (_, proxy, parts):
        digest = (await parts.ingest("m", "hf:org/m")).model.revision.digest
        await parts.followed.put("m", HUB, NOW)
        await look(parts)
        proxy.inject(faults.status(404, times=2))
        for count in (1, 2):
            found = await look(parts)
            assert (found.error_reason, found.failure_count) == ("SOURCE_NOT_FOUND", count)
            assert "hf:org/m" in found.error
        assert (await parts.store.get_model("m")).revision.digest == digest
        assert await kinds(parts) == [EventKind.SOURCE_FOLLOWED, EventKind.SOURCE_FAILED]
        found = await look(parts)
        assert (found.error, found.error_reason, found.failure_count) == ("", "", 0)


async def test_a_place_is_not_asked_before_it_wants_to_be(tmp_path: Path) -> None:
    async with hub_and_registry(tmp_path) as (_, proxy, parts):
        await parts.ingest("m", "hf:org/m")
        await parts.followed.put("m", HUB, NOW)
        proxy.inject(faults.status(429, retry_after=36_000, times=9))
        found = await look(parts)
        assert (found.error_reason, found.failure_count) == ("SOURCE_UNAVAILABLE", 1)
        assert found.checked_at is not None
        assert found.next_at - found.checked_at >= timedelta(hours=10)


async def test_a_revision_that_cannot_be_ingested_leaves_what_is_served(tmp_path: Path) -> None:
    async with hub_and_registry(tmp_path) as (hub, _, parts):
        digest = (await parts.ingest("m", "hf:org/m")).model.revision.digest
        await parts.followed.put("m", replace(HUB, policy=Policy.MOVE), NOW)
        await look(parts)
        hub.repositories["org/m"].push(files_of(tmp_path, 2) | {"config.json": b"{}"})
        found = await look(parts)
        assert (found.error_reason, found.changed_at) == ("UNSUPPORTED_FORMAT", None)
        assert (await parts.store.get_model("m")).revision.digest == digest
        hub.repositories["org/m"].push(files_of(tmp_path, 3))
        assert (await look(parts)).error == ""
        assert (await parts.store.get_model("m")).revision.digest != digest


async def test_what_was_rolled_back_from_is_not_served_again_unless_the_source_changes(tmp_path: Path) -> None:
    async with hub_and_registry(tmp_path) as (hub, _, parts):
        first = (await parts.ingest("m", "hf:org/m")).model.revision.digest
        await parts.followed.put("m", replace(HUB, policy=Policy.MOVE), NOW)
        await look(parts)
        hub.repositories["org/m"].push(files_of(tmp_path, 2))
        await look(parts)
        await parts.versions.roll_back("m")
        await look(parts)
        # Nor by who follows it anew, whose first look finds what the model has already.
        await parts.followed.remove("m", NOW)
        await parts.followed.put("m", replace(HUB, policy=Policy.MOVE), NOW)
        await look(parts)
        assert (await parts.store.get_model("m")).revision.digest == first


async def test_it_goes_on_after_a_restart(tmp_path: Path) -> None:
    async with hugging_face() as hub:
        hub.repository("org/m", files_of(tmp_path, 1))
        settings = SourceSettings(hugging_face=HuggingFaceSettings(endpoint=hub.endpoint, token_file=None))
        async with open_parts(tmp_path / "registry", source_settings=settings) as parts:
            first = (await parts.ingest("m", "hf:org/m")).model.revision.digest
            await parts.followed.put("m", replace(HUB, policy=Policy.MOVE, interval=timedelta(seconds=10)), NOW)
            await look(parts)
        hub.repositories["org/m"].push(files_of(tmp_path, 2))
        async with open_parts(tmp_path / "registry", source_settings=settings) as parts, task_scope() as group:
            # Its interval is not waited for.
            await parts.followed.look_now("m", datetime.now(UTC))
            group.create_task(parts.follower.run(), name="follow")
            async with asyncio.timeout(60):
                while (await parts.store.get_model("m")).revision.digest == first:
                    await asyncio.sleep(0.05)
                while (await parts.followed.get("m")).changed_at is None:
                    await asyncio.sleep(0.05)


async def test_the_contract_over_mtls(tmp_path: Path, mesh: Mesh) -> None:
    async with hub_and_registry(tmp_path) as (_, _, parts), serve(parts, mesh) as address:
        await parts.ingest("org/m", "hf:org/m", aliases=("x",))
        async with mesh.dialer(address, "admin-edge") as dialer:
            client = FollowClient(dialer)
            wish = Wish("hf:org/m@main", ("*.json",), ("x*",), timedelta(minutes=5), Policy.ROLLOUT, 7)
            made = await client.put("x", wish)
            assert (made.model, made.wish, made.checked_at, made.error) == ("org/m", wish, None, "")
            assert await client.get("org/m") == made
            assert (await client.look_now("x")).wish == wish
            for bad in (replace(wish, source="/models/x"), replace(wish, interval=timedelta(seconds=1))):
                with pytest.raises(InvalidRequest):
                    await client.put("x", bad)
            await client.remove("x")
            await client.remove("x")
            with pytest.raises(NotFound) as caught:
                await client.get("x")
            assert caught.value.reason == "NOT_FOLLOWED"
        async with mesh.dialer(address, "proxy") as other:
            with pytest.raises(PermissionDenied):
                await FollowClient(other).get("x")


async def test_a_dry_run_follows_nothing_and_has_nothing_looked_at(
    tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hub_and_registry(tmp_path) as (_, _, parts), serve(parts, mesh) as address:
        woken: list[None] = []
        monkeypatch.setattr(parts.follower, "wake", lambda: woken.append(None))
        await parts.ingest("m", "hf:org/m")
        before = await parts.store.get_model("m")
        async with mesh.dialer(address, "admin-edge") as dialer:
            client = FollowClient(dialer)
            assert (await client.put("m", HUB, is_dry_run=True)).wish == HUB
            with pytest.raises(NotFound):
                await client.get("m")
            assert (await parts.store.get_model("m"), woken) == (before, [])
            await client.put("m", HUB)
            assert woken == [None]
            await client.remove("m", is_dry_run=True)
            assert (await client.get("m")).wish == HUB


async def test_of_several_registries_one_looks_and_another_if_that_dies(place: Place) -> None:
    async with opened(place) as database:
        store = Store(database)
        for name in ("a", "b"):
            await store.put_model(name, (), new("a"), NOW)
        registries = [FollowStore(database, store.changes) for _ in range(2)]
        await registries[0].put("a", HUB, NOW)
        await registries[0].put("b", HUB, NOW + timedelta(seconds=1))
        hold = timedelta(minutes=1)
        first = await registries[0].claim_due(NOW + hold, hold)
        second = await registries[1].claim_due(NOW + hold, hold)
        assert first is not None
        assert second is not None
        assert (first.model, second.model) == ("a", "b")
        assert await registries[0].claim_due(NOW + hold, hold) is None
        await registries[0].keep(first, NOW + 4 * hold)
        again = await registries[1].claim_due(NOW + 3 * hold, hold)
        assert again is not None
        assert again.model == "b"
        await registries[1].looked(again, "print", NOW + 3 * hold, LATER)
        kept = await registries[0].get("b")
        assert (kept.fingerprint, kept.next_at) == ("print", NOW + 3 * hold + LATER)
        # What is followed otherwise meanwhile is looked at anew, whatever an older look says.
        await registries[0].put("b", Wish("hf:org/other"), NOW)
        await registries[1].failed(again, HeliosError("late", reason="LATE"), NOW, LATER)
        assert (await registries[0].get("b")).error == ""
        await store.delete_model("b", NOW, is_forced=True)
        with pytest.raises(NotFound):
            await registries[0].get("b")
        assert (await registries[0].get("a")).wish == HUB


async def test_a_rollout_that_runs_keeps_its_weight(tmp_path: Path) -> None:
    async with hub_and_registry(tmp_path) as (hub, _, parts):
        await parts.ingest("m", "hf:org/m")
        await parts.followed.put("m", replace(HUB, policy=Policy.ROLLOUT, weight_percent=5), NOW)
        await look(parts)
        second = files_of(tmp_path, 2)
        hub.repositories["org/m"].push(second)
        await look(parts)
        model = await parts.store.get_model("m")
        assert model.rollout is not None
        target = Reference("m", digest=model.rollout.revision.digest)
        await parts.rollouts.put(target, 60, NOW)
        # Another commit, of which nothing is taken.
        hub.repositories["org/m"].push(second | {"notes.txt": b"n"})
        await look(parts)
        model = await parts.store.get_model("m")
        assert model.rollout is not None
        assert model.rollout.weight_percent == 60


@given(st.timedeltas(timedelta(seconds=10), MAX_INTERVAL), st.integers(0, 100), st.floats(0, 1e9), st.floats(0, 0.999))
def test_pauses_grow_to_a_bound_and_honour_what_was_asked(
    interval: timedelta, count: int, asked: float, chance: float
) -> None:
    pause = next_pause(interval, failure_count=count, retry_after_seconds=asked or None, chance=chance)
    if not count:
        assert interval * 0.9 <= pause <= interval * 1.1
        return
    assert pause >= min(timedelta(seconds=asked), MAX_INTERVAL) if asked < 1e8 else pause >= MAX_INTERVAL
    unasked = next_pause(interval, failure_count=count, retry_after_seconds=None, chance=chance)
    assert timedelta(seconds=30) <= unasked <= max(interval, timedelta(hours=6))
    later = next_pause(interval, failure_count=count + 1, retry_after_seconds=None, chance=chance)
    assert later >= unasked
