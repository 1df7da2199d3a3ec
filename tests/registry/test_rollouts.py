"""Rollouts: what the store keeps, what ends one, what one protects; the contract over mTLS; any order of calls."""

import asyncio
from collections.abc import Awaitable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from helios.mesh.errors import (
    Conflict,
    HeliosError,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    PreconditionFailed,
    RevisionNotFound,
)
from helios.registry.client import EventKind, RolloutClient
from helios.registry.database import Database
from helios.registry.events import Mutation
from helios.registry.history import Cause
from helios.registry.names import Reference
from helios.registry.profile import ModelProfile
from helios.registry.rollout.steps import Act
from helios.registry.rollout.store import RolloutStore
from helios.registry.store import Store
from helios.registry.tag_store import TagStore
from tests.registry.stores import Templates
from tests.registry.support import Mesh, Parts, serve
from tests.registry.test_store import NOW, SEEDS, A, B, C, events_of, new, put

T = TypeVar("T")


@pytest.fixture
def store(database: Database) -> Store:
    return Store(database)


@pytest.fixture
def tags(database: Database, store: Store) -> TagStore:
    return TagStore(database, store.changes)


@pytest.fixture
async def rollouts(database: Database, store: Store) -> RolloutStore:
    await put(store, "m", "a", "b", "d")
    return RolloutStore(database, store.changes)


def to(digest: str) -> Reference:
    return Reference("m", digest=digest)


async def refused(call: Awaitable[object], kind: type[HeliosError], reason: str) -> None:
    with pytest.raises(kind) as caught:
        await call
    assert caught.value.reason == reason


async def test_a_rollout_is_the_models_with_its_steps_and_events(store: Store, rollouts: RolloutStore) -> None:
    before = await store.changes.version()
    model = await rollouts.put(to(A), 10, NOW, Mutation(actor="admin-edge"))
    assert model.rollout is not None
    assert (model.rollout.revision.digest, model.rollout.weight_percent, model.rollout.started_at) == (A, 10, NOW)
    assert model.revision.digest == C
    later = datetime(2031, 1, 1, tzinfo=UTC)
    model = await rollouts.put(to(A), 50, later)
    assert model.rollout is not None
    assert (model.rollout.weight_percent, model.rollout.started_at) == (50, NOW)
    again = await rollouts.put(to(A), 50, later)
    assert (again, again.version) == (model, model.version)
    promoted = await rollouts.promote("m", later)
    assert (promoted.revision.digest, promoted.rollout) == (A, None)
    told = [(event.kind, dict(event.detail)) for event in await events_of(store, before)]
    assert told == [
        (EventKind.ROLLOUT_MOVED, {"revision": A, "weight_percent": "10"}),
        (EventKind.ROLLOUT_MOVED, {"revision": A, "weight_percent": "50"}),
        (EventKind.SERVED_MOVED, {"tag": "", "revision": A, "cause": "promotion"}),
        (EventKind.ROLLOUT_ENDED, {"revision": A, "act": "promote"}),
    ]
    steps = await rollouts.list_steps("m", before=None, limit=10)
    assert [(step.act, step.weight_percent, step.actor) for step in steps] == [
        (Act.PROMOTE, 0, ""),
        (Act.WEIGHT, 50, ""),
        (Act.WEIGHT, 10, "admin-edge"),
    ]
    assert await rollouts.list_steps("m", before=steps[0].version, limit=1) == [steps[1]]


async def test_a_promotion_is_a_move_that_can_be_rolled_back(rollouts: RolloutStore, tags: TagStore) -> None:
    await rollouts.put(to(A), 1, NOW)
    await rollouts.promote("m", NOW)
    moves = await tags.list_moves("m", tag="", before=None, limit=1)
    assert (moves[0].revision, moves[0].cause) == (A, Cause.PROMOTION)
    assert (await tags.roll_back("m", "", NOW)).revision.digest == C


