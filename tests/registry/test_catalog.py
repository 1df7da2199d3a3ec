"""Store, blobs and watchers together: names mean one thing, watchers see everything, nothing used is deleted."""

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest

from helios.mesh.errors import (
    AlreadyExists,
    Corrupted,
    Draining,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PreconditionFailed,
    RevisionNotFound,
    Unavailable,
)
from helios.registry.manifest import MEDIA_CONFIG, MEDIA_WEIGHT, Digest, Entry, Manifest
from helios.registry.policy import ModelPolicy
from helios.registry.profile import ModelProfile
from helios.registry.records import ModelDeleted, ModelSnapshot, ModelUpserted, WatchEvent
from helios.registry.store import NewRevision, Store
from tests.registry.support import Parts, open_parts

PROFILE = ModelProfile("LlamaForCausalLM", 10, 20, "bfloat16", 4, 128, 2, 100)
SHARED = Digest("c" * 64, 7)


def revision(seed: str) -> NewRevision:
    """Returns a revision with one blob of its own and one that all revisions share."""
    manifest = Manifest.of(
        [Entry("model.safetensors", Digest(seed * 64, 100), MEDIA_WEIGHT), Entry("config.json", SHARED, MEDIA_CONFIG)]
    )
    return NewRevision(manifest, PROFILE, f"dir:/models/{seed}")


async def next_of(events: AsyncGenerator[WatchEvent, None]) -> WatchEvent:
    async with asyncio.timeout(5):
        return await anext(events)


async def test_a_model_is_found_by_name_and_alias(parts: Parts) -> None:
    model = await parts.catalog.put_model("a/model", ("b", "a"), revision("1"))
    assert model.aliases == ("a", "b")
    assert model.revision.digest == revision("1").manifest.digest()
    assert model.revision.size_bytes == 107
    assert model.revision.profile == PROFILE
    for name in ("a/model", "a", "b"):
        assert await parts.store.get_model(name) == model
    with pytest.raises(ModelNotFound):
        await parts.store.get_model("c")


async def test_putting_a_model_again_keeps_policy_aliases_and_birthday(parts: Parts) -> None:
    first = await parts.catalog.put_model("m", ("x",), revision("1"))
    await parts.catalog.update_policy("x", ModelPolicy(1, 2))
    again = await parts.catalog.put_model("m", (), revision("1"))
    assert again == dataclasses.replace(first, policy=ModelPolicy(1, 2))


async def test_names_mean_one_thing(parts: Parts) -> None:
    await parts.catalog.put_model("m", ("x",), revision("1"))
    await parts.catalog.put_model("n", (), revision("2"))
    for name, aliases in (("x", ()), ("n", ("x",)), ("o", ("x",)), ("o", ("m",))):
        with pytest.raises(AlreadyExists) as caught:
            await parts.catalog.put_model(name, aliases, revision("3"))
        assert caught.value.reason == "ALIAS_TAKEN"
    with pytest.raises(AlreadyExists) as caught:
        await parts.catalog.put_alias("n", "m")
    assert caught.value.reason == "MODEL_EXISTS"
    assert [model.name for model in await parts.store.list_models()] == ["m", "n"]


async def test_revisions_newest_first_and_going_back_makes_an_old_one_the_newest(parts: Parts) -> None:
    for seed in ("1", "2", "2", "1"):
        await parts.catalog.put_model("m", (), revision(seed))
    found = await parts.store.list_revisions("m", before=None, limit=10)
    assert [entry.digest for _, entry in found] == [revision(seed).manifest.digest() for seed in ("1", "2")]
    ordinal = found[0][0]
    assert [entry.digest for _, entry in await parts.store.list_revisions("m", before=ordinal, limit=10)] == [
        revision("2").manifest.digest()
    ]


async def test_a_manifest_comes_back_as_it_was(parts: Parts) -> None:
    model = await parts.catalog.put_model("m", (), revision("1"))
    manifest, found = await parts.store.get_manifest(model.revision.digest)
    assert manifest == revision("1").manifest
    assert found == model.revision
    with pytest.raises(RevisionNotFound):
        await parts.store.get_manifest("sha256:" + "0" * 64)


