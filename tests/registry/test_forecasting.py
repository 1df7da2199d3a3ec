"""What is expected of models: rhythms found, bursts followed, little history, scores, targets."""

import math
import random
from datetime import UTC, datetime

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helios.registry.usage.forecasting import Outlook, forecast_of
from helios.registry.usage.records import Counts, Expectation, Forecast, UsageHour, hour_of, start_of
from helios.registry.usage.score import score_of
from helios.registry.usage.targets import Rung, Target, TargetPolicy, target_of
from helios.registry.usage.wire import target_from_proto, target_to_proto

NOW = datetime(2026, 3, 2, 10, 5, tzinfo=UTC)
HOUR = hour_of(NOW)
POLICY = TargetPolicy()

counts = st.lists(st.integers(0, 100_000).map(float), max_size=200)


def made(*requests: float) -> Forecast:
    hours = tuple(Expectation(mean, mean / 2, mean * 2) for mean in requests)
    return Forecast("recent", 100, HOUR, hours, NOW)


def daily(hours: int, *, seed: int = 1) -> list[float]:
    generator = random.Random(seed)
    return [max(0.0, round(generator.gauss(40 + 35 * math.sin(hour / 24 * math.tau), 3))) for hour in range(hours)]


@given(counts, st.integers(1, 48))
@settings(deadline=None, max_examples=60)
def test_what_is_expected_is_finite_never_negative_and_between_its_bounds(history: list[float], horizon: int) -> None:
    outlook = forecast_of(history, horizon)
    assert len(outlook.hours) == horizon
    assert outlook.history_hours == len(history)
    for hour in outlook.hours:
        assert 0 <= hour.low <= hour.requests <= hour.high < math.inf
        assert hour.requests <= 10 * max(history, default=0)


def test_a_model_that_was_never_used_is_expected_not_to_be() -> None:
    assert forecast_of([], 3) == Outlook("recent", 0, (forecast_of([], 1).hours[0],) * 3)
    assert forecast_of([], 1).hours[0].requests == 0


def test_with_an_hour_of_history_the_rate_so_far_is_expected_and_the_bounds_are_wide() -> None:
    (expected,) = forecast_of([16.0], 1).hours
    assert expected.requests == 16
    # Wider than the noise of a Poisson count of 16, whose tenths are at 11 and 21.
    assert expected.low < 11
    assert expected.high > 21


def test_the_rhythm_of_days_is_found_and_the_night_is_told_from_the_day() -> None:
    history = daily(14 * 24)
    outlook = forecast_of(history, 24)
    assert outlook.method == "daily"
    errors = [abs(hour.requests - come) for hour, come in zip(outlook.hours, daily(15 * 24)[-24:], strict=True)]
    assert sum(errors) / 24 < 6
    assert outlook.hours[6].requests > 3 * outlook.hours[18].requests


def test_a_model_without_rhythm_is_not_given_one() -> None:
    generator = random.Random(7)
    history = [float(generator.randint(8, 12)) for _ in range(30 * 24)]
    outlook = forecast_of(history, 24)
    assert all(8 <= hour.requests <= 12 for hour in outlook.hours)
    assert all(hour.low <= 9 and hour.high >= 11 for hour in outlook.hours)


def test_a_level_that_changes_for_good_is_followed_within_hours() -> None:
    assert forecast_of([5.0] * 200 + [50.0] * 12, 1).hours[0].requests > 40


def test_what_ended_is_expected_no_more() -> None:
    assert forecast_of(daily(14 * 24) + [0.0] * 7 * 24, 24).hours[0].requests < 3


def test_a_score_compares_with_the_hour_before_and_leaves_out_the_hour_that_runs() -> None:
    def hour(number: int, requests: int, expected: float | None) -> UsageHour:
        expectation = Expectation(expected, expected - 2, expected + 2) if expected is not None else None
        return UsageHour(number, Counts(requests), expectation)

    hours = [hour(1, 10, None), hour(2, 20, 18.0), hour(4, 10, 14.0), hour(5, 3, 99.0)]
    score = score_of(hours, current_hour=5)
    assert score is not None
    assert score.hour_count == 2
    assert score.wmape == 6 / 30
    # Hour 3 has no row, so nothing came: the naive errors are 10 and 10.
    assert score.mase == 6 / 20
    assert score.covered_ratio == 0.5
    assert score_of(hours[:1], current_hour=5) is None


def test_a_score_without_a_request_has_no_relative_error() -> None:
    score = score_of([UsageHour(2, Counts(), Expectation(0.2, 0, 1))], current_hour=9)
    assert score is not None
    assert (score.wmape, score.mase, score.covered_ratio) == (None, None, 1.0)


