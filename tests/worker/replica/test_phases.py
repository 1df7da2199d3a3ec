"""The phases of a start: they add up, and what nobody measured is said to be unexplained."""

import json
import os

from hypothesis import given
from hypothesis import strategies as st

from helios.worker.replica.condition import Condition
from helios.worker.replica.phases import UNEXPLAINED, Timeline, measured

TIMES = st.integers(0, 1000).map(float)
SPANS = st.lists(st.tuples(TIMES, TIMES).map(sorted).map(tuple), max_size=12)


@given(SPANS, TIMES)
def test_phases_and_the_unexplained_add_up_to_the_whole(spans: list[tuple[float, float]], ready_at: float) -> None:
    timeline = Timeline(0.0)
    seconds = [timeline.add(began, ended) for began, ended in spans]
    whole = max([ready_at, *(ended for _, ended in spans)])
    assert min([*seconds, 0.0]) == 0.0
    assert sum(seconds) + timeline.close(whole) == whole


def test_work_beside_other_work_counts_as_far_as_it_was_waited_for() -> None:
    condition = Condition(1, 1, requested_at=10.0)
    condition.add_phase("fork", 10.0, 10.5)
    condition.add_phase("load", 10.75, 12.0)
    # At the same time as the load, and half a second longer.
    condition.add_phase("tokenizer", 10.5, 12.5)
    # At the same time as the load, and shorter.
    condition.add_phase("config", 11.0, 11.5)
    condition.end_phases(12.625)
    assert condition.phases == [("fork", 0.5), ("load", 1.25), ("tokenizer", 0.5), (UNEXPLAINED, 0.375)]


def test_a_measured_block_is_a_line_in_the_pipe() -> None:
    read_end, write_end = os.pipe()
    with measured(write_end, "load"):
        pass
    name, began_at, ended_at = json.loads(os.read(read_end, 4096))
    os.close(read_end)
    os.close(write_end)
    assert name == "load"
    assert 0 < began_at <= ended_at
