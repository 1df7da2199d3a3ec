"""Hints of requests: who goes first in an engine's queue, by how much, and that nobody waits for ever."""

from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.names import COHORT_HEADER, EXPECTED_TOKENS_HEADER, PRIORITY_HEADER
from helios.worker.replica.queueing import NO_HINTS, Hints, Queueing, read_hints

HINTS = st.builds(Hints, st.integers(1, 3), st.integers(0, 10_000), st.sampled_from(["", "a", "b"]))
# Two bands apart, the longest answer against the shortest, and a prompt that is in the cache.
MOST_SECONDS = 20 + 10 + 2


def test_hints_are_read_and_what_makes_no_sense_says_nothing() -> None:
    told = {PRIORITY_HEADER: "3", EXPECTED_TOKENS_HEADER: "120", COHORT_HEADER: "f00"}
    assert read_hints(told) == Hints(3, 120, "f00")
    assert read_hints({}) is NO_HINTS
    assert read_hints({COHORT_HEADER: "f00"}) == Hints(cohort="f00")
    for text in ("", "9", "-1", "high", "1e3", "٣", "9" * 400):
        assert read_hints({PRIORITY_HEADER: text, EXPECTED_TOKENS_HEADER: "x"}) == NO_HINTS


def test_without_hints_the_order_is_that_of_arrival() -> None:
    queueing = Queueing()
    orders = [queueing.order(NO_HINTS, at / 10) for at in range(50)]
    assert orders == sorted(set(orders))


def test_a_higher_band_overtakes_those_that_came_shortly_before() -> None:
    queueing = Queueing()
    low, normal = queueing.order(Hints(1), 100.0), queueing.order(Hints(2), 100.0)
    assert queueing.order(Hints(3), 105.0) < normal < low
    assert queueing.order(Hints(3), 111.0) > normal, "nobody of its own waits longer than bands are apart"
    assert queueing.order(Hints(3), 121.0) > low


def test_a_short_answer_goes_before_a_long_one() -> None:
    queueing = Queueing()
    assert queueing.order(Hints(expected_tokens=10), 1.0) < queueing.order(Hints(expected_tokens=500), 0.5)
    assert queueing.order(Hints(expected_tokens=10**8), 0.0) == queueing.order(Hints(expected_tokens=2000), 0.0)


def test_a_prompt_that_begins_like_one_of_a_moment_ago_goes_sooner() -> None:
    queueing = Queueing()
    first = queueing.order(Hints(cohort="a"), 0.0)
    assert first == queueing.order(Hints(cohort="b"), 0.0) == 0
    assert queueing.order(Hints(cohort="a"), 1.0) < first
    assert queueing.order(Hints(cohort="a"), 100.0) == 100_000, "its blocks may be gone by then"


@given(st.lists(st.tuples(HINTS, st.floats(0, 1000)), min_size=2, max_size=30))
def test_no_hint_lets_anybody_wait_for_more_than_its_worth(requests: list[tuple[Hints, float]]) -> None:
    queueing, requests = Queueing(), sorted(requests, key=lambda request: request[1])
    orders = [(queueing.order(hints, at), at) for hints, at in requests]
    for order, at in orders:
        assert all(order < later for later, came in orders if came > at + MOST_SECONDS + 0.001)
