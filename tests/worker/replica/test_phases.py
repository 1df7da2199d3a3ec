"""The phases of a start: they add up, and what nobody measured is said to be unexplained."""

import asyncio
import json
import os
from datetime import UTC, datetime
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from helios.worker.replica.adapters import Adapters
from helios.worker.replica.attachment import Attachment
from helios.worker.replica.condition import Condition
from helios.worker.replica.engine import EngineLoad
from helios.worker.replica.ledger import RequestLedger
from helios.worker.replica.phases import UNEXPLAINED, Timeline, measured
from helios.worker.replica.spec import ReplicaSpec

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


async def test_a_phase_that_ends_while_others_are_told_is_told_too() -> None:
    spec = ReplicaSpec(
        replica_id="r", model="m", revision="sha256:0", model_path="/m", created_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    condition = Condition(1, 1, requested_at=0.0)
    attachment = Attachment(
        spec,
        condition,
        RequestLedger(),
        engine_load=EngineLoad,
        on_drain=lambda _: None,
        on_stop=lambda: None,
        on_sleep=lambda _: None,
        adapters=Adapters(spec, lambda: None),
    )
    welcomed = asyncio.Event()
    welcomed.set()
    said: Any = attachment._speak(welcomed, 0)
    assert (await anext(said)).HasField("hello")
    names = ["fork", "config", "load", "api"]
    condition.add_phase("fork", 0.0, 1.0)
    told: list[str] = []
    async with asyncio.timeout(20):
        while len(told) < len(names):
            message = await anext(said)
            if message.HasField("progress"):
                told.append(message.progress.phase.phase)
                if len(told) < len(names):
                    condition.add_phase(names[len(told)], float(len(told)), len(told) + 1.0)
                    attachment.wake()
    assert told == names
    await said.aclose()
