"""The pure policies, one by one."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.proxy.activation.estimate import StartEstimates
from helios.proxy.catalogue import Catalogue
from helios.proxy.fleet.state import Load
from helios.proxy.routing.pick import MAX_CHOICES, pick
from helios.proxy.routing.table import Candidate, RoutingTable, score
from helios.proxy.scaling.desired import Usage, desired_replicas
from helios.proxy.sizing import SizingPolicy, replica_size
from helios.proxy.store import Store, load_models, load_swap_failures, load_workers
from helios.proxy.swap import SwapFailures
from tests.proxy.support import GIB, MIB, entry

LOADS = st.builds(Load, st.integers(0, 300), st.integers(0, 300), st.floats(0.0, 1.0), st.integers(0, 10**9))
NAMES = st.text("abc", min_size=1, max_size=2)
ENTRIES = st.lists(st.builds(lambda name, aliases: entry(name, aliases=tuple(aliases)), NAMES, st.sets(NAMES)))


@given(LOADS, st.integers(0, 100))
def test_scores_lie_between_0_and_1(load: Load, reserved_count: int) -> None:
    candidate = score("r", "a", load, reserved_count)
    for value in candidate[2:-1]:
        assert 0.0 <= value <= 1.0


@given(LOADS, st.integers(0, 100))
def test_more_load_never_scores_better(load: Load, reserved_count: int) -> None:
    base = score("r", "a", load, reserved_count).score
    assert score("r", "a", load, reserved_count + 1).score < base
    busier = Load(load.running_count, load.waiting_count + 1, load.kv_usage_ratio)
    assert score("r", "a", busier, reserved_count).score < base


@given(st.lists(LOADS, min_size=1, max_size=30))
def test_the_best_candidates_are_picked_in_order(loads: list[Load]) -> None:
    table = RoutingTable()
    for index, load in enumerate(loads):
        table.put("m", "v", score(f"r{index}", f"a{index}", load, 0))
    chosen = pick("m", "v", table.snapshot("m", "v"))
    assert chosen is not None
    scores = [choice.score for choice in chosen.choices]
    assert scores == sorted((c.score for c in table.snapshot("m", "v")), reverse=True)[:MAX_CHOICES]
    assert chosen.endpoints == ",".join(choice.address for choice in chosen.choices)


def test_an_empty_snapshot_has_no_pick() -> None:
    assert pick("m", "v", ()) is None


def test_a_candidate_belongs_to_one_revision() -> None:
    table = RoutingTable()
    candidate = Candidate("r", "a", 1, 1, 1, 1)
    assert table.put("m", "v1", candidate)
    assert not table.put("m", "v1", candidate)
    assert table.put("m", "v2", candidate)
    assert table.snapshot("m", "v1") == ()


@given(
    minimum=st.integers(0, 5),
    maximum=st.integers(0, 5),
    held=st.integers(0, 3),
    in_flight=st.integers(0, 3),
    last_used_at=st.none() | st.floats(0, 100),
    is_failing=st.booleans(),
)
def test_nothing_is_started_only_to_be_drained(
    *, minimum: int, maximum: int, held: int, in_flight: int, last_used_at: float | None, is_failing: bool
) -> None:
    usage = Usage(held, in_flight, last_used_at, is_failing)
    desired = desired_replicas(min_replicas=minimum, max_replicas=maximum, usage=usage, idle_seconds=10, now=100)
    assert minimum <= desired.start_below <= desired.drain_above
    if held:
        assert desired.start_below >= 1


def test_an_idle_timeout_of_zero_never_drains() -> None:
    usage = Usage(0, 0, 0.0, is_failing=False)
    assert desired_replicas(min_replicas=0, max_replicas=0, usage=usage, idle_seconds=0, now=1e9).drain_above == 1


def test_estimates_follow_what_was_measured() -> None:
    estimates = StartEstimates(base_seconds=5, bytes_per_second=1e9)
    assert estimates.expected_seconds("m", 2_000_000_000) == pytest.approx(7.0)
    for _ in range(20):
        estimates.record("m", 3.0)
    assert estimates.expected_seconds("m", 2_000_000_000) == pytest.approx(3.0)


def test_a_replica_books_weights_cache_and_overhead() -> None:
    sizing = SizingPolicy(overhead_bytes=GIB, context_count=2, min_kv_cache_bytes=MIB, max_kv_cache_bytes=GIB)
    model = entry()
    assert replica_size(model, sizing).kv_cache_bytes == MIB
    assert replica_size(model, sizing).memory_bytes == GIB + MIB


@given(ENTRIES)
def test_every_model_is_found_by_its_name_and_a_name_wins_over_an_alias(entries: list[object]) -> None:
    catalogue = Catalogue()
    catalogue.replace(entries)  # type: ignore[arg-type]
    for model in catalogue.models():
        assert catalogue.find(model.name) == model
        for alias in model.aliases:
            assert catalogue.find(alias) is not None


def test_an_alias_that_moved_leads_to_its_new_owner_in_either_order() -> None:
    for names in (("a", "b"), ("b", "a")):
        catalogue = Catalogue()
        catalogue.replace([entry("a", aliases=("x",)), entry("b")])
        changed = {"a": entry("a"), "b": entry("b", aliases=("x",))}
        for name in names:
            catalogue.upsert(changed[name])
        found = catalogue.find("x")
        assert found is not None
        assert found.name == "b"
        catalogue.delete("b")
        assert catalogue.find("x") is None


async def test_what_is_stored_is_read_back(tmp_path: Path) -> None:
    catalogue = Catalogue()
    catalogue.replace([entry("m", aliases=("x", "y"), min_replicas=2)])
    store = Store(tmp_path / "state", catalogue)
    await store.save(frozenset({"w2", "w1"}))
    await store.write_models()
    assert load_models(tmp_path / "state") == catalogue.models()
    assert load_workers(tmp_path / "state") == ["w1", "w2"]
    assert load_swap_failures(tmp_path / "state") == []
    failures = [SwapFailures("m", "sha256:1", "{}", 3, "w1", "i")]
    await store.save_swap_failures(failures)
    assert load_swap_failures(tmp_path / "state") == failures


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b'[{"nam', b"[1]", b'[{"x": 1}]'])
def test_a_damaged_file_counts_as_absent(tmp_path: Path, content: bytes) -> None:
    for name in ("catalogue.json", "swaps.json"):
        (tmp_path / name).write_bytes(content)
    assert load_models(tmp_path) == []
    assert load_swap_failures(tmp_path) == []
