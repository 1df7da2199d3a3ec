"""Rate, time left, stalls."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from helios.mesh.transfer.progress import ProgressTeller, RateMeter, StallWatch, TransferProgress


def test_rate_and_time_left() -> None:
    meter = RateMeter(0.0)
    for tick in range(1, 101):
        meter.observe(tick * 0.1, tick * 10)
    progress = meter.progress(10.0, 1000, 2000)
    assert progress.bytes_per_second == pytest.approx(100.0, rel=0.01)
    assert progress.remaining_seconds == pytest.approx(10.0, rel=0.01)


def test_what_was_here_before_is_no_rate() -> None:
    meter = RateMeter(0.0, 500)
    progress = meter.progress(1.0, 500, 1000)
    assert (progress.bytes_per_second, progress.remaining_seconds) == (0.0, None)


def test_a_change_of_speed_shows_within_seconds() -> None:
    meter = RateMeter(0.0)
    done = 0
    for tick in range(1, 201):
        done += 100 if tick <= 100 else 10
        meter.observe(tick * 0.1, done)
    assert meter.progress(20.0, done, 10**6).bytes_per_second == pytest.approx(100.0, rel=0.1)


def test_a_transfer_that_stands_still_gets_slower_and_then_has_no_end() -> None:
    meter = RateMeter(0.0)
    for tick in range(1, 101):
        meter.observe(tick * 0.1, tick * 10)
    asked = [meter.progress(10.0 + late, 1000, 2000) for late in (0.0, 1.0, 2.0, 4.0, 6.0, 60.0)]
    rates = [progress.bytes_per_second for progress in asked]
    assert rates == sorted(rates, reverse=True)
    assert rates[3] == pytest.approx(20.0, rel=0.1)
    assert rates[4:] == [0.0, 0.0]
    assert asked[-1].remaining_seconds is None


def test_what_an_earlier_transfer_brought_is_done_and_no_rate() -> None:
    told: list[TransferProgress] = []
    teller = ProgressTeller(told.append, 10_000, 0.0)
    teller.found(5_000)
    for tick in range(1, 101):
        teller.observe(tick * 0.1, 5_000 + tick * 10, is_told=tick == 100)
    assert 30 <= len(told) <= 50, "some times a second, not with every byte"
    assert (told[-1].done_bytes, told[-1].total_bytes) == (6_000, 10_000)
    assert told[-1].bytes_per_second == pytest.approx(100.0, rel=0.05)
    assert told[-1].remaining_seconds == pytest.approx(40.0, rel=0.05)


@given(counts=st.lists(st.integers(0, 50), min_size=1, max_size=100))
def test_a_stall_is_an_interval_with_too_few_bytes(counts: list[int]) -> None:
    watch = StallWatch(0.0, interval_seconds=10.0, min_bytes=100)
    for number, count in enumerate(counts, start=1):
        is_stalled = watch.is_stalled(float(number), count)
        if number % 10:
            assert not is_stalled
        else:
            assert is_stalled == (sum(counts[number - 10 : number]) < 100)
