"""What ``helios models policy`` makes of its options, and how it says what holds."""

import pytest

from helios.cli.models_policy import PolicyChange, lines_of, read_time, read_window
from helios.mesh.errors import InvalidRequest
from helios.mesh.routing import Choice, ModelRouting
from helios.mesh.windows import Window
from helios.registry.client import ModelPolicy

OFFICE = Window("0 8 * * MON-FRI", 36_000.0, "Europe/Berlin", min_replicas=2)


def test_windows_are_read() -> None:
    assert read_window("0 8 * * MON-FRI; 10h; min=2; zone=Europe/Berlin") == OFFICE
    assert read_window("*/30 * * * *;90s;max=0") == Window("*/30 * * * *", 90.0, max_replicas=0)


@pytest.mark.parametrize("text", ["", "0 8 * * *", "0 8 * * *; 10h; min", "0 8 * * *; 10h; least=2", "0 8 * * *; long"])
def test_what_is_no_window_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        read_window(text)


def test_times_are_read() -> None:
    assert [read_time(text) for text in ("15m", "0", "usual")] == [900.0, 0.0, None]
    with pytest.raises(InvalidRequest):
        read_time("soon")


def test_what_is_not_said_stays_as_it_is() -> None:
    before = ModelPolicy(1, 3, idle_seconds=60.0, windows=(OFFICE,), is_durable=True)
    assert PolicyChange().apply(before) == before
    after = PolicyChange(least=0, idle="usual", staged="1d").apply(before)
    assert after == ModelPolicy(0, 3, staged_seconds=86_400.0, windows=(OFFICE,), is_durable=True)
    assert PolicyChange(has_no_windows=True).apply(before).windows == ()
    assert PolicyChange(windows=("0 9 * * *; 1h; max=1",), least=0).apply(before).windows[0].max_replicas == 1
    with pytest.raises(InvalidRequest):
        PolicyChange(windows=("at nine; 1h; min=1",)).apply(before)


def test_how_replicas_are_chosen_is_said_name_by_name_and_taken_back() -> None:
    said = PolicyChange(routing=("prefix_weight=0.6", "choice=power_of_two", "kv_weight=1")).apply(ModelPolicy(1))
    assert said == ModelPolicy(1, routing=ModelRouting(prefix_weight=0.6, choice=Choice.POWER_OF_TWO, kv_weight=1.0))
    back = PolicyChange(routing=("prefix_weight=usual", "choice=usual")).apply(said)
    assert back.routing == ModelRouting(kv_weight=1.0)
    assert lines_of(back)[-1] == "routing: kv_weight=1.0"


@pytest.mark.parametrize(
    "text", ["", "prefix_weight", "prefix_weight=much", "moon_weight=1", "choice=worst", "kv_weight=2", "kv_weight=nan"]
)
def test_what_is_no_weight_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        PolicyChange(routing=(text,)).apply(ModelPolicy())


def test_a_policy_is_put_into_words() -> None:
    policy = ModelPolicy(0, 4, (OFFICE,), idle_seconds=90.0, staged_seconds=0.0)
    assert lines_of(policy) == [
        "replicas: at least 0, at most 4",
        "  from 0 8 * * MON-FRI (Europe/Berlin) for 10h: at least 2, at most 4",
        "idle: for 90s",
        "asleep: as usual",
        "staged in memory: for ever",
        "routing: as usual",
    ]
    assert lines_of(ModelPolicy())[0] == "replicas: at least 0, at most what fits"
