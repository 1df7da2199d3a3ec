"""The simulated engine: its scheduler in every order of events, its times, and failures that a seed brings back."""

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.mesh.errors import Bug, InvalidRequest, ReplicaLost, Unavailable
from helios.worker.engines.simulated.engine import SimulatedEngine
from helios.worker.engines.simulated.faults import Fault, Faults
from helios.worker.engines.simulated.scheduler import Capacity, Scheduler, Step
from helios.worker.engines.simulated.settings import SimulatedOptions
from helios.worker.replica.engine import EngineHooks, Meter, Piece, Sampling, Text
from helios.worker.replica.queueing import ORDER, Hints, Queueing
from helios.worker.replica.spec import ReplicaSpec

CAPACITY = Capacity(max_batch=4, max_batched_tokens=6, block_count=8, block_tokens=2)
LONGEST = CAPACITY.block_count * CAPACITY.block_tokens


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, are cancelled, and end, while steps are planned and completed."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(CAPACITY)
        self.left: dict[int, int] = {}
        self.count = 0
        self.step: Step | None = None

    @rule(prompt=st.integers(1, LONGEST - 1), answer=st.integers(1, LONGEST), order=st.integers(0, 3))
    def a_request_comes(self, prompt: int, answer: int, order: int) -> None:
        self.count += 1
        self.left[self.count] = min(answer, LONGEST - prompt)
        self.scheduler.add(self.count, prompt, order)

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def a_request_is_cancelled(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.left)))
        del self.left[key]
        self.scheduler.remove(key)

    @precondition(lambda self: self.step is None)
    @rule()
    def a_step_begins(self) -> None:
        self.step = self.scheduler.plan()
        # Whoever is here can go on.
        assert (self.step is None) == (not self.left)
        if self.step is not None:
            total = sum(self.step.tokens.values())
            assert 0 < total <= CAPACITY.max_batched_tokens
            assert self.step.prefill_tokens + self.step.decode_count == total
            assert not set(self.step.preempted) & set(self.step.tokens)

    @precondition(lambda self: self.step is not None)
    @rule()
    def a_step_ends(self) -> None:
        assert self.step is not None
        for key in self.scheduler.complete(self.step):
            self.left[key] -= 1
            if not self.left[key]:
                del self.left[key]
                self.scheduler.remove(key)
        self.step = None

    @invariant()
    def never_more_than_there_is(self) -> None:
        scheduler = self.scheduler
        assert 0 <= scheduler.usage_ratio <= 1
        assert scheduler.running_count <= CAPACITY.max_batch
        assert scheduler.running_count + scheduler.waiting_count == len(self.left)
        assert self.left or scheduler.usage_ratio == 0

    def teardown(self) -> None:
        """Whatever is left ends, in a bounded number of steps."""
        for _ in range(sum(self.left.values()) * LONGEST + 1):
            if self.step is None:
                self.a_step_begins()
            if self.step is None:
                break
            self.a_step_ends()
        assert not self.left


TestScheduler = SchedulerMachine.TestCase


@contextmanager
def engine(*, kv_tokens: int = 4096, replica_id: str = "r1", **options: str) -> Iterator[SimulatedEngine]:
    reader, writer = os.pipe()
    spec = ReplicaSpec(
        replica_id=replica_id,
        model="m",
        revision="sha256:" + "0" * 64,
        model_path="/nowhere",
        engine="simulated",
        options={"kv_bytes_per_token": "1", **options},
        kv_cache_bytes=kv_tokens,
        created_at=datetime.now(UTC),
    )
    hooks = EngineHooks(on_forked=lambda: None, on_load=lambda: None, phase_descriptor=writer)
    made: SimulatedEngine | None = None
    try:
        made = SimulatedEngine(spec, hooks)
        yield made
    finally:
        if made is not None:
            made.close()
        os.close(reader)
        os.close(writer)


async def ask(made: SimulatedEngine, words: int = 4, answer: int = 8) -> tuple[list[Piece], BaseException | None]:
    """Returns the pieces of a request, and what it failed with."""
    pieces: list[Piece] = []
    try:
        async for batch in made.generate(Text("word " * words), Sampling(max_tokens=answer), Meter("r", 0.0)):
            pieces += batch
    except (Bug, ReplicaLost) as error:
        return pieces, error
    return pieces, None


async def ask_together(made: SimulatedEngine, count: int, **sizes: int) -> list[tuple[list[Piece], Any]]:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(made, **sizes)) for _ in range(count)]
    return [task.result() for task in tasks]


async def finished(made: SimulatedEngine, requests: list[tuple[str, Hints, float]]) -> list[str]:
    """Asks one after the other, each as if it had come at its time; returns them in the order of their ends."""
    queueing, ended = Queueing(), []

    async def one(name: str) -> None:
        await ask(made, words=1, answer=2)
        ended.append(name)

    async with asyncio.TaskGroup() as group:
        for name, hints, at in requests:
            ORDER.set(queueing.order(hints, at))
            # A task has the context of where it was made.
            group.create_task(one(name))
            await asyncio.sleep(0)
    return ended


async def test_a_high_priority_overtakes_those_that_wait_and_low_ones_do_not_starve() -> None:
    low, high = Hints(band=1), Hints(band=3)
    with engine(max_batch="1", decode_seconds_per_token="0.001") as made:
        waiting = [("running", low, 0.0), ("low 1", low, 0.1), ("low 2", low, 0.2)]
        assert await finished(made, [*waiting, ("high", high, 5.0)]) == ["running", "high", "low 1", "low 2"]
        # High ones that keep coming are behind a low one that has waited for as long as bands are apart.
        flood = [(f"high {at}", high, float(at)) for at in range(1, 31)]
        ended = await finished(made, [("running", low, 0.0), ("low", low, 0.1), *flood])
        assert ended.index("low") == 1 + sum(at < 20.1 for at in range(1, 31))