async def test_a_lost_blob_is_reported_not_served(parts: Parts) -> None:
    model = await parts.catalog.put_model("m", (), revision("1"))
    with pytest.raises(Corrupted) as caught:
        await parts.catalog.locate(model.revision.digest)
    assert caught.value.reason == "BLOB_MISSING"


async def test_deleting_removes_what_only_this_model_used(parts: Parts) -> None:
    await parts.catalog.put_model("m", ("x",), revision("1"))
    await parts.catalog.put_model("m", (), revision("2"))
    await parts.catalog.put_model("n", (), revision("2"))
    await parts.catalog.delete_model("m")
    assert set(await parts.store.blobs.read()) == {"2" * 64, SHARED.hash}
    with pytest.raises(RevisionNotFound):
        await parts.store.get_manifest(revision("1").manifest.digest())
    with pytest.raises(ModelNotFound):
        await parts.store.get_model("x")
    await parts.catalog.delete_model("n")
    assert await parts.store.blobs.read() == {}
    with pytest.raises(ModelNotFound):
        await parts.catalog.delete_model("n")


async def test_an_alias_is_not_a_name_to_delete(parts: Parts) -> None:
    await parts.catalog.put_model("m", ("x",), revision("1"))
    with pytest.raises(ModelNotFound):
        await parts.catalog.delete_model("x")


@pytest.mark.parametrize("policy", [ModelPolicy(3, 2), ModelPolicy(0, 1 << 20), ModelPolicy(1 << 20, 0)])
async def test_refuses_policies(parts: Parts, policy: ModelPolicy) -> None:
    await parts.catalog.put_model("m", (), revision("1"))
    with pytest.raises(InvalidRequest) as caught:
        await parts.catalog.update_policy("m", policy)
    assert caught.value.reason == "INVALID_POLICY"
    assert (await parts.store.get_model("m")).policy == ModelPolicy()


async def test_a_conversion_is_remembered_as_long_as_its_revision(parts: Parts) -> None:
    new = dataclasses.replace(revision("1"), converted_from=("f" * 64, "converter-1"))
    await parts.catalog.put_model("m", (), new)
    assert await parts.store.find_conversion("f" * 64, "converter-1") == new.manifest.digest()
    assert await parts.store.find_conversion("f" * 64, "converter-2") is None
    await parts.catalog.delete_model("m")
    assert await parts.store.find_conversion("f" * 64, "converter-1") is None


async def test_a_watch_sees_all_models_and_then_every_change(parts: Parts) -> None:
    first = await parts.catalog.put_model("m", (), revision("1"))
    async with aclosing(parts.catalog.watch()) as events:
        assert await next_of(events) == ModelSnapshot((first,))
        second = await parts.catalog.put_model("n", (), revision("2"))
        assert await next_of(events) == ModelUpserted(second)
        await parts.catalog.put_alias("x", "m")
        await parts.catalog.put_alias("x", "n")
        await parts.catalog.put_alias("x", "n")
        await parts.catalog.delete_alias("x")
        await parts.catalog.update_policy("m", ModelPolicy(1, 1))
        await parts.catalog.delete_model("m")
        seen = [await next_of(events) for _ in range(6)]
    shown = [(event.model.name, event.model.aliases) for event in seen[:5] if isinstance(event, ModelUpserted)]
    # A moved alias changes two models; moving it where it is changes none.
    assert shown == [("m", ("x",)), ("m", ()), ("n", ("x",)), ("n", ()), ("m", ())]
    assert seen[5] == ModelDeleted("m")
    assert parts.hub.watcher_count == 0


