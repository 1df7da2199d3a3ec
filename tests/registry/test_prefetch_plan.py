"""Who is asked to fetch what ahead: within budgets, where it is missing, and the same each time."""

from hypothesis import given
from hypothesis import strategies as st

from helios.registry.usage.prefetch_plan import Wanted, place

nodes = st.dictionaries(st.sampled_from("abcdef"), st.frozensets(st.sampled_from("uvwxyz")), max_size=6)
wanted = st.lists(
    st.builds(
        Wanted, st.sampled_from("uvwxyz"), st.integers(1, 60), st.floats(0, 24), st.integers(1, 4), st.just("because")
    ),
    max_size=6,
    unique_by=lambda one: one.revision,
)


@given(wanted, nodes, st.integers(0, 100))
def test_no_node_is_asked_for_what_it_has_or_for_more_than_its_budget(
    models: list[Wanted], held: dict[str, frozenset[str]], budget: int
) -> None:
    orders = place(models, held, {}, bytes_per_hour=budget)
    assert set(orders) == set(held)
    for node, mine in orders.items():
        assert not {order.revision for order in mine} & held[node]
        assert sum(order.size_bytes for order in mine) <= budget
    for one in models:
        copies = sum(one.revision in has for has in held.values())
        asked = sum(one.revision == order.revision for mine in orders.values() for order in mine)
        assert asked <= max(0, one.copies - copies)
        # With budgets to spare it is as many as there are nodes for.
        if budget >= sum(other.size_bytes for other in models):
            assert asked == max(0, min(one.copies, len(held)) - copies)


@given(wanted, nodes, st.integers(0, 100))
def test_a_plan_that_is_made_again_within_the_hour_is_the_same(
    models: list[Wanted], held: dict[str, frozenset[str]], budget: int
) -> None:
    orders = place(models, held, {}, bytes_per_hour=budget)
    ordered = {node: {order.revision: order.size_bytes for order in mine} for node, mine in orders.items()}
    assert place(models, held, ordered, bytes_per_hour=budget) == orders


def test_what_is_expected_most_for_its_bytes_comes_first() -> None:
    models = [Wanted("u", 50, 1.0, 1, ""), Wanted("v", 10, 0.9, 1, ""), Wanted("w", 45, 24.0, 1, "")]
    orders = place(models, {"n": ()}, {}, bytes_per_hour=60)
    assert [order.revision for order in orders["n"]] == ["w", "v"]


def test_what_a_node_dropped_is_asked_for_again_and_costs_its_budget_once() -> None:
    models = [Wanted("u", 50, 1.0, 1, ""), Wanted("v", 50, 0.5, 1, "")]
    orders = place(models, {"n": ()}, {"n": {"u": 50, "gone": 50}}, bytes_per_hour=100)
    assert [order.revision for order in orders["n"]] == ["u"]


def test_models_spread_over_the_nodes() -> None:
    models = [Wanted(f"r{number}", 1, 1.0, 1, "") for number in range(60)]
    orders = place(models, {"a": (), "b": (), "c": ()}, {}, bytes_per_hour=100)
    assert all(len(mine) >= 8 for mine in orders.values())
    assert sum(map(len, orders.values())) == 60
