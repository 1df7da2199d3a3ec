"""Which tier takes what: marks, spare room, promotion, and what is refused."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from helios.mesh.errors import DiskFull
from helios.storage.__main__ import make_tiers
from helios.storage.inventory import Inventory, Resident
from helios.storage.manifest import Digest, Manifest, ManifestEntry, make_manifest, manifest_digest
from helios.storage.settings import StorageSettings
from helios.storage.tiers import (
    DiskRoom,
    TierKind,
    TierOptions,
    check_fits_somewhere,
    excess_bytes,
    heat,
    in_speed_order,
    plan_promotion,
    spare_bytes,
)

NOW = datetime(2030, 1, 1, tzinfo=UTC)
EMPTY = DiskRoom(1_000_000, 1_000_000)


def model(letter: str, size_bytes: int) -> Manifest:
    entries = [ManifestEntry("w", Digest(letter * 64, size_bytes), "raw")]
    return make_manifest(manifest_digest(entries), entries)


def inventory(*residents: Resident) -> Inventory:
    return Inventory({blob for r in residents for blob in r.manifest.blobs}, residents)


def used(letter: str, size_bytes: int, count: int, *, hours_ago: float = 0) -> Resident:
    return Resident(model(letter, size_bytes), NOW - timedelta(hours=hours_ago), count)


def promoted(slower: Inventory, faster: Inventory, spare: int, **options: frozenset[str]) -> Manifest | None:
    busy, kept = options.get("busy", frozenset()), options.get("kept", frozenset())
    plan = plan_promotion(slower, faster, spare, busy=busy, kept=kept, now=NOW)
    return plan.manifest if plan is not None else None


def test_the_fastest_comes_first_and_equals_keep_their_order() -> None:
    kinds = (TierKind.SSD, TierKind.NVME, TierKind.MEMORY, TierKind.NVME)
    assert in_speed_order([TierOptions(kind=kind) for kind in kinds]) == [2, 1, 3, 0]


def test_a_model_larger_than_every_disk_is_refused_with_the_numbers() -> None:
    tiers = [
        TierOptions("m", TierKind.MEMORY),
        TierOptions("a", capacity_bytes=10),
        TierOptions("b", capacity_bytes=20),
    ]
    check_fits_somewhere(model("1", 20), tiers)
    with pytest.raises(DiskFull, match=r"21 bytes.*a 10, b 20") as raised:
        check_fits_somewhere(model("1", 21), tiers)
    assert raised.value.metadata == {"size_bytes": "21", "capacity_bytes.a": "10", "capacity_bytes.b": "20"}
    check_fits_somewhere(model("1", 1 << 50), [*tiers, TierOptions("c")])


def test_what_others_write_counts_towards_the_marks() -> None:
    options = TierOptions(high_ratio=0.9, low_ratio=0.5)
    crowded = DiskRoom(1000, 80)
    assert excess_bytes(options, 700, crowded, has_slower=False) == 420
    assert excess_bytes(options, 100, crowded, has_slower=False) == 100
    assert excess_bytes(options, 700, DiskRoom(1000, 100), has_slower=False) == 0


def test_the_capacity_has_marks_only_where_a_slower_tier_takes_what_goes() -> None:
    options = TierOptions(capacity_bytes=1000, high_ratio=0.9, low_ratio=0.5)
    assert excess_bytes(options, 950, EMPTY, has_slower=True) == 450
    assert excess_bytes(options, 900, EMPTY, has_slower=True) == 0
    assert excess_bytes(options, 950, EMPTY, has_slower=False) == 0


@given(capacity=st.integers(0, 2000), used_bytes=st.integers(0, 2000), free=st.integers(0, 1000))
def test_what_is_spare_never_makes_an_excess(capacity: int, used_bytes: int, free: int) -> None:
    options, disk = TierOptions(capacity_bytes=capacity), DiskRoom(1000, free)
    spare = spare_bytes(options, used_bytes, disk)
    assert 0 <= spare <= free
    if spare:
        after = DiskRoom(1000, free - spare)
        assert excess_bytes(options, used_bytes + spare, after, has_slower=True) == 0


def test_heat_halves_with_each_hour() -> None:
    assert heat(used("1", 1, 8), NOW) == 8
    assert heat(used("1", 1, 8, hours_ago=2), NOW) == 2
    assert heat(used("1", 1, 0), NOW, lambda _: 3.0) == 3


def test_promotes_the_hottest_and_nothing_that_was_used_once() -> None:
    warm, hot, cold = used("1", 10, 3), used("2", 10, 9), used("3", 10, 1)
    assert promoted(inventory(warm, hot, cold), inventory(), 100) == hot.manifest
    assert promoted(inventory(cold), inventory(), 100) is None
    assert promoted(inventory(hot), inventory(hot), 100) is None


def test_what_is_lent_is_not_copied() -> None:
    hot = used("2", 10, 9)
    assert promoted(inventory(hot), inventory(), 100, busy=frozenset({hot.revision})) is None


def test_displaces_only_what_is_much_colder_and_not_kept() -> None:
    here, hot = used("1", 50, 2), used("2", 50, 5)
    assert promoted(inventory(hot), inventory(here), 0) == hot.manifest
    assert promoted(inventory(hot), inventory(here), 0, kept=frozenset({here.revision})) is None
    assert promoted(inventory(used("2", 50, 3)), inventory(here), 0) is None


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9)), max_size=5), st.integers(0, 100), st.integers(1, 99))
def test_two_models_never_take_turns(here: list[tuple[int, int]], spare: int, count: int) -> None:
    """What was displaced is not hot enough to displace what displaced it."""
    faster = [used("3456789"[i], size, uses) for i, (size, uses) in enumerate(here)]
    hot = used("1", 60, count)
    plan = plan_promotion(inventory(hot), inventory(*faster), spare, busy=(), kept=(), now=NOW)
    if plan is not None and plan.displaced_bytes:
        for resident in faster:
            assert promoted(inventory(resident), inventory(hot), 0) is None or heat(resident, NOW) > heat(hot, NOW)


def test_tiers_come_from_settings(tmp_path: Path) -> None:
    more = {"name": "fast", "kind": "nvme", "path": tmp_path / "fast", "capacity_bytes": 5, "high_ratio": 0.9}
    memory = {"name": "memory", "kind": "memory", "capacity_bytes": 7}
    settings = StorageSettings.model_validate(
        {"state_directory": tmp_path / "state", "registry_target": "x:1", "tiers": [more, memory]}
    )
    home, fast, sealed = make_tiers(settings)
    assert home.options == TierOptions("disk", TierKind.SSD, 0, 0.95, 0.85)
    assert fast.options == TierOptions("fast", TierKind.NVME, 5, 0.9, 0.85)
    assert fast.store.root == tmp_path / "fast"
    assert sealed.store.is_sealed
    assert sealed.store.root == tmp_path / "state" / "memory" / "memory"


@pytest.mark.parametrize(
    ("addresses", "told"),
    [
        (["127.0.0.1:1"], "127.0.0.1:1"),
        (["127.0.0.1:1", "unix:/s"], "127.0.0.1:1"),
        (["127.0.0.1:1", "10.0.0.5:2"], "10.0.0.5:2"),
        (["[::1]:1", "node.example:2"], "node.example:2"),
        (["127.0.0.1:1", "0.0.0.0:2"], ""),
        (["unix:/s", "[::]:2"], ""),
    ],
)
def test_other_nodes_are_told_no_address_that_leads_them_to_themselves(addresses: list[str], told: str) -> None:
    fields = {"state_directory": "/state", "registry_target": "x:1"}
    assert StorageSettings.model_validate(fields).address_for_peers(addresses) == told
    there = StorageSettings.model_validate({**fields, "peers": {"address": "n:1"}})
    assert there.address_for_peers(addresses) == "n:1"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tiers": [{"name": "disk", "path": "/a"}]}, "one name"),
        ({"tiers": [{"name": "a", "path": "/state"}]}, "one path"),
        ({"tier": {"kind": "memory"}}, "is a disk"),
        ({"tiers": [{"name": "a", "path": "/a", "kind": "memory"}]}, "needs capacity_bytes"),
        ({"tiers": [{"name": "a", "kind": "nvme"}]}, "needs a path"),
        ({"tier": {"low_ratio": 0.9, "high_ratio": 0.8}}, "above high_ratio"),
        ({"tier": {"name": "A B"}}, "pattern"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(changed: dict[str, object], message: str) -> None:
    fields = {"state_directory": "/state", "registry_target": "x:1", **changed}
    with pytest.raises(ValidationError, match=message):
        StorageSettings.model_validate(fields)
