"""What eviction plans: enough, the longest unused first, never what is held."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from helios.storage.eviction import EvictionPlan, plan_evict_one, plan_eviction
from helios.storage.inventory import Inventory, Resident
from helios.storage.manifest import Digest, Manifest, ManifestEntry, make_manifest, manifest_digest

NOW = datetime(2030, 1, 1, tzinfo=UTC)
SIZES = dict(zip("0123456789abcdef", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 7, 7, 7, 1000, 4], strict=True))


def blob(letter: str) -> Digest:
    return Digest(letter * 64, SIZES[letter])


def revision_of(letters: str) -> Manifest:
    entries = [ManifestEntry(letter, blob(letter), "raw") for letter in sorted(set(letters))]
    return make_manifest(manifest_digest(entries), entries)


def inventory_of(*revisions: str, strays: str = "") -> Inventory:
    """Revisions by their blobs, the first one unused for longest."""
    letters = set("".join(revisions) + strays)
    residents = [Resident(revision_of(r), NOW + timedelta(seconds=i)) for i, r in enumerate(revisions)]
    return Inventory(map(blob, letters), residents)


def names(*revisions: str) -> tuple[str, ...]:
    return tuple(revision_of(revision).revision for revision in revisions)


def test_takes_the_longest_unused_first_and_no_more_than_needed() -> None:
    plan = plan_eviction(inventory_of("8", "9", "a"), 30, held=())
    assert plan == EvictionPlan(names("8"), (blob("8"),))


def test_strays_go_before_revisions() -> None:
    assert plan_eviction(inventory_of("8", strays="9"), 50, held=()) == EvictionPlan((), (blob("9"),))


def test_a_shared_blob_goes_with_its_last_revision() -> None:
    inventory = inventory_of("e1", "e2")
    assert plan_eviction(inventory, 1000, held=()).freed_bytes >= 1000
    assert plan_eviction(inventory, 1000, held=names("e2")).freed_bytes == 1
    assert plan_evict_one(inventory, *names("e1")) == EvictionPlan(names("e1"), (blob("1"),))


def test_a_small_one_is_spared_when_a_large_one_suffices() -> None:
    assert plan_eviction(inventory_of("1", "e"), 500, held=()).revisions == names("e")


def test_nothing_needed_evicts_nothing() -> None:
    assert plan_eviction(inventory_of("e", strays="1"), 0, held=()) == EvictionPlan()


@given(
    revisions=st.lists(st.text("0123456789abcdef", min_size=1, max_size=5), max_size=8, unique_by=frozenset),
    strays=st.text("0123456789abcdef", max_size=3),
    needed_bytes=st.integers(-5, 1500),
    data=st.data(),
)
def test_never_evicts_what_is_held_and_frees_what_it_says(
    revisions: list[str], strays: str, needed_bytes: int, data: st.DataObject
) -> None:
    inventory = inventory_of(*revisions, strays=strays)
    held = data.draw(st.sets(st.sampled_from(revisions))) if revisions else set[str]()
    keep = {blob(letter) for letter in data.draw(st.sets(st.sampled_from("0123456789abcdef")))}
    plan = plan_eviction(inventory, needed_bytes, held=names(*held), keep=keep)
    assert not set(plan.revisions) & set(names(*held))
    remaining = [r for r in revisions if revision_of(r).revision not in plan.revisions]
    used = {blob(letter) for revision in remaining for letter in revision}
    assert not set(plan.blobs) & (used | keep)
    assert len(set(plan.blobs)) == len(plan.blobs)
    most = plan_eviction(inventory, 10**9, held=names(*held), keep=keep).freed_bytes
    assert plan.freed_bytes >= min(needed_bytes, most)
    if needed_bytes <= 0:
        assert plan == EvictionPlan()