async def test_a_canary_that_is_served_by_another_way_is_no_canary_any_more(
    rollouts: RolloutStore, tags: TagStore, store: Store
) -> None:
    await rollouts.put(to(A), 10, NOW)
    # What moves the served revision elsewhere leaves the canary its share.
    kept = await tags.put_tag(to(B), "", NOW)
    assert kept.rollout is not None
    assert (await tags.put_tag(to(A), "", NOW)).rollout is None
    await rollouts.put(to(C), 10, NOW)
    assert (await store.put_model("m", (), new("d"), NOW)).rollout is None
    assert [step.act for step in await rollouts.list_steps("m", before=None, limit=9)] == [
        Act.PROMOTE, Act.WEIGHT, Act.PROMOTE, Act.WEIGHT
    ]  # fmt: skip


async def test_another_canary_takes_the_place_of_the_first(rollouts: RolloutStore) -> None:
    await rollouts.put(to(A), 10, NOW)
    model = await rollouts.put(to(B), 20, NOW)
    assert model.rollout is not None
    assert model.rollout.revision.digest == B
    acts = [(step.act, step.revision) for step in await rollouts.list_steps("m", before=None, limit=9)]
    assert acts == [(Act.WEIGHT, B), (Act.REPLACE, A), (Act.WEIGHT, A)]


async def test_a_rollout_keeps_its_revision(rollouts: RolloutStore, tags: TagStore) -> None:
    await rollouts.put(to(A), 0, NOW)
    await refused(tags.delete_revision(to(A), NOW), PreconditionFailed, "REVISION_IN_USE")
    await rollouts.abort("m", NOW)
    await tags.delete_revision(to(A), NOW)
    await refused(tags.delete_revision(to(A), NOW), RevisionNotFound, "REVISION_NOT_FOUND")


async def test_a_model_goes_with_its_rollout(rollouts: RolloutStore, store: Store) -> None:
    await rollouts.put(to(A), 10, NOW)
    await store.delete_model("m", NOW, is_forced=False)
    await put(store, "m", "a", "b")
    assert (await store.get_model("m")).rollout is None
    assert await rollouts.list_steps("m", before=None, limit=9) == []


async def test_what_is_no_rollout_is_refused(rollouts: RolloutStore, store: Store) -> None:
    await refused(rollouts.put(to(C), 10, NOW), PreconditionFailed, "ROLLOUT_OF_SERVED")
    await refused(rollouts.put(to(A), 101, NOW), InvalidRequest, "INVALID_WEIGHT")
    await refused(rollouts.put(Reference("other", digest=A), 1, NOW), ModelNotFound, "MODEL_NOT_FOUND")
    await refused(rollouts.promote("m", NOW), PreconditionFailed, "NO_ROLLOUT")
    await refused(rollouts.abort("m", NOW), PreconditionFailed, "NO_ROLLOUT")
    profile = ModelProfile("LoraAdapter", 1, 2, "bfloat16", 0, 0, 0, 0, base_model="org/base")
    for seed in "ef":
        adapter = new(seed)
        await store.put_model("adapter", (), type(adapter)(adapter.manifest, profile, adapter.source), NOW)
    first = Reference("adapter", digest=new("e").manifest.digest())
    await refused(rollouts.put(first, 1, NOW), PreconditionFailed, "ROLLOUT_OF_ADAPTER")


async def test_a_request_is_carried_out_once_and_only_on_what_its_caller_saw(
    rollouts: RolloutStore, store: Store
) -> None:
    seen = (await store.get_model("m")).version
    first = await rollouts.put(to(A), 10, NOW, Mutation(request_id="one", expected_version=seen))
    await rollouts.put(to(A), 20, NOW)
    again = await rollouts.put(to(A), 10, NOW, Mutation(request_id="one", expected_version=seen))
    assert again.rollout is not None
    assert again.rollout.weight_percent == 20
    stale = Mutation(expected_version=first.version)
    await refused(rollouts.promote("m", NOW, stale), Conflict, "STALE_VERSION")
    await rollouts.promote("m", NOW, Mutation(request_id="two"))
    # A promotion that is sent again finds no rollout, and nothing wrong with that.
    assert (await rollouts.promote("m", NOW, Mutation(request_id="two"))).revision.digest == A


