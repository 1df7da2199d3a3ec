"""Retry budgets and outliers: what fails is tried elsewhere, not everywhere, and costs its neighbours nothing."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from helios.proxy.breaker import BreakerState
from helios.proxy.core import Core
from helios.proxy.fleet.state import Load, Replica
from helios.proxy.outliers import OutlierPolicy, Outliers
from helios.proxy.retries import RetryBudgets, RetryPolicy
from helios.proxy.routing.rules import Rules, Weights
from helios.proxy.traffic import LoadDelta, RoutingPolicy
from tests.proxy.support import core, entry, hello, policy, replica

UNAVAILABLE, INTERNAL = 14, 13


@given(fails=st.lists(st.booleans(), max_size=300), burst=st.integers(0, 20), ratio=st.floats(0, 1))
def test_of_any_requests_no_more_than_the_budget_are_retried(fails: list[bool], burst: int, ratio: float) -> None:
    budgets, retried = RetryBudgets(RetryPolicy(ratio, burst)), 0
    for count, is_failure in enumerate(fails, 1):
        if budgets.request("m") and is_failure:
            budgets.retried("m")
            retried += 1
        assert retried <= count * ratio + burst + 1e-6


@given(count=st.integers(0, 100))
def test_a_model_that_recovers_has_its_retries_again(count: int) -> None:
    budgets = RetryBudgets(RetryPolicy(0.2, 10))
    for _ in range(count):
        budgets.retried("m")
    # What is owed is bounded: at most twenty retries, which a hundred requests earn.
    for _ in range(100):
        budgets.request("m")
    assert budgets.request("m")


@given(failures=st.lists(st.booleans(), min_size=40, max_size=40))
def test_neighbours_that_fail_alike_are_no_outliers(failures: list[bool]) -> None:
    outliers = Outliers(OutlierPolicy())
    for is_failure in failures:
        for one in "abc":
            outliers.note(one, is_failure=is_failure)
    assert not outliers.is_outlier("a", "abc")
    assert not outliers.is_outlier("a", "a")


def test_a_share_of_failures_is_forgotten_with_good_answers() -> None:
    outliers = Outliers(OutlierPolicy())
    for _ in range(50):
        outliers.note("a", is_failure=True)
    assert outliers.share("a") > 0.99
    assert outliers.is_outlier("a", "ab")
    for _ in range(50):
        outliers.note("a", is_failure=False)
    assert outliers.share("a") == 0.0


def two_models() -> Core:
    """Models a and b, each with two replicas that take requests."""
    subject = core(replace(policy(), routing=RoutingPolicy(Rules(Weights(prefix=0.0)))))
    subject.models_replaced([entry("a", min_replicas=2), entry("b", min_replicas=2)], 0.0, is_synced=True)
    replicas: list[Replica] = []
    for number, name in enumerate(("a1", "a2", "b1", "b2")):
        replicas.append(replica(name, model=name[0], address=f"127.0.0.1:{1000 + number}"))
    subject.worker_hello(hello(replicas=tuple(replicas)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def ask(subject: Core, model: str, request_id: str, now: float) -> tuple[str, ...]:
    picked = subject.pick(entry(model, min_replicas=2), request_id, now)
    return tuple(choice.replica_id for choice in picked.choices) if picked is not None else ()


def end(subject: Core, replica_id: str, request_id: str, code: int, now: float) -> None:
    subject.load_report([LoadDelta(replica_id, Load(), (request_id,))], now)
    subject.load_report([LoadDelta(replica_id, Load(), (), ((request_id, code),))], now)


def test_a_model_whose_replicas_all_refuse_is_not_retried_on_and_on_and_its_neighbour_is() -> None:
    subject = two_models()
    assert len(ask(subject, "a", "first", 0.0)) == 2
    with_retry = 0
    for number in range(60):
        now = 100.0 * number
        subject.worker_seen("w", now)
        subject.tick(now)
        choices = ask(subject, "a", f"a {number}", now)
        with_retry += len(choices) > 1
        for choice in choices or ():
            end(subject, choice, f"a {number}", UNAVAILABLE, now)
        neighbours = ask(subject, "b", f"b {number}", now)
        assert len(neighbours) == 2
        end(subject, neighbours[0], f"b {number}", 0, now)
    assert with_retry <= 60 * 0.2 + 10 + 2
    assert {subject.traffic.breakers.state(name) for name in ("b1", "b2")} == {BreakerState.CLOSED}


def test_a_request_that_arrives_elsewhere_costs_a_retry() -> None:
    subject = two_models()
    retried = 0
    while len(choices := ask(subject, "a", f"q{retried}", 1.0)) == 2:
        end(subject, choices[1], f"q{retried}", 0, 1.0)
        retried += 1
        assert retried < 20
    # Ten that are saved up, and what these ten earn.
    assert 10 <= retried <= 13
    assert len(ask(subject, "b", "other", 1.0)) == 2


def test_what_an_only_replica_refuses_costs_no_retry_for_nothing_was_retried() -> None:
    subject = two_models()
    subject.traffic.drain_asked("a2")
    for number in range(30):
        # A good answer between, so that the breaker stays closed.
        end(subject, "a1", f"bad {number}", UNAVAILABLE, float(number))
        end(subject, "a1", f"good {number}", 0, float(number))
    second = replica("a3", model="a", address="127.0.0.1:1009")
    subject.replica_event("w", 1, second, 40.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 40.0)
    assert len(ask(subject, "a", "q", 40.0)) == 2


def test_a_replica_that_fails_every_second_time_is_left_alone_for_a_while() -> None:
    subject = two_models()
    number = 0
    while subject.traffic.breakers.state("a1") is not BreakerState.OPEN:
        end(subject, "a2", f"good {number}", 0, 1.0)
        end(subject, "a1", f"q{number}", INTERNAL if number % 2 else 0, 1.0)
        number += 1
        assert number < 20
    assert subject.traffic.breakers.state("a2") is BreakerState.CLOSED
    subject.worker_seen("w", 3.0)
    subject.tick(3.0)
    assert subject.traffic.breakers.state("a1") is BreakerState.HALF_OPEN
    probes = {ask(subject, "a", f"probe {number}", 3.0)[0] for number in range(3)}
    assert "a1" in probes
    end(subject, "a1", "probe", 0, 3.0)
    assert subject.traffic.breakers.state("a1") is BreakerState.CLOSED


def test_a_model_of_one_replica_has_no_outlier() -> None:
    subject = core()
    subject.models_replaced([entry()], 0.0, is_synced=True)
    subject.worker_hello(hello(replicas=(replica(),)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    for number in range(40):
        end(subject, "r", f"q{number}", INTERNAL if number % 2 else 0, 1.0)
    assert subject.traffic.breakers.state("r") is BreakerState.CLOSED