async def test_a_watch_that_races_with_writes_loses_nothing(parts: Parts) -> None:
    """Whatever the interleaving, applying the changes to the snapshot gives the final state."""

    async def write(name: str) -> None:
        for seed in "123":
            await parts.catalog.put_model(name, (), revision(seed))

    async def follow(delay_seconds: float) -> None:
        await asyncio.sleep(delay_seconds)
        state: dict[str, str] = {}
        async with aclosing(parts.catalog.watch()) as events:
            while state != {name: revision("3").manifest.digest() for name in "abc"}:
                match await next_of(events):
                    case ModelSnapshot(models):
                        state = {model.name: model.revision.digest for model in models}
                    case ModelUpserted(model):
                        state[model.name] = model.revision.digest

    async with asyncio.TaskGroup() as group:
        for name in "abc":
            group.create_task(write(name), name=f"write {name}")
        for number in range(5):
            group.create_task(follow(number * 0.01), name=f"follow {number}")


async def test_a_watcher_that_is_too_slow_is_sent_away(tmp_path: Path) -> None:
    async with open_parts(tmp_path / "r", queue_size=2) as parts:
        slow, quick = parts.catalog.watch(), parts.catalog.watch()
        async with aclosing(slow), aclosing(quick):
            await next_of(slow)
            await next_of(quick)
            for seed in "1234":
                await parts.catalog.put_model(seed, (), revision(seed))
                assert isinstance(await next_of(quick), ModelUpserted)
            assert isinstance(await next_of(slow), ModelUpserted)
            assert isinstance(await next_of(slow), ModelUpserted)
            with pytest.raises(Unavailable) as caught:
                await next_of(slow)
    assert caught.value.reason == "WATCH_OVERFLOW"


async def test_watches_end_when_the_registry_stops(parts: Parts) -> None:
    async with aclosing(parts.catalog.watch()) as events:
        await next_of(events)
        parts.hub.close()
        with pytest.raises(Draining):
            await next_of(events)
    async with aclosing(parts.catalog.watch()) as events:
        await next_of(events)
        with pytest.raises(Draining):
            await next_of(events)


async def test_a_write_whose_caller_leaves_is_published_all_the_same(parts: Parts) -> None:
    async with aclosing(parts.catalog.watch()) as events:
        await next_of(events)
        async with asyncio.TaskGroup() as group:
            task = group.create_task(parts.catalog.put_model("m", (), revision("1")), name="put")
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            task.cancel()
        assert await next_of(events) == ModelUpserted(await parts.store.get_model("m"))


async def test_deleting_an_alias_that_is_not_there(parts: Parts) -> None:
    with pytest.raises(NotFound) as caught:
        await parts.catalog.delete_alias("x")
    assert caught.value.reason == "ALIAS_NOT_FOUND"


async def test_a_state_directory_has_one_owner(parts: Parts) -> None:
    with pytest.raises(PreconditionFailed) as caught:
        async with open_parts(parts.state.root):
            pass
    assert caught.value.reason == "STATE_DIRECTORY_IN_USE"


async def test_everything_is_there_after_a_restart(tmp_path: Path) -> None:
    async with open_parts(tmp_path / "r") as parts:
        await parts.catalog.put_model("m", ("x",), revision("1"))
        before = await parts.catalog.update_policy("m", ModelPolicy(1, 0))
    async with open_parts(tmp_path / "r") as parts:
        assert await parts.store.list_models() == [before]


async def test_a_transaction_that_fails_changes_nothing(parts: Parts) -> None:
    bad = dataclasses.replace(revision("1"), profile=dataclasses.replace(PROFILE, dtype=object()))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        await parts.catalog.put_model("m", ("x",), bad)
    assert await parts.store.list_models() == []
    assert await parts.store.blobs.read() == {}


async def test_many_models_in_pages(parts: Parts) -> None:
    names = [f"m{number:03d}" for number in range(25)]
    for name in names:
        await parts.catalog.put_model(name, (f"{name}-alias",), revision("1"))
    found: list[str] = []
    store: Store = parts.store
    while page := await store.list_models(after=found[-1] if found else "", limit=10):
        assert all(model.aliases == (f"{model.name}-alias",) for model in page)
        found += [model.name for model in page]
    assert found == names
