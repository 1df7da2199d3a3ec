"""Where pointers go: a state machine drives the store beside a model of two plain stacks, and they never differ."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from helios.mesh.errors import NotFound, PreconditionFailed
from helios.registry.database import Database
from helios.registry.history import Cause, Move, rollback_target, stack_of
from helios.registry.names import Reference
from helios.registry.store import Store
from helios.registry.tag_store import TagStore
from tests.registry.stores import Templates
from tests.registry.test_store import digest, new

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SEEDS = "abdef0"
POINTERS = st.sampled_from(["", "prod", "canary"])


class Pointers(RuleBasedStateMachine):
    """One model with what is served and two tags."""

    template: Path

    @initialize()
    def open(self) -> None:
        self.runner = asyncio.Runner()
        self.directory = TemporaryDirectory()
        path = Path(self.directory.name, "registry.db")
        copyfile(self.template, path)
        self.database = self.run(Database.open(path))
        self.store = Store(self.database)
        self.tags = TagStore(self.database, self.store.changes)
        self.run(self.store.put_model("m", (), new("a"), NOW))
        self.stacks: dict[str, list[str]] = {"": [digest("a")], "prod": [], "canary": []}
        self.known = {digest("a")}
        self.pinned: set[str] = set()
        self.version = self.run(self.store.changes.version())

    def run(self, work: Any) -> Any:
        return self.runner.run(work)

    def push(self, pointer: str, revision: str) -> None:
        if self.stacks[pointer][-1:] != [revision]:
            self.stacks[pointer].append(revision)

    @rule(seed=st.sampled_from(SEEDS), is_served=st.booleans(), tags=st.sets(st.sampled_from(["prod", "canary"])))
    def ingest(self, seed: str, is_served: bool, tags: set[str]) -> None:
        self.run(self.store.put_model("m", (), new(seed, is_served=is_served, tags=tuple(tags)), NOW))
        self.known.add(digest(seed))
        for pointer in (*tags, *([""] if is_served else [])):
            self.push(pointer, digest(seed))

    @rule(pointer=POINTERS, seed=st.sampled_from(SEEDS))
    def tag(self, pointer: str, seed: str) -> None:
        if digest(seed) in self.known:
            self.run(self.tags.put_tag(Reference("m", digest=digest(seed)), pointer, NOW))
            self.push(pointer, digest(seed))

    @rule(pointer=st.sampled_from(["prod", "canary"]))
    def delete_tag(self, pointer: str) -> None:
        if self.stacks[pointer]:
            self.run(self.tags.delete_tag("m", pointer, NOW))
            self.stacks[pointer] = []
        else:
            with pytest.raises(NotFound):
                self.run(self.tags.delete_tag("m", pointer, NOW))

    @rule(pointer=POINTERS)
    def roll_back(self, pointer: str) -> None:
        stack = self.stacks[pointer]
        earlier = [index for index, revision in enumerate(stack[:-1]) if revision in self.known - {stack[-1]}]
        if earlier:
            self.run(self.tags.roll_back("m", pointer, NOW))
            del stack[earlier[-1] + 1 :]
        else:
            with pytest.raises((NotFound, PreconditionFailed)):
                self.run(self.tags.roll_back("m", pointer, NOW))

    @rule(seed=st.sampled_from(SEEDS), is_pinned=st.booleans())
    def pin(self, seed: str, is_pinned: bool) -> None:
        if digest(seed) in self.known:
            target = Reference("m", digest=digest(seed))
            if is_pinned:
                self.run(self.tags.put_pin(target, "", NOW))
                self.pinned.add(digest(seed))
            else:
                self.run(self.tags.delete_pin(target, NOW))
                self.pinned.discard(digest(seed))

    @rule(seed=st.sampled_from(SEEDS))
    def delete_revision(self, seed: str) -> None:
        target = Reference("m", digest=digest(seed))
        used = {stack[-1] for stack in self.stacks.values() if stack} | self.pinned
        if digest(seed) in self.known - used:
            self.run(self.tags.delete_revision(target, NOW))
            self.known.discard(digest(seed))
        else:
            with pytest.raises((NotFound, PreconditionFailed)):
                self.run(self.tags.delete_revision(target, NOW))

    @invariant()
    def pointers_are_where_the_stacks_say(self) -> None:
        model = self.run(self.store.get_model("m"))
        found = {tag.name: tag.revision.digest for tag in model.tags} | {"": model.revision.digest}
        assert found == {pointer: stack[-1] for pointer, stack in self.stacks.items() if stack}
        assert {pin.revision for pin in model.pins} == self.pinned
        for pointer, stack in self.stacks.items():
            moves = self.run(self.tags.list_moves("m", tag=pointer, before=None, limit=1000))
            assert stack_of(reversed(moves)) == stack

    @invariant()
    def nothing_that_can_be_reached_is_deleted(self) -> None:
        listed = self.run(self.store.list_revisions("m", before=None, limit=100))
        assert {revision.digest for _, revision in listed} == self.known
        blobs = {
            entry.digest.hash for seed in SEEDS if digest(seed) in self.known for entry in new(seed).manifest.entries
        }
        assert set(self.run(self.store.blobs.read())) == blobs

    @invariant()
    def every_change_has_the_next_number(self) -> None:
        events = self.run(self.store.changes.list_events(after=self.version, limit=1000))
        head = self.run(self.store.changes.version())
        assert [event.version for event in events] == list(range(self.version + 1, head + 1))
        self.version = head

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.run(self.database.close())
            self.runner.close()
            self.directory.cleanup()


def test_pointers_move_as_two_stacks_do(templates: Templates) -> None:
    class OnTemplate(Pointers):
        template = templates.file

    run_state_machine_as_test(
        OnTemplate,
        settings=settings(
            max_examples=8,
            stateful_step_count=15,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def move(revision: str | None, cause: Cause) -> Move:
    return Move(1, "", revision, cause, "", NOW)


@given(st.lists(st.sampled_from("ABC"), min_size=1, max_size=12))
def test_rolling_back_again_and_again_goes_through_all_that_was(revisions: list[str]) -> None:
    moves = [move(revision, Cause.TAG) for revision in revisions]
    been = stack_of(moves)
    assert [one for one, before in zip(revisions, [None, *revisions], strict=False) if one != before] == been
    while (target := rollback_target(moves, "ABC")) is not None:
        moves.append(move(target, Cause.ROLLBACK))
        been = been[:-1]
        assert stack_of(moves) == been
    assert len(been) == 1


@given(st.lists(st.sampled_from("ABCD"), min_size=2, max_size=12), st.sets(st.sampled_from("ABCD")))
def test_a_rollback_never_leads_to_what_was_deleted_or_is_there_already(revisions: list[str], alive: set[str]) -> None:
    moves = [move(revision, Cause.TAG) for revision in revisions]
    target = rollback_target(moves, alive)
    assert target is None or (target in alive and target != revisions[-1])
    if target is None:
        assert not alive & set(revisions) - {revisions[-1]}
