"""Times with bounds of their own: when they are open, in which zone, and what is no window."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.windows import Window, bounds_at, is_open

HOUR = 3600
OFFICE = Window("0 8 * * MON-FRI", 10 * HOUR, "Europe/Berlin", min_replicas=2)


def minute(text: str, zone: str = "Europe/Berlin", *, fold: int = 0) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone), fold=fold).timestamp() // 60)


@pytest.mark.parametrize(
    ("at", "is_then"),
    [
        ("2026-11-20 07:59", False),
        ("2026-11-20 08:00", True),
        ("2026-11-20 17:59", True),
        ("2026-11-20 18:00", False),
        ("2026-11-21 12:00", False),  # a Saturday
        ("2026-11-23 12:00", True),
    ],
)
def test_a_window_is_open_from_its_beginning_until_its_time_is_over(at: str, is_then: bool) -> None:
    assert is_open(OFFICE, minute(at)) is is_then


def test_a_window_is_meant_in_its_own_zone() -> None:
    assert is_open(OFFICE, minute("2026-11-20 07:30", "UTC"))
    assert not is_open(OFFICE, minute("2026-11-20 17:30", "UTC"))
    assert is_open(Window("0 8 * * *", HOUR), minute("2026-11-20 08:30", "UTC"))


def test_hours_of_work_are_those_on_the_wall_where_clocks_are_put_forward_or_back() -> None:
    night = Window("0 1 * * *", 5 * HOUR, "Europe/Berlin", min_replicas=1)
    for day in ("2026-03-29", "2026-10-25", "2026-06-01"):
        assert is_open(night, minute(f"{day} 01:00"))
        assert is_open(night, minute(f"{day} 05:59"))
        assert not is_open(night, minute(f"{day} 06:00"))
    # The hour that there is twice is open both times, and one that begins in the hour that there is not begins.
    assert all(is_open(night, minute("2026-10-25 02:30", fold=fold)) for fold in (0, 1))
    skipped = Window("30 2 * * *", HOUR, "Europe/Berlin")
    assert is_open(skipped, minute("2026-03-29 03:15"))


def test_nothing_begins_or_ends_while_clocks_show_an_hour_again() -> None:
    def states(window: Window) -> str:
        first = minute("2026-10-25 00:00")
        return "".join("-x"[is_open(window, first + 15 * quarter)] for quarter in range(5 * 4))

    # Quarters of 00:00 to 02:00, 02:00 to 03:00 twice, and 03:00 to 04:00.
    assert states(Window("30 2 * * *", HOUR, "Europe/Berlin")) == "-" * 10 + "xx" + "xxxx" + "xx--"
    assert states(Window("30 1 * * *", HOUR, "Europe/Berlin")) == "-" * 6 + "xx" + "xx--" + "----" + "----"
    assert states(Window("0 * * * *", HOUR // 2, "Europe/Berlin")) == "xx--" * 5, "each hour is one"


def test_a_window_over_midnight_and_one_that_began_days_ago_are_open() -> None:
    late = Window("0 22 * * FRI", 60 * HOUR, "Europe/Berlin")
    assert is_open(late, minute("2026-11-22 23:00"))
    assert not is_open(late, minute("2026-11-23 10:00"))


def test_of_several_that_are_open_the_last_one_counts() -> None:
    windows = (OFFICE, Window("0 12 * * *", HOUR, "Europe/Berlin", max_replicas=1))
    at = minute("2026-11-20 12:30")
    assert bounds_at(at, windows, min_replicas=0, max_replicas=4) == (0, 1, windows[1])
    assert bounds_at(at + 60, windows, min_replicas=0, max_replicas=4) == (2, 4, OFFICE)
    assert bounds_at(at + 60, windows, min_replicas=0, max_replicas=1) == (2, 2, OFFICE), "never below the least"
    assert bounds_at(at + 12 * 60, windows, min_replicas=0, max_replicas=4) == (0, 4, None)


@pytest.mark.parametrize(
    "window",
    [
        Window("", HOUR),
        Window("0 8 * *", HOUR),
        Window("0 8 * * * *", HOUR),
        Window("61 8 * * *", HOUR),
        Window("0 8 30 2 *", 59),
        Window("0 8 * * *", 0),
        Window("0 8 * * *", 8 * 24 * HOUR),
        Window("0 8 * * *", HOUR, "Europe/Atlantis"),
        Window("0 8 * * *", HOUR, "../etc/passwd"),
        Window("0 8 * * *", HOUR, "/etc/passwd"),
    ],
)
def test_what_is_no_window_is_told(window: Window) -> None:
    assert window.problem()


@given(st.integers(29_000_000, 31_000_000), st.integers(0, 23), st.integers(1, 23))
def test_a_daily_window_is_open_exactly_in_its_hours(at: int, hour: int, hours: int) -> None:
    window = Window(f"0 {hour} * * *", hours * HOUR)
    assert not window.problem()
    now = datetime.fromtimestamp(at * 60, UTC)
    assert is_open(window, at) is ((now.hour - hour) % 24 < hours)
