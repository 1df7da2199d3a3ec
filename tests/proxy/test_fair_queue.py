"""Fair queues: tenants get their shares, nobody starves, and a high priority is held up by little."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helios.proxy.admission.fair_queue import RELIEF, Entry, FairQueue

WEIGHTS = st.integers(1, 10)
COSTS = st.integers(1, 1000)


def serve(queue: FairQueue) -> int:
    key = queue.first()
    assert key is not None
    queue.serve(key)
    return key


@given(
    weights=st.lists(WEIGHTS, min_size=2, max_size=5),
    costs=st.lists(COSTS, min_size=60, max_size=60),
    count=st.integers(1, 50),
)
def test_tenants_that_wait_all_the_time_get_their_shares(weights: list[int], costs: list[int], count: int) -> None:
    queue, entries, key = FairQueue(), dict[int, Entry](), 0
    for tenant, weight in enumerate(weights):
        for cost in costs:
            key += 1
            entries[key] = Entry(key, f"t{tenant}", 2, weight, cost)
            queue.add(entries[key])
    served = Counter[str]()
    for _ in range(count):
        entry = entries[serve(queue)]
        served[entry.tenant] += entry.cost
        shares = [served[f"t{tenant}"] / weight for tenant, weight in enumerate(weights)]
        for share, weight in zip(shares, weights, strict=True):
            for other, other_weight in zip(shares, weights, strict=True):
                assert abs(share - other) <= max(costs) / weight + max(costs) / other_weight + 1e-6


@given(costs=st.lists(COSTS, min_size=1, max_size=30), late_cost=COSTS)
def test_a_tenant_that_comes_late_is_next_but_one_and_has_saved_nothing(costs: list[int], late_cost: int) -> None:
    queue = FairQueue()
    for key, cost in enumerate([*costs, *[1] * 50]):
        queue.add(Entry(key, "early", 2, 1, cost))
    for _ in costs:
        serve(queue)
    for key in range(1000, 1050):
        queue.add(Entry(key, "late", 2, 1, late_cost))
    assert any(serve(queue) >= 1000 for _ in range(2))
    # For what it was away it gets no more than the other one's next request costs.
    late_in_a_row = 0
    while serve(queue) >= 1000:
        late_in_a_row += 1
    assert late_in_a_row * late_cost <= max(*costs, 1) + late_cost


def test_one_tenants_requests_stay_in_their_order() -> None:
    queue = FairQueue()
    for key in range(10):
        queue.add(Entry(key, "", 2, 1, 10 - key))
    assert [serve(queue) for _ in range(10)] == list(range(10))


def test_a_client_that_leaves_costs_its_tenant_nothing() -> None:
    queue = FairQueue()
    for key in range(4):
        queue.add(Entry(key, "a", 2, 1, 100))
    for key in range(4, 8):
        queue.add(Entry(key, "b", 2, 1, 100))
    for key in (0, 1, 2):
        queue.drop(key)
    assert [serve(queue) for _ in range(3)] == [3, 4, 5]


def test_leaving_and_coming_back_gains_nothing() -> None:
    queue = FairQueue()
    queue.add(Entry(0, "a", 2, 1, 1000))
    for key in range(1, 12):
        queue.add(Entry(key, "b", 2, 1, 100))
    assert serve(queue) == 0
    queue.add(Entry(50, "a", 2, 1, 1))
    assert [serve(queue) for _ in range(11)] == [*range(1, 11), 50]


@given(high=st.integers(0, 60), low=st.integers(1, 20))
def test_a_low_priority_has_its_turn_and_a_high_one_is_held_up_by_little(high: int, low: int) -> None:
    queue = FairQueue()
    for key in range(low):
        queue.add(Entry(key, "batch", 1, 1, 1000))
    for key in range(100, 100 + high):
        queue.add(Entry(key, "people", 3, 1, 1))
    order = [serve(queue) for _ in range(low + high)]
    while_both = order[: next(i for i, key in enumerate(order, 1) if order[i:].count(key) == 0 and _is_last(order, i))]
    lows = [index for index, key in enumerate(while_both) if key < 100]
    # Never two of the low band in a row while the high one waits, and never more than RELIEF of the high one.
    for first, second in pairwise(lows):
        assert second - first == RELIEF + 1
    if high > RELIEF:
        assert lows[0] == RELIEF


@given(
    bands=st.lists(st.integers(1, 4), min_size=2, max_size=4, unique=True),
    cost=st.lists(COSTS, min_size=4, max_size=4),
)
def test_every_band_has_its_turns_while_all_of_them_always_wait(bands: list[int], cost: list[int]) -> None:
    queue, key, band_of = FairQueue(), 0, dict[int, int]()

    def come(band: int) -> None:
        nonlocal key
        key += 1
        band_of[key] = band
        queue.add(Entry(key, f"t{band}", band, 1, cost[band - 1]))

    for band in bands:
        come(band)
    order: list[int] = []
    for _ in range(200):
        band = band_of[serve(queue)]
        order.append(band)
        come(band)
    # A cycle is RELIEF of the highest band and one of each lower one in turn.
    cycle = (RELIEF + 1) * (len(bands) - 1)
    for begin in range(len(order) - cycle):
        assert set(order[begin : begin + cycle]) == set(bands)
    assert order.count(max(bands)) >= len(order) * RELIEF // (RELIEF + 1)


def _is_last(order: list[int], end: int) -> bool:
    """Whether one of the two kinds is used up after so many."""
    rest = order[end:]
    return not any(key < 100 for key in rest) or not any(key >= 100 for key in rest)


@pytest.mark.parametrize(
    ("band", "tenant", "victim"),
    [
        (3, "new", 4),  # A higher band puts out the last of the lowest.
        (1, "new", 4),  # An equal one the last of who has most.
        (1, "b", 4),  # Who has one, too.
        (1, "a", None),  # But nobody for who has most.
    ],
)
def test_a_full_queue_makes_room_for_rank_and_for_small_tenants(band: int, tenant: str, victim: int | None) -> None:
    queue = FairQueue()
    for key, owner in enumerate(["a", "a", "b", "a", "a"]):
        queue.add(Entry(key, owner, 1, 1, 1))
    queue.add(Entry(9, "boss", 3, 1, 1))
    assert queue.victim_for(Entry(10, tenant, band, 1, 1)) == victim


def test_a_lower_band_puts_out_nobody() -> None:
    queue = FairQueue()
    for key in range(5):
        queue.add(Entry(key, "a", 2, 1, 1))
    assert queue.victim_for(Entry(10, "new", 1, 1, 1)) is None
    assert FairQueue().victim_for(Entry(10, "new", 1, 1, 1)) is None


class FairMachine(RuleBasedStateMachine):
    """A fair queue against a plain set of what waits."""

    @initialize()
    def begin(self) -> None:
        self.queue = FairQueue()
        self.waiting: dict[int, Entry] = {}
        self.count = 0

    @rule(tenant=st.sampled_from("abc"), band=st.integers(1, 3), weight=st.integers(1, 3), cost=st.integers(1, 5))
    def add(self, tenant: str, band: int, weight: int, cost: int) -> None:
        self.count += 1
        entry = Entry(self.count, tenant, band, weight, cost)
        self.queue.add(entry)
        self.waiting[self.count] = entry

    @precondition(lambda self: self.waiting)
    @rule()
    def serve(self) -> None:
        key = serve(self.queue)
        del self.waiting[key]

    @precondition(lambda self: self.waiting)
    @rule(choose=st.runner().flatmap(lambda self: st.sampled_from(sorted(self.waiting) or [0])))
    def drop(self, choose: int) -> None:
        if self.waiting.pop(choose, None) is not None:
            self.queue.drop(choose)

    @invariant()
    def test_what_waits_is_what_came_and_did_not_leave(self) -> None:
        assert len(self.queue) == len(self.waiting)
        first = self.queue.first()
        assert (first is None) == (not self.waiting)
        assert first is None or first in self.waiting


TestFairQueue = FairMachine.TestCase
