"""What `helios keys create` takes."""

from datetime import timedelta

import pytest

from helios.cli.keys import duration_of, priority_of
from helios.mesh.errors import InvalidRequest
from helios.registry.client import Priority


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        ("90s", timedelta(seconds=90)),
        ("15m", timedelta(minutes=15)),
        ("12h", timedelta(hours=12)),
        ("30d", timedelta(days=30)),
    ],
)
def test_times_are_read(text: str, expected: timedelta | None) -> None:
    assert duration_of(text) == expected


@pytest.mark.parametrize("text", ["30", "d", "-1d", "1.5h", "1w", "9999999d", "30 d"])
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InvalidRequest, match="30d"):
        duration_of(text)


def test_priorities_are_read_and_others_refused() -> None:
    assert [priority_of(text) for text in ("low", "Normal", "HIGH")] == list(Priority)
    with pytest.raises(InvalidRequest, match="low, normal or high"):
        priority_of("urgent")
