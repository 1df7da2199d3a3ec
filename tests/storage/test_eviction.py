"""What eviction plans: enough, what is worth least first, never what is held."""

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from helios.storage.eviction import EvictionPlan, plan_drop_blob, plan_evict_one, plan_eviction
from helios.storage.inventory import Inventory, Resident
from helios.storage.manifest import Digest, Manifest, ManifestEntry, make_manifest, manifest_digest

NOW = datetime(2030, 1, 1, tzinfo=UTC)
MIB = 1 << 20
SIZES = dict(zip("0123456789abcdef", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 7, 7, 7, 1000, 4], strict=True))


def blob(letter: str) -> Digest:
    return Digest(letter * 64, SIZES[letter] * MIB)


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


def test_takes_no_more_than_needed() -> None:
    plan = plan_eviction(inventory_of("8", "9", "a"), 30 * MIB, held=())
    assert (plan.revisions, plan.blobs) == (names("a"), (blob("a"),))
    assert plan.clock > 0


def test_among_equals_the_longest_unused_goes() -> None:
    assert plan_eviction(inventory_of("b", "c", "d"), 7, held=()).revisions == names("b")


def test_a_large_one_goes_before_a_small_one_and_what_is_used_often_stays() -> None:
    assert plan_eviction(inventory_of("1", "e", "9"), 1, held=()).revisions == names("e")
    inventory = inventory_of("1", "e", "9")
    for _ in range(100):
        inventory.touch(names("e")[0], NOW, is_new_use=True)
    assert plan_eviction(inventory, 1, held=()).revisions == names("9")


def test_what_was_popular_long_ago_is_overtaken_by_the_clock() -> None:
    """Each eviction moves the clock, so that a revision that is not used any more goes at last."""
    inventory = inventory_of("9")
    for _ in range(4):
        inventory.touch(names("9")[0], NOW, is_new_use=True)
    for round_ in range(20):
        inventory.add_blob(blob("8"))
        inventory.add_revision(Resident(revision_of("8"), NOW, 1, inventory.clock))
        plan = plan_eviction(inventory, 1, held=())
        inventory.clock = plan.clock
        if plan.revisions == names("9"):
            assert round_ > 0
            return
        assert plan.revisions == names("8")
        inventory.remove_revision(names("8")[0])
    raise AssertionError("what nobody uses stayed for ever")


def test_a_forecast_spares_what_is_expected() -> None:
    inventory = inventory_of("b", "c")
    assert plan_eviction(inventory, 1, held=()).revisions == names("b")
    expected = names("b")[0]
    plan = plan_eviction(inventory, 1, held=(), forecast=lambda revision: 1.0 if revision == expected else 0.0)
    assert plan.revisions == names("c")


def test_a_fine_tune_whose_base_stays_frees_little_and_goes_late() -> None:
    assert plan_eviction(inventory_of("e", "e1", "d"), 1, held=names("e")).revisions == names("d")


def test_a_bad_blob_takes_its_revisions_along_and_nothing_else() -> None:
    plan = plan_drop_blob(inventory_of("12", "13", "4"), blob("1"))
    assert set(plan.revisions) == {*names("12"), *names("13")}
    assert plan.blobs == (blob("1"),)


def test_strays_go_before_revisions() -> None:
    assert plan_eviction(inventory_of("8", strays="9"), 50 * MIB, held=()) == EvictionPlan((), (blob("9"),))


def test_a_shared_blob_goes_with_its_last_revision() -> None:
    inventory = inventory_of("e1", "e2")
    assert plan_eviction(inventory, 1000 * MIB, held=()).freed_bytes >= 1000 * MIB
    assert plan_eviction(inventory, 1000 * MIB, held=names("e2")).freed_bytes == MIB
    assert plan_evict_one(inventory, *names("e1")) == EvictionPlan(names("e1"), (blob("1"),))


def test_a_small_one_is_spared_when_a_large_one_suffices() -> None:
    assert plan_eviction(inventory_of("1", "e"), 500 * MIB, held=()).revisions == names("e")


def test_nothing_needed_evicts_nothing() -> None:
    assert plan_eviction(inventory_of("e", strays="1"), 0, held=()) == EvictionPlan()


@given(
    revisions=st.lists(st.text("0123456789abcdef", min_size=1, max_size=5), max_size=8, unique_by=frozenset),
    strays=st.text("0123456789abcdef", max_size=3),
    needed_bytes=st.integers(-5, 1500).map(MIB.__mul__),
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
    most = plan_eviction(inventory, 10**12, held=names(*held), keep=keep).freed_bytes
    assert plan.freed_bytes >= min(needed_bytes, most)
    if needed_bytes <= 0:
        assert plan == EvictionPlan()
