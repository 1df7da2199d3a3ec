"""Claims and the collector together: whatever the order of their steps, no blob that something refers to is deleted."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.registry.claims import Claims
from helios.registry.collection import StoredBlob, plan_collection

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
HASHES = [f"{number:064x}" for number in range(2)]


@dataclass
class Ingest:
    """Holds, then stores, each blob; then commits and lets go."""

    wanted: list[str]
    held: list[str] = field(default_factory=list)
    stored: list[str] = field(default_factory=list)


@dataclass
class Collection:
    """Has listed; then plans and dooms, reads the rows again, deletes."""

    listed: dict[str, datetime]
    doomed: frozenset[str] | None = None
    gone: frozenset[str] | None = None


class Collecting(RuleBasedStateMachine):
    """Ingests and collections of one registry on one store, interleaved at every point where the code awaits.

    A model of the store (what is there and since when), of the rows, and of those who take part; the code under test is
    ``Claims`` and ``plan_collection``, called in the order in which ``Blobs`` and ``Collector`` call them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.claims = Claims()
        self.now = EPOCH
        # What crashes left: the worst that an ingest can find.
        self.store = dict.fromkeys(HASHES, EPOCH)
        self.rows: set[str] = set()
        self.deleting: set[str] = set()
        self.ingests: list[Ingest] = []
        self.collections: list[Collection] = []

    @initialize(wanted=st.lists(st.sampled_from([HASHES[:1], HASHES]), min_size=1, max_size=2))
    def all_are_under_way(self, wanted: list[list[str]]) -> None:
        self.ingests += [Ingest(list(each)) for each in wanted]
        self.collections += [Collection(dict(self.store)) for _ in range(2)]

    @rule(seconds=st.integers(1, 100))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(wanted=st.sets(st.sampled_from(HASHES), min_size=1))
    def ingest_begins(self, wanted: set[str]) -> None:
        self.ingests.append(Ingest(sorted(wanted)))

    @precondition(lambda self: self.ingests)
    @rule(data=st.data())
    def ingest_goes_on(self, data: st.DataObject) -> None:
        ingest = data.draw(st.sampled_from(self.ingests))
        if ingest.held != ingest.stored:
            # Looking comes after holding: what is there now stays.
            self.store.setdefault(ingest.held[-1], self.now)
            ingest.stored.append(ingest.held[-1])
        elif ingest.held != ingest.wanted:
            wanted = ingest.wanted[len(ingest.held)]
            if self.claims.hold(wanted):
                ingest.held.append(wanted)
        else:
            self.rows |= set(ingest.wanted)
            self.ingests.remove(ingest)
            self.claims.release(ingest.held)

    @precondition(lambda self: self.ingests)
    @rule(data=st.data())
    def ingest_fails(self, data: st.DataObject) -> None:
        ingest = data.draw(st.sampled_from(self.ingests))
        self.ingests.remove(ingest)
        self.claims.release(ingest.held)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def model_is_deleted(self, data: st.DataObject) -> None:
        self.rows.discard(data.draw(st.sampled_from(sorted(self.rows))))

    @rule()
    def collection_lists(self) -> None:
        self.collections.append(Collection(dict(self.store)))

    @precondition(lambda self: self.collections)
    @rule(data=st.data(), grace=st.sampled_from([0, 0, 50]))
    def collection_goes_on(self, data: st.DataObject, grace: int) -> None:
        collection = data.draw(st.sampled_from(self.collections))
        if collection.doomed is None:
            listed = [StoredBlob(value, 1, since) for value, since in collection.listed.items()]
            reachable = dict.fromkeys(self.rows, 1)
            plan = plan_collection(listed, reachable, now=self.now, grace=timedelta(seconds=grace))
            collection.doomed = self.claims.doom(blob.hash for blob in plan.doomed)
        elif collection.gone is None:
            self.claims.settle(collection.doomed & self.rows)
            collection.gone = collection.doomed - self.rows
            self.deleting |= collection.gone
        else:
            for value in collection.gone:
                self.store.pop(value, None)
            self._end(collection)

    @precondition(lambda self: self.collections)
    @rule(data=st.data())
    def collection_fails(self, data: st.DataObject) -> None:
        """The store fails, or who asked went away."""
        self._end(data.draw(st.sampled_from(self.collections)))

    def _end(self, collection: Collection) -> None:
        self.collections.remove(collection)
        self.deleting -= collection.gone or set()
        self.claims.settle((collection.doomed if collection.gone is None else collection.gone) or ())

    @invariant()
    def never_collects_a_reachable_blob(self) -> None:
        assert self.rows <= self.store.keys()

    @invariant()
    def what_is_being_deleted_is_nobodys(self) -> None:
        assert not any(self.claims.is_held(value) or value in self.rows for value in self.deleting)


Collecting.TestCase.settings = settings(max_examples=400, stateful_step_count=30)
test_never_collects_a_reachable_blob = Collecting.TestCase


def test_a_blob_is_held_as_often_as_it_was_taken() -> None:
    claims = Claims()
    assert claims.hold("a")
    assert claims.hold("a")
    claims.release(["a"])
    assert claims.doom(["a", "b"]) == {"b"}
    assert not claims.hold("b")
    claims.settle(["b"])
    assert claims.hold("b")


def test_letting_go_of_what_is_not_held_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        Claims().release(["a"])
