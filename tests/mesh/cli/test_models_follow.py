"""What ``helios models follow`` makes of its options."""

from datetime import timedelta

import pytest

from helios.cli.models_follow import Manner, document_of, read_span
from helios.mesh.errors import InvalidRequest
from helios.registry.client import FollowPolicy, Wish

WISH = Wish("hf:org/m")


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), ("7d", 604_800)])
def test_times_are_read(text: str, seconds: int) -> None:
    assert read_span(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "5", "m", "-1h", "1w", "1 h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        read_span(text)


def test_what_is_not_said_stays_as_it_is() -> None:
    before = Wish("hf:org/m", interval=timedelta(hours=3), policy=FollowPolicy.MOVE)
    assert Manner().apply(before) == before
    assert Manner("2h").apply(before) == Wish("hf:org/m", interval=timedelta(hours=2), policy=FollowPolicy.MOVE)
    rolled = Manner(policy="rollout", weight=5).apply(WISH)
    assert (rolled.policy, rolled.weight_percent) == (FollowPolicy.ROLLOUT, 5)


@pytest.mark.parametrize("manner", [Manner(policy="later"), Manner(policy="rollout"), Manner("soon")])
def test_what_can_not_be_meant_is_refused(manner: Manner) -> None:
    with pytest.raises(InvalidRequest):
        manner.apply(WISH)


def test_a_model_that_follows_nothing_shows_nothing() -> None:
    assert document_of(None) == {}
