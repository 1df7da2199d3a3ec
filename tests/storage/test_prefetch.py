"""Fetching ahead, as the agent decides it: within its budget, into room to spare, and cheap where it was wrong."""

from datetime import UTC, datetime, timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.storage.prefetch.state import Ahead, Fetch, GiveUp, Order, Plan, State

NOW = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)
LATER = NOW + timedelta(hours=2)
REVISIONS = tuple(f"sha256:{number}" for number in range(6))


def plan(*orders: Order, **uses: float) -> Plan:
    return Plan(orders, uses, LATER)


def test_the_most_useful_that_fits_the_budget_and_the_room_is_fetched() -> None:
    ahead = Ahead(100)
    ahead.take(plan(Order("huge", 101), Order("big", 60), Order("small", 40)))
    assert ahead.next(NOW, here=(), spare_bytes=50) == Fetch(Order("small", 40))
    messages = {one.revision: (one.state, one.message) for one in ahead.report(NOW).outcomes}
    assert messages["huge"] == (State.WAITING, "it is larger than the budget of an hour")
    assert messages["big"] == (State.WAITING, "no tier has room to spare")


def test_the_budget_is_an_hours_and_what_came_in_parts_stays_booked() -> None:
    ahead = Ahead(100)
    first, second = Order("a", 60), Order("b", 60)
    ahead.take(plan(first, second))
    ahead.began(first, NOW)
    assert ahead.next(NOW, here=(), spare_bytes=1000) is None, "one at a time"
    ahead.ended(first, NOW, fetched_bytes=None)
    assert ahead.budget_bytes(NOW) == 40
    assert ahead.next(NOW, here=("a",), spare_bytes=1000) is None
    assert ahead.next(NOW + timedelta(hours=1), here=("a",), spare_bytes=1000) == Fetch(second)


def test_blobs_that_were_here_are_given_back_to_the_budget() -> None:
    ahead = Ahead(100)
    ahead.take(plan(Order("tune", 90)))
    ahead.began(Order("tune", 90), NOW)
    ahead.ended(Order("tune", 90), NOW, fetched_bytes=5)
    assert ahead.budget_bytes(NOW) == 95


def test_what_people_ask_for_needs_no_budget_and_no_room_to_spare() -> None:
    ahead, asked = Ahead(0), Order("a", 60, is_asked=True)
    ahead.take(plan(Order("b", 1), asked))
    assert ahead.next(NOW, here=(), spare_bytes=0) == Fetch(asked)
    ahead.began(asked, NOW)
    ahead.ended(asked, NOW, fetched_bytes=60)
    assert ahead.report(NOW).fetched_bytes == 60


def test_a_wrong_forecast_is_the_first_to_go_and_is_counted_as_wasted() -> None:
    ahead, wrong, right = Ahead(1000), Order("wrong", 80), Order("right", 90)
    ahead.take(plan(wrong, wrong=2.0))
    ahead.began(wrong, NOW)
    ahead.ended(wrong, NOW, fetched_bytes=80)
    ahead.look(here=("wrong",), is_used=lambda revision: False)
    ahead.take(plan(right, wrong=0.5))
    assert ahead.next(NOW, here=("wrong",), spare_bytes=10) is None, "something is expected of it still"
    ahead.take(plan(right))
    assert ahead.next(NOW, here=("wrong",), spare_bytes=10) == GiveUp("wrong")
    ahead.look(here=(), is_used=lambda revision: False)
    assert ahead.next(NOW, here=(), spare_bytes=100) == Fetch(right)
    report = ahead.report(NOW)
    assert (report.fetched_bytes, report.used_bytes, report.wasted_bytes) == (80, 0, 80)


def test_what_was_wanted_since_counts_as_used_and_is_never_given_up() -> None:
    ahead, order = Ahead(1000), Order("a", 80)
    ahead.take(plan(order))
    ahead.began(order, NOW)
    ahead.ended(order, NOW, fetched_bytes=80)
    ahead.look(here=("a",), is_used=lambda revision: True)
    ahead.take(plan(Order("b", 90)))
    assert ahead.next(NOW, here=("a",), spare_bytes=0) is None
    assert ahead.report(NOW).used_bytes == 80


def test_a_plan_that_is_over_orders_and_expects_nothing() -> None:
    ahead = Ahead(1000)
    ahead.take(plan(Order("a", 1), a=3.0))
    assert ahead.expected_uses("a", NOW) == 3
    assert ahead.expected_uses("a", LATER) == 0
    assert ahead.next(LATER, here=(), spare_bytes=1000) is None
    assert ahead.report(LATER).outcomes == ()