def test_the_more_is_expected_the_warmer_a_model_is_kept() -> None:
    def rung(*requests: float) -> Rung | None:
        target = target_of("m", made(*requests), Counts(), hour=HOUR, policy=POLICY)
        return target.rung if target is not None else None

    assert rung(20.0, 20.0) is Rung.READY
    assert rung(0.0, 20.0) is Rung.READY, "the next hour must find it warm"
    assert rung(1.0, 0.0) is Rung.MEMORY
    assert rung(0.0, 0.0, 0.0, 1.0) is Rung.DISK
    assert rung(0.0, 0.001) is None
    old = Forecast("recent", 100, HOUR - 48, (Expectation(50, 40, 60),) * 24, NOW)
    assert target_of("m", old, Counts(), hour=HOUR, policy=POLICY) is None, "an old forecast is no advice"


def test_a_replica_sleeps_where_requests_are_likely_and_not_sure_if_that_is_asked_for() -> None:
    def rung(requests: float, low: float, asleep_requests: float) -> Rung | None:
        forecast = Forecast("recent", 100, HOUR, (Expectation(requests, low, 60.0),) * 24, NOW)
        found = target_of("m", forecast, Counts(), hour=HOUR, policy=TargetPolicy(asleep_requests=asleep_requests))
        assert found is not None
        assert target_from_proto(target_to_proto(found)) == found
        return found.rung

    assert [rung(20.0, low, 2.0) for low in (2.0, 1.9)] == [Rung.READY, Rung.ASLEEP]
    assert [rung(requests, 0.0, 2.0) for requests in (2.0, 1.9)] == [Rung.ASLEEP, Rung.MEMORY]
    assert rung(20.0, 0.0, 0.0) is Rung.MEMORY, "nobody asked for it"


def test_a_model_is_ready_only_where_a_request_comes_almost_surely_and_else_its_replicas_go_sooner() -> None:
    def target(low: float) -> Target:
        forecast = Forecast("recent", 100, HOUR, (Expectation(20.0, low, 60.0),) * 24, NOW)
        found = target_of("m", forecast, Counts(), hour=HOUR, policy=TargetPolicy(idle_seconds=150.0))
        assert found is not None
        return found

    assert (target(2.0).rung, target(2.0).idle_seconds) == (Rung.READY, 0.0)
    assert (target(1.9).rung, target(1.9).idle_seconds) == (Rung.MEMORY, 150.0)
    assert all(target_from_proto(target_to_proto(target(low))) == target(low) for low in (2.0, 1.9))


def test_requests_that_come_each_for_itself_are_worth_a_replica_at_fewer_than_those_of_conversations() -> None:
    def rung(mean: float, turns: int) -> Rung | None:
        generator = np.random.default_rng(7)
        hours = generator.poisson(mean / turns, 400) * turns
        outlook = forecast_of(hours.astype(float).tolist(), 24)
        forecast = Forecast(outlook.method, outlook.history_hours, HOUR, outlook.hours, NOW)
        found = target_of("m", forecast, Counts(), hour=HOUR, policy=POLICY)
        return found.rung if found is not None else None

    assert rung(8.0, 1) is Rung.READY
    assert rung(8.0, 4) is Rung.MEMORY, "two conversations an hour"
    assert rung(40.0, 4) is Rung.READY


def test_a_rhythm_is_sure_of_its_busy_hours_and_bursts_are_not() -> None:
    rhythm = [20.0 if 8 <= hour % 24 < 18 else 0.0 for hour in range(14 * 24 + 10)]
    assert forecast_of(rhythm, 1).hours[0].low > 10
    generator = random.Random(3)
    bursts = [0.0] * (14 * 24)
    for begin in generator.sample(range(10, 14 * 24 - 2), 25):
        bursts[begin] = 30.0
    expected = forecast_of([*bursts, 30.0], 1).hours[0]
    assert expected.requests > 1, "what has just begun may last"
    assert expected.low == 0, "and most often did not"


def test_replicas_are_as_many_as_the_busy_end_of_the_bounds_keeps_busy() -> None:
    # 3,600 requests an hour at the most, of 20 s each: 20 at once, 8 a replica.
    recent = Counts(requests=10, busy_ms=200_000)
    target = target_of("m", made(1800.0, 0.0), recent, hour=HOUR, policy=POLICY)
    assert target is not None
    assert target.replica_count == 3
    assert target.expires_at == start_of(HOUR + 2)
    bounded = target_of("m", made(1800.0, 0.0), recent, hour=HOUR, policy=POLICY, max_replicas=2)
    assert bounded is not None
    assert bounded.replica_count == 2


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=24), st.integers(0, 10**6), st.integers(0, 10**9))
def test_a_target_has_replicas_if_and_only_if_they_are_ready(means: list[float], requests: int, busy_ms: int) -> None:
    recent = Counts(requests=requests, busy_ms=busy_ms)
    target = target_of("m", made(*means), recent, hour=HOUR, policy=POLICY, max_replicas=4)
    if target is not None:
        assert (target.replica_count > 0) == (target.rung is Rung.READY)
        assert target.replica_count <= 4
