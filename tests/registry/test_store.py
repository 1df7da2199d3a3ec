"""The store's promises, on SQLite and on PostgreSQL: names, revisions, tags, pins, history, numbers of changes."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
import structlog

from helios.mesh.errors import (
    AlreadyExists,
    Conflict,
    HeliosError,
    InvalidRequest,
    ModelNotFound,
    NotFound,
    PreconditionFailed,
    RevisionNotFound,
)
from helios.registry.artifact_store import ArtifactStore
from helios.registry.artifacts import NewArtifact
from helios.registry.database import Database
from helios.registry.engine_settings import EngineSettings
from helios.registry.events import Event, EventKind, Mutation
from helios.registry.history import Cause
from helios.registry.manifest import MEDIA_ARTIFACT, MEDIA_CONFIG, MEDIA_WEIGHT, Digest, Entry, Manifest
from helios.registry.names import MAX_TAGS, Reference, parse_reference
from helios.registry.policy import ModelPolicy
from helios.registry.profile import ModelProfile
from helios.registry.records import ModelDeleted, ModelUpserted
from helios.registry.store import NewRevision, Store
from helios.registry.tag_store import TagStore
from tests.registry.stores import Place, opened

NOW = datetime(2030, 1, 1, tzinfo=UTC)
PROFILE = ModelProfile("LlamaForCausalLM", 10, 20, "bfloat16", 4, 128, 2, 100)
SHARED = Digest("c" * 64, 7)


def new(seed: str, **more: object) -> NewRevision:
    """Returns a revision with one blob of its own and one that all revisions share."""
    manifest = Manifest.of(
        [Entry("model.safetensors", Digest(seed * 64, 100), MEDIA_WEIGHT), Entry("config.json", SHARED, MEDIA_CONFIG)]
    )
    return NewRevision(manifest, PROFILE, f"dir:/models/{seed}", **more)  # type: ignore[arg-type]


def digest(seed: str) -> str:
    return new(seed).manifest.digest()


A, B, C = digest("a"), digest("b"), digest("d")
SEEDS = {"a": A, "b": B, "d": C}


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


@pytest.fixture
def tags(database: Database, store: Store) -> TagStore:
    return TagStore(database, store.changes)


async def put(store: Store, name: str, *seeds: str, **more: object) -> None:
    for seed in seeds:
        await store.put_model(name, (), new(seed, **more), NOW)


async def resolved(store: Store, reference: str) -> str:
    return (await store.resolve(parse_reference(reference))).revision.digest


async def events_of(store: Store, after: int = 0) -> list[Event]:
    found = await store.changes.list_events(after=after, limit=1000)
    assert found is not None
    return found


async def test_a_name_or_alias_with_nothing_means_what_is_served(store: Store) -> None:
    await store.put_model("org/m", ("x",), new("a"), NOW)
    await put(store, "org/m", "b")
    assert await resolved(store, "org/m") == await resolved(store, "x") == B
    assert (await store.resolve(parse_reference("x"))).model == await store.get_model("org/m")


async def test_a_revision_is_found_by_the_beginning_of_its_digest(store: Store) -> None:
    await put(store, "m", "a", "b")
    await put(store, "other", "d")
    for length in (6, 12, 64):
        assert await resolved(store, f"m@{A[7 : 7 + length]}") == A
        assert await resolved(store, f"m@{A[: 7 + length]}") == A
    for wrong in (f"m@{C[7:20]}", "m@sha256:000000"):
        with pytest.raises(RevisionNotFound):
            await resolved(store, wrong)


async def test_a_beginning_of_several_digests_is_refused(database: Database, store: Store) -> None:
    await put(store, "m", "a", "b")
    with pytest.raises(InvalidRequest) as caught:
        await store.resolve(Reference("m", digest="sha256:"))
    assert caught.value.reason == "AMBIGUOUS_REVISION"


async def test_a_tag_is_moved_for_all_its_names(store: Store, tags: TagStore) -> None:
    await store.put_model("m", ("x",), new("a"), NOW)
    await put(store, "m", "b")
    await tags.put_tag(parse_reference(f"x@{A}"), "prod", NOW)
    assert await resolved(store, "m@prod") == await resolved(store, "x@prod") == A
    model = await tags.put_tag(parse_reference("m"), "prod", NOW + timedelta(seconds=1))
    assert [(tag.name, tag.revision.digest, tag.moved_at) for tag in model.tags] == [
        ("prod", B, NOW + timedelta(seconds=1))
    ]
    assert (await store.list_models())[0] == model
    await tags.put_tag(parse_reference("m@prod"), "canary", NOW)
    assert await resolved(store, "m@canary") == B
    await tags.delete_tag("m", "prod", NOW)
    for missing in ("m@prod", "x@prod"):
        with pytest.raises(NotFound) as caught:
            await resolved(store, missing)
        assert caught.value.reason == "TAG_NOT_FOUND"
    assert await resolved(store, "m") == B


async def test_a_tag_names_revisions_of_its_own_model_only(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a")
    await put(store, "n", "b")
    with pytest.raises(RevisionNotFound):
        await tags.put_tag(parse_reference(f"m@{B}"), "prod", NOW)
    with pytest.raises(ModelNotFound):
        await tags.put_tag(parse_reference("o"), "prod", NOW)


async def test_tags_are_bounded(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b")
    for number in range(MAX_TAGS):
        await tags.put_tag(parse_reference("m"), f"t{number}", NOW)
    with pytest.raises(PreconditionFailed) as caught:
        await tags.put_tag(parse_reference("m"), "one-more", NOW)
    assert caught.value.reason == "TOO_MANY_TAGS"
    await tags.put_tag(parse_reference(f"m@{A}"), "t0", NOW)


async def test_an_ingest_may_leave_alone_what_is_served(store: Store) -> None:
    await put(store, "m", "a", tags=("canary",), is_served=False)
    await put(store, "m", "b", tags=("canary",), is_served=False)
    # The first revision of a model is served whatever was asked: a model serves one.
    assert await resolved(store, "m") == A
    assert await resolved(store, "m@canary") == B
    assert [revision.digest for _, revision in await store.list_revisions("m", before=None, limit=9)] == [B, A]


async def test_rolling_back_goes_one_further_each_time(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b", "d")
    for expected in (B, A):
        model = await tags.roll_back("m", "", NOW)
        assert model.revision.digest == expected
    with pytest.raises(PreconditionFailed) as caught:
        await tags.roll_back("m", "", NOW)
    assert caught.value.reason == "NOTHING_TO_ROLL_BACK_TO"
    causes = [(move.revision, move.cause) for move in await tags.list_moves("m", tag="", before=None, limit=9)]
    assert causes == [
        (A, Cause.ROLLBACK),
        (B, Cause.ROLLBACK),
        (C, Cause.INGEST),
        (B, Cause.INGEST),
        (A, Cause.INGEST),
    ]


async def test_rolling_back_to_a_named_revision(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b", "d")
    await put(store, "m", "e", is_served=False)
    assert (await tags.roll_back("m", "", NOW, to=Reference("m", digest=A))).revision.digest == A
    for never in (digest("e"), A):
        with pytest.raises(PreconditionFailed):
            await tags.roll_back("m", "", NOW, to=Reference("m", digest=never))


async def test_a_tag_that_was_deleted_begins_anew(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b")
    await tags.put_tag(parse_reference(f"m@{A}"), "prod", NOW)
    await tags.delete_tag("m", "prod", NOW)
    await tags.put_tag(parse_reference("m"), "prod", NOW)
    with pytest.raises(PreconditionFailed):
        await tags.roll_back("m", "prod", NOW)
    with pytest.raises(NotFound):
        await tags.roll_back("m", "canary", NOW)
    moves = await tags.list_moves("m", tag="prod", before=None, limit=9)
    assert [(move.revision, move.cause) for move in moves] == [(B, Cause.TAG), (None, Cause.DELETE), (A, Cause.TAG)]


async def test_moves_come_in_pages(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b", "a", "b", "d")
    found: list[str | None] = []
    before = None
    while page := await tags.list_moves("m", tag=None, before=before, limit=2):
        before = page[-1].version
        found += [move.revision for move in page]
    assert found == [C, B, A, B, A]


async def test_a_revision_that_something_points_at_is_not_deleted(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b", "d", "e")
    await tags.put_tag(parse_reference(f"m@{A}"), "prod", NOW)
    await tags.put_pin(parse_reference(f"m@{B}"), "audit", NOW)
    for used, why in ((A, "tag 'prod'"), (B, "audit"), (digest("e"), "served")):
        with pytest.raises(PreconditionFailed, match=why) as caught:
            await tags.delete_revision(Reference("m", digest=used), NOW)
        assert caught.value.reason == "REVISION_IN_USE"
    await tags.delete_revision(Reference("m", digest=C), NOW)
    assert set(await store.blobs.read()) == {"a" * 64, "b" * 64, "e" * 64, SHARED.hash}
    with pytest.raises(RevisionNotFound):
        await store.get_manifest(C)
    # What was deleted is passed over on the way back; the history still knows it.
    assert (await tags.roll_back("m", "", NOW)).revision.digest == B
    assert C in {move.revision for move in await tags.list_moves("m", tag="", before=None, limit=9)}


async def test_a_revision_that_another_model_has_stays_for_that_one(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b")
    await put(store, "n", "a")
    await tags.delete_revision(Reference("m", digest=A), NOW)
    assert (await store.get_manifest(A))[1].digest == A
    assert await resolved(store, "n") == A
    with pytest.raises(RevisionNotFound):
        await resolved(store, f"m@{A}")


async def test_pins_hold_revision_and_model(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b")
    await tags.put_pin(parse_reference(f"m@{A}"), "audit", NOW)
    model = await tags.put_pin(parse_reference(f"m@{A}"), "another reason", NOW)
    assert [(pin.revision, pin.reason) for pin in model.pins] == [(A, "audit")]
    with pytest.raises(PreconditionFailed, match="pin") as caught:
        await store.delete_model("m", NOW, is_forced=False)
    assert caught.value.reason == "MODEL_IN_USE"
    for _ in range(2):
        assert (await tags.delete_pin(parse_reference(f"m@{A}"), NOW)).pins == ()
    await store.delete_model("m", NOW, is_forced=False)
    assert await store.blobs.read() == {}


async def test_a_model_that_settings_of_another_name_is_deleted_by_force_only(store: Store) -> None:
    await put(store, "draft", "a")
    await put(store, "draft2", "b")
    settings = EngineSettings('{"speculative_decoding": {"method": "draft_model", "draft_model": "draft"}}')
    assert settings.required_models, "the test's settings name no model"
    await put(store, "m", "d", engine_settings=settings)
    with pytest.raises(PreconditionFailed, match="engine settings of 'm'"):
        await store.delete_model("draft", NOW, is_forced=False)
    await store.delete_model("draft2", NOW, is_forced=False)
    await store.delete_model("draft", NOW, is_forced=True)
    assert [model.name for model in await store.list_models()] == ["m"]


async def test_names_sort_by_their_bytes_everywhere(store: Store) -> None:
    names = ["B", "Z-1", "Z.1", "a", "a-b", "a/b", "a0", "b"]
    for name in reversed(names):
        await put(store, name, "a")
    assert [model.name for model in await store.list_models()] == sorted(names)
    assert [model.name for model in await store.list_models(after="Z-1", limit=3)] == ["Z.1", "a", "a-b"]


async def test_changes_are_numbered_without_gaps_and_left_on_the_model(store: Store, tags: TagStore) -> None:
    start = await store.changes.version()
    await store.put_model("m", ("x",), new("a"), NOW)
    await put(store, "n", "b")
    await store.put_alias("x", "n", NOW)
    await store.update_policy("m", ModelPolicy(1, 2), NOW, Mutation(actor="proxy"))
    await tags.put_tag(parse_reference("n"), "prod", NOW)
    await store.delete_model("n", NOW, is_forced=False)
    found = await events_of(store, start)
    assert [event.version for event in found] == list(range(start + 1, start + 1 + len(found)))
    assert [(event.model, event.kind.value) for event in found] == [
        ("m", "model_created"),
        ("m", "revision_added"),
        ("m", "served_moved"),
        ("m", "alias_added"),
        ("n", "model_created"),
        ("n", "revision_added"),
        ("n", "served_moved"),
        ("m", "alias_removed"),
        ("n", "alias_added"),
        ("m", "policy_changed"),
        ("n", "tag_moved"),
        ("n", "model_deleted"),
    ]
    changed = next(event for event in found if event.kind is EventKind.POLICY_CHANGED)
    assert (await store.get_model("m")).version == changed.version
    assert (changed.actor, changed.at) == ("proxy", NOW)
    assert next(event.detail for event in found if event.kind is EventKind.TAG_MOVED) == {
        "tag": "prod",
        "revision": B,
        "cause": "tag",
    }


async def test_what_somebody_asked_for_is_in_the_audit_log_once_and_only_where_it_was_done(
    store: Store, tags: TagStore
) -> None:
    await put(store, "m", "a")
    asked = Mutation(actor="admin-edge", request_id="1")
    with structlog.testing.capture_logs() as lines:
        for _ in range(2):
            await store.update_policy("m", ModelPolicy(1, 2), NOW, asked)
        await tags.put_tag(parse_reference("m"), "prod", NOW, Mutation(actor="admin-edge"))
        # What the registry does by itself, what changes nothing, and what is refused after it was begun.
        await store.put_alias("x", "m", NOW)
        await store.update_policy("m", ModelPolicy(1, 2), NOW, Mutation(actor="admin-edge"))
        with pytest.raises(Conflict):
            await store.update_policy("m", ModelPolicy(3, 4), NOW, Mutation(actor="admin-edge", expected_version=1))
    assert [line for line in lines if line["event"] == "audit"] == [
        {
            "event": "audit",
            "log_level": "info",
            "what": "policy changed",
            "actor": "admin-edge",
            "model": "m",
            "min_replicas": "1",
            "max_replicas": "2",
            "scaling": "{}",
        },
        {
            "event": "audit",
            "log_level": "info",
            "what": "tag moved",
            "actor": "admin-edge",
            "model": "m",
            "tag": "prod",
            "revision": A,
            "cause": "tag",
        },
    ]


async def test_a_dry_run_says_what_would_be_and_changes_nothing(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a")
    await put(store, "m", "b")
    await store.put_alias("x", "m", NOW)
    before, version = await store.snapshot(), await store.changes.version()
    asked = Mutation(actor="admin-edge", request_id="1", is_dry_run=True)
    with structlog.testing.capture_logs() as lines:
        assert (await store.update_policy("m", ModelPolicy(1, 2), NOW, asked)).policy == ModelPolicy(1, 2)
        settings = EngineSettings('{"max_context_tokens": 99}')
        assert (await store.update_engine_settings("m", settings, NOW, asked)).engine_settings == settings
        assert (await store.put_alias("y", "m", NOW, asked)).aliases == ("x", "y")
        await store.delete_alias("x", NOW, asked)
        tagged = await tags.put_tag(parse_reference(f"m@{A}"), "prod", NOW, asked)
        assert [(tag.name, tag.revision.digest) for tag in tagged.tags] == [("prod", A)]
        _, gone = await tags.delete_revision(parse_reference(f"m@{A}"), NOW, asked)
        assert gone == {"a" * 64: 100}
        assert (await store.delete_model("m", NOW, asked, is_forced=False)).keys() == {"a" * 64, "b" * 64, "c" * 64}
        # What the call would refuse, a dry run refuses, too.
        with pytest.raises(NotFound):
            await store.delete_alias("y", NOW, asked)
        stale = Mutation(expected_version=1, is_dry_run=True)
        with pytest.raises(Conflict):
            await store.update_policy("m", ModelPolicy(1, 2), NOW, stale)
    assert not lines
    assert (await store.snapshot(), await store.changes.version()) == (before, version)
    # The request's id was not used up.
    meant = Mutation(actor="admin-edge", request_id="1")
    assert (await store.update_policy("m", ModelPolicy(3, 4), NOW, meant)).policy == ModelPolicy(3, 4)


async def test_what_changes_nothing_is_no_change(store: Store, tags: TagStore) -> None:
    await store.put_model("m", ("x",), new("a", tags=("t",), engine_settings=EngineSettings()), NOW)
    await store.update_policy("m", ModelPolicy(1, 2), NOW)
    await tags.put_pin(parse_reference("m"), "", NOW)
    version = await store.changes.version()
    await store.put_model("m", ("x",), new("a", tags=("t",), engine_settings=EngineSettings()), NOW)
    await store.update_policy("m", ModelPolicy(1, 2), NOW)
    await store.put_alias("x", "m", NOW)
    await tags.put_tag(parse_reference("m@t"), "t", NOW)
    await tags.put_pin(parse_reference("m"), "again", NOW)
    assert await store.changes.version() == version


async def test_a_change_of_what_was_changed_meanwhile_is_refused(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b")
    seen = (await store.get_model("m")).version
    stale, fresh = Mutation(expected_version=seen - 1), Mutation(expected_version=seen)
    calls = [
        lambda how: store.put_alias("x", "m", NOW, how),
        lambda how: store.update_policy("m", ModelPolicy(1, 1), NOW, how),
        lambda how: store.update_engine_settings("m", EngineSettings(), NOW, how),
        lambda how: tags.put_tag(Reference("m", digest=A), "prod", NOW, how),
        lambda how: tags.roll_back("m", "", NOW, how),
        lambda how: tags.put_pin(Reference("m"), "", NOW, how),
        lambda how: tags.delete_pin(Reference("m"), NOW, how),
        lambda how: tags.delete_revision(Reference("m", digest=A), NOW, how),
        lambda how: store.delete_model("m", NOW, how, is_forced=False),
    ]
    for call in calls:
        with pytest.raises(Conflict) as caught:
            await call(stale)  # type: ignore[no-untyped-call]
        assert caught.value.reason == "STALE_VERSION"
        assert caught.value.metadata["version"] == str(seen)
    assert await store.changes.version() == seen
    await store.update_policy("m", ModelPolicy(1, 1), NOW, fresh)
    with pytest.raises(Conflict):
        await store.update_policy("m", ModelPolicy(1, 2), NOW, fresh)


async def test_a_request_that_is_sent_again_changes_nothing(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b", "d")
    once = Mutation(request_id="r-1")
    assert (await tags.roll_back("m", "", NOW, once)).revision.digest == B
    version = await store.changes.version()
    for _ in range(3):
        assert (await tags.roll_back("m", "", NOW, once)).revision.digest == B
    assert await store.changes.version() == version
    with pytest.raises(InvalidRequest) as caught:
        await tags.roll_back("m", "prod", NOW, once)
    assert caught.value.reason == "REQUEST_ID_REUSED"
    await store.delete_model("m", NOW, Mutation(request_id="r-2"), is_forced=False)
    await store.delete_model("m", NOW, Mutation(request_id="r-2"), is_forced=False)
    with pytest.raises(ModelNotFound):
        await store.delete_model("m", NOW, Mutation(request_id="r-3"), is_forced=False)


async def test_a_request_that_failed_may_be_sent_again(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a")
    once = Mutation(request_id="r-1")
    with pytest.raises(PreconditionFailed):
        await tags.roll_back("m", "", NOW, once)
    await put(store, "m", "b")
    assert (await tags.roll_back("m", "", NOW, once)).revision.digest == A


async def test_requests_are_forgotten_after_a_day(store: Store, tags: TagStore) -> None:
    await put(store, "m", "a", "b", "d")
    once = Mutation(request_id="r-1")
    await tags.roll_back("m", "", NOW, once)
    later = NOW + timedelta(days=1, seconds=1)
    await store.update_policy("m", ModelPolicy(1, 1), later, Mutation(request_id="r-2"))
    assert (await tags.roll_back("m", "", later, once)).revision.digest == A


@pytest.mark.parametrize("request_id", ["x" * 129, "a\nb"])
async def test_a_request_id_is_short_and_printable(store: Store, request_id: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await store.delete_alias("x", NOW, Mutation(request_id=request_id))
    assert caught.value.reason == "INVALID_REQUEST_ID"


async def test_of_two_changes_of_the_same_version_one_wins(place: Place) -> None:
    """Two registries on one database, as a test of the queue of writers: nobody overwrites what another has done."""
    async with opened(place) as one, opened(place) as other:
        stores = [Store(one), Store(other)]
        await put(stores[0], "m", "a")
        seen = (await stores[1].get_model("m")).version

        async def change(number: int) -> str:
            try:
                how = Mutation(expected_version=seen)
                await stores[number % 2].update_policy("m", ModelPolicy(1, number + 1), NOW, how)
            except HeliosError as error:
                return error.reason
            return "done"

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            tasks = [group.create_task(change(number), name=f"change {number}") for number in range(6)]
        assert sorted(task.result() for task in tasks) == ["STALE_VERSION"] * 5 + ["done"]


async def test_what_changed_since_is_told_once_a_model_as_it_is_now(store: Store) -> None:
    await put(store, "m", "a")
    await put(store, "n", "a")
    version = await store.changes.version()
    assert await store.changes_since(version) == []
    await put(store, "m", "b", "d")
    await store.delete_model("n", NOW, is_forced=False)
    await store.update_policy("m", ModelPolicy(1, 1), NOW)
    head = await store.changes.version()
    changes = await store.changes_since(version)
    assert changes is not None
    assert changes == [ModelDeleted("n"), ModelUpserted(await store.get_model("m"))]
    # Who was told of the first one only must not pass over the second.
    assert [change.version for change in changes] == [version, head]
    assert (await store.snapshot()).version == head


async def test_changes_that_are_not_kept_any_more_are_not_told_in_part(database: Database) -> None:
    kept = 16
    store = Store(database, kept_events=kept)
    await put(store, "m", "a")
    # What is too old goes at every 64th change.
    while await store.changes.version() < 80:
        await store.update_policy("m", ModelPolicy(0, await store.changes.version()), NOW)
    head = await store.changes.version()
    oldest = 64 - kept + 1
    assert await store.changes.list_events(after=oldest - 2, limit=9) is None
    assert await store.changes_since(oldest - 2) is None
    assert [event.version for event in await events_of(store, oldest - 1)] == list(range(oldest, head + 1))
    assert await store.changes_since(oldest - 1) == [ModelUpserted(await store.get_model("m"))]
    # A number that is yet to come is another database's.
    assert await store.changes.list_events(after=head + 1, limit=9) is None
    assert await store.changes_since(head + 1) is None


async def test_artifacts_end_with_their_revision(database: Database, store: Store, tags: TagStore) -> None:
    artifacts = ArtifactStore(database)
    await put(store, "m", "a", "b")
    manifest = Manifest.of([Entry("graph.bin", Digest("f" * 64, 5), MEDIA_ARTIFACT)])
    made = NewArtifact("compile-cache", "e" * 64, "{}", A, "worker-1", manifest)
    assert (await artifacts.put(made, NOW, quota_bytes=100))[0][1]
    assert not (await artifacts.put(made, NOW, quota_bytes=100))[1]
    assert await artifacts.used_bytes() == 5
    await artifacts.note_use(
        "compile-cache", "e" * 64, used_at=NOW + timedelta(hours=1), unless_since=NOW + timedelta(minutes=1)
    )
    (listed,) = await artifacts.list_page(revision=A, after=("", ""), limit=9)
    assert listed.used_at == NOW + timedelta(hours=1)
    assert await artifacts.find_manifest(manifest.digest()) == manifest
    await tags.delete_revision(Reference("m", digest=A), NOW)
    assert await artifacts.find("compile-cache", "e" * 64) is None
    assert "f" * 64 not in await store.blobs.read()


async def test_an_alias_is_taken_once(store: Store) -> None:
    await store.put_model("m", ("x",), new("a"), NOW)
    for name, aliases in (("x", ()), ("n", ("x",)), ("o", ("m",))):
        with pytest.raises(AlreadyExists):
            await store.put_model(name, aliases, new("b"), NOW)
    assert set(await store.blobs.read()) == {"a" * 64, SHARED.hash}