def test_what_failed_waits_for_the_next_plan() -> None:
    ahead, order = Ahead(1000), Order("a", 1)
    ahead.take(plan(order))
    ahead.began(order, NOW)
    ahead.ended(order, NOW, fetched_bytes=None, failure="UNAVAILABLE: away")
    assert ahead.next(NOW, here=(), spare_bytes=9) is None
    assert ahead.report(NOW).outcomes[0].state is State.FAILED
    ahead.take(plan(order))
    assert ahead.next(NOW, here=(), spare_bytes=9) == Fetch(order)


class Prefetching(RuleBasedStateMachine):
    """Plans, time, room, uses and evictions in any order."""

    BUDGET = 100

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.ahead = Ahead(self.BUDGET)
        self.plan = Plan()
        self.here: dict[str, int] = {}
        self.fetching: Order | None = None
        self.fetched_in_hour: dict[int, int] = {}

    @rule(
        wanted=st.lists(
            st.tuples(st.sampled_from(REVISIONS), st.integers(1, 120)), max_size=4, unique_by=lambda w: w[0]
        )
    )
    def a_plan_comes(self, wanted: list[tuple[str, int]]) -> None:
        self.plan = Plan(tuple(Order(revision, size) for revision, size in wanted), {}, self.now + timedelta(hours=2))
        self.ahead.take(self.plan)

    @rule(minutes=st.integers(1, 90))
    def time_passes(self, minutes: int) -> None:
        self.now += timedelta(minutes=minutes)

    @rule(spare=st.integers(0, 150))
    def it_decides(self, spare: int) -> None:
        match self.ahead.next(self.now, here=self.here, spare_bytes=spare):
            case Fetch(order):
                assert self.fetching is None
                assert order in self.plan.orders
                assert order.revision not in self.here
                assert order.size_bytes <= spare
                self.fetching = order
                self.ahead.began(order, self.now)
                hour = int(self.now.timestamp() // 3600)
                self.fetched_in_hour[hour] = self.fetched_in_hour.get(hour, 0) + order.size_bytes
            case GiveUp(revision):
                assert self.here[revision] == 0, "what was used is not given up"
                assert all(order.revision != revision for order in self.plan.orders) or self.now >= self.plan.expires_at
                del self.here[revision]
            case None:
                pass

    @precondition(lambda self: self.fetching is not None)
    @rule(how=st.sampled_from(["done", "failed", "broken off"]))
    def the_fetch_ends(self, how: str) -> None:
        order, self.fetching = self.fetching, None
        assert order is not None
        if how == "done":
            self.here[order.revision] = 0
        failure = "X: away" if how == "failed" else ""
        self.ahead.ended(order, self.now, fetched_bytes=order.size_bytes if how == "done" else None, failure=failure)

    @precondition(lambda self: self.here)
    @rule(index=st.integers(0, 10), is_used=st.booleans())
    def it_is_used_or_goes(self, index: int, is_used: bool) -> None:
        revision = sorted(self.here)[index % len(self.here)]
        if is_used:
            self.here[revision] += 1
        else:
            del self.here[revision]

    @rule()
    def the_agent_restarts(self) -> None:
        kept, self.ahead, self.fetching = self.ahead.account(), Ahead(self.BUDGET), None
        self.ahead.recall(kept)
        self.ahead.take(self.plan)

    @rule()
    def it_looks(self) -> None:
        self.ahead.look(here=self.here, is_used=lambda revision: self.here[revision] > 0)
        report = self.ahead.report(self.now)
        assert report.used_bytes + report.wasted_bytes <= report.fetched_bytes

    @invariant()
    def no_hour_takes_more_than_its_budget(self) -> None:
        assert all(fetched <= self.BUDGET for fetched in self.fetched_in_hour.values())
        assert 0 <= self.ahead.budget_bytes(self.now) <= self.BUDGET


TestPrefetching = Prefetching.TestCase
TestPrefetching.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_restart_forgets_nothing_that_was_counted() -> None:
    ahead = Ahead(1000)
    for order in (Order("a", 300), Order("b", 300)):
        ahead.began(order, NOW)
        ahead.ended(order, NOW, fetched_bytes=200)
    again = Ahead(1000)
    again.recall(ahead.account())
    assert again.account() == ahead.account()
    # While the agent was down "b" went; "a" was lent since.
    again.look(here={"a"}, is_used=lambda revision: revision == "a")
    report = again.report(NOW)
    assert (report.fetched_bytes, report.used_bytes, report.wasted_bytes) == (400, 200, 200)
    assert report.budget_bytes == 600