async def test_short_answers_go_first_and_without_hints_the_order_is_that_of_arrival() -> None:
    with engine(max_batch="1", decode_seconds_per_token="0.001") as made:
        plain = [(str(at), Hints(), float(at)) for at in range(5)]
        assert await finished(made, plain) == ["0", "1", "2", "3", "4"]
        sized = [("0", Hints(), 0.0), ("long", Hints(expected_tokens=900), 0.1), ("short", Hints(expected_tokens=9), 1)]
        assert await finished(made, sized) == ["0", "short", "long"]


async def test_a_request_takes_the_time_that_was_set() -> None:
    with engine(prefill_seconds_per_token="0.002", decode_seconds_per_token="0.01") as made:
        meter = Meter("r", started := time.monotonic())
        async for _ in made.generate(Text("word " * 50), Sampling(max_tokens=11), meter):
            pass
        assert meter.first_token_at is not None
        # A prompt of 50 tokens, then ten steps. The loop is never early, and on a busy machine late.
        assert meter.first_token_at - started >= 0.1
        assert time.monotonic() - meter.first_token_at >= 0.1


async def test_a_batch_is_full_and_others_wait() -> None:
    with engine(max_batch="2", decode_seconds_per_token="0.001") as made:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(made)) for _ in range(5)]
            await asyncio.sleep(0.003)
            assert (made.load().running_requests, made.load().waiting_requests) == (2, 3)
        assert all(len(task.result()[0]) == 8 for task in tasks)


async def test_kv_pressure_preempts_and_everybody_still_gets_a_whole_answer() -> None:
    seen: list[float] = []
    with engine(kv_tokens=64, kv_block_tokens="4", decode_seconds_per_token="0.0005") as made:
        preempted = 0
        plan = made._scheduler.plan

        def watched() -> Step | None:
            nonlocal preempted
            step = plan()
            preempted += len(step.preempted) if step else 0
            seen.append(made.load().kv_usage_ratio)
            return step

        made._scheduler.plan = watched
        answers = await ask_together(made, 6, words=4, answer=40)
        assert [(len(pieces), error) for pieces, error in answers] == [(40, None)] * 6
        assert [piece.output_index for piece in answers[0][0]] == list(range(40))
        assert preempted > 0
        assert max(seen) > 0.9
        assert made.load().kv_usage_ratio == 0


def fates(seed: int) -> list[Any]:
    faults = Faults(SimulatedOptions(seed=seed, error_ratio=0.3, stall_ratio=0.3, death_after_requests=7))
    return [faults.fate(number, 20) for number in range(1, 40)]


def test_a_seed_brings_the_same_failures_back() -> None:
    assert fates(1) == fates(1) != fates(2)
    assert [number for number, fate in enumerate(fates(1), 1) if Fault.DEATH in fate] == [7]
    assert 3 <= sum(Fault.ERROR in fate for fate in fates(1)) <= 20
    assert all(0 <= at < 20 for fate in fates(1) for at in fate.values())


async def test_a_whole_run_is_the_same_again() -> None:
    async def run() -> list[tuple[int, bool]]:
        with engine(error_ratio="0.5", seed="3", decode_seconds_per_token="0.0002") as made:
            answers = await ask_together(made, 12)
        return [(len(pieces), error is None) for pieces, error in answers]

    first = await run()
    assert first == await run()
    assert {is_whole for _, is_whole in first} == {True, False}


async def test_an_error_in_mid_stream_comes_after_the_tokens_before_it() -> None:
    with engine(error_ratio="1", seed="5") as made:
        pieces, error = await ask(made, answer=20)
        assert isinstance(error, Bug)
        assert error.reason == "SIMULATED_FAILURE"
        assert 0 < len(pieces) < 20
        assert all(piece.finish is None for piece in pieces)
        assert made.load().running_requests == 0


async def test_a_death_ends_all_requests_and_is_seen() -> None:
    with engine(death_after_requests="2") as made:
        answers = await ask_together(made, 3, answer=30)
        assert all(isinstance(error, ReplicaLost) for _, error in answers)
        assert made.load().is_dead
        _, error = await ask(made)
        assert isinstance(error, ReplicaLost)


async def test_a_stall_holds_up_everybody() -> None:
    with engine(stall_ratio="1", stall_seconds="0.3", decode_seconds_per_token="0.001") as made:
        started = time.monotonic()
        (pieces, error), _ = await ask_together(made, 2)
        assert (len(pieces), error) == (8, None)
        assert time.monotonic() - started >= 0.3


def test_a_start_fails_or_takes_its_time() -> None:
    with pytest.raises(Unavailable, match="the start of r9 fails"), engine(start_failure_ratio="1", replica_id="r9"):
        pass
    started = time.monotonic()
    with engine(start_seconds="0.2"):
        assert time.monotonic() - started >= 0.2


def test_wrong_options_are_named_all_at_once() -> None:
    with (
        pytest.raises(InvalidRequest, match=r"error_ratio.*speed|speed.*error_ratio"),
        engine(error_ratio="2", speed="1"),
    ):
        pass


async def test_an_answer_without_a_length_ends_by_itself() -> None:
    with engine(answer_tokens="5") as made:
        pieces = [p async for batch in made.generate(Text("a b"), Sampling(), Meter("r", 0.0)) for p in batch]
        assert "".join(piece.text for piece in pieces) == "a b a b a "
        assert pieces[-1].finish is not None
        assert pieces[-1].finish.value == "stop"