async def test_the_contract_over_mtls(parts: Parts, mesh: Mesh) -> None:
    for seed in "abd":
        await parts.catalog.put_model("org/m", ("x",), new(seed))
    async with serve(parts, mesh) as address, mesh.dialer(address, "admin-edge") as dialer:
        client = RolloutClient(dialer)
        model = await client.put(f"x@{A}", 10)
        assert model.rollout is not None
        assert (model.rollout.revision.digest, model.rollout.weight_percent) == (A, 10)
        watched = await parts.store.get_model("org/m")
        assert model == watched
        assert (await client.promote("x")).revision.digest == A
        await client.put(f"org/m@{B[7:15]}", 0)
        assert (await client.abort("org/m")).rollout is None
        steps = await client.list_steps("org/m")
        assert [step.act for step in steps] == [Act.ABORT, Act.WEIGHT, Act.PROMOTE, Act.WEIGHT]
        async with mesh.dialer(address, "proxy") as other:
            with pytest.raises(PermissionDenied):
                await RolloutClient(other).abort("org/m")


class Rollouts(RuleBasedStateMachine):
    """A model of what is served and rolled out, beside the store."""

    template: Path

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.directory = TemporaryDirectory()
        path = Path(self.directory.name, "registry.db")
        copyfile(self.template, path)
        self.database = self.run(Database.open(path))
        self.store = Store(self.database)
        self.rollouts = RolloutStore(self.database, self.store.changes)
        self.tags = TagStore(self.database, self.store.changes)
        self.run(put(self.store, "m", *SEEDS))
        self.served, self.canary, self.weight = C, "", 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self.database.close())
        self.runner.close()
        self.directory.cleanup()

    @rule(digest=st.sampled_from(sorted(SEEDS.values())), percent=st.integers(0, 100))
    def put(self, digest: str, percent: int) -> None:
        work = self.rollouts.put(to(digest), percent, NOW)
        if digest == self.served:
            with pytest.raises(PreconditionFailed):
                self.run(work)
        else:
            self.run(work)
            self.canary, self.weight = digest, percent

    @rule()
    def promote(self) -> None:
        if not self.canary:
            with pytest.raises(PreconditionFailed):
                self.run(self.rollouts.promote("m", NOW))
            return
        self.run(self.rollouts.promote("m", NOW))
        self.served, self.canary = self.canary, ""

    @rule()
    def abort(self) -> None:
        if self.canary:
            self.run(self.rollouts.abort("m", NOW))
            self.canary = ""

    @rule(digest=st.sampled_from(sorted(SEEDS.values())))
    def serve(self, digest: str) -> None:
        self.run(self.tags.put_tag(to(digest), "", NOW))
        self.served = digest
        if self.canary == digest:
            self.canary = ""

    @invariant()
    def the_store_says_the_same(self) -> None:
        model = self.run(self.store.get_model("m"))
        assert model.revision.digest == self.served
        found = model.rollout
        assert (found is not None) == bool(self.canary)
        if found is not None:
            assert (found.revision.digest, found.weight_percent) == (self.canary, self.weight)

    @invariant()
    def neither_the_served_revision_nor_the_canary_can_be_deleted(self) -> None:
        for digest in {self.served, self.canary} - {""}:
            with pytest.raises(PreconditionFailed):
                self.run(self.tags.delete_revision(to(digest), NOW))


def test_a_model_serves_one_revision_and_rolls_out_another_whatever_the_order(templates: Templates) -> None:
    class Machine(Rollouts):
        template = templates.file

    limits = settings(max_examples=10, stateful_step_count=12, deadline=None)
    run_state_machine_as_test(Machine, settings=limits)
