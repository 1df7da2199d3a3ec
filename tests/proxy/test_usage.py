"""Usage as the proxy counts and reports it: each request once, nothing lost or twice; and the registry's targets."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.mesh.errors import Unavailable
from helios.proxy.ledger import Ledger
from helios.proxy.scaling.forecast import Expected
from helios.proxy.scaling.ladder import Rung as Warmth
from helios.proxy.usage.advice import watch_advice
from helios.proxy.usage.meter import Meter, Outgoing, Tally
from helios.proxy.usage.reporter import UsageReporter
from helios.registry.client import Counts, Delta, Rung, Target

NOW = datetime(2026, 3, 2, 10, 5, tzinfo=UTC)
TAKEN = Tally(prompt_tokens=7, completion_tokens=3, busy_ms=40)


class Registry:
    """Takes reports as the registry does: once, by reporter and sequence. Answers may be lost, calls refused."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}
        self.total = Counts()
        self.refuses = False
        self.loses_answers = False

    async def report(self, reporter: str, sequence: int, deltas: list[Delta]) -> int:
        if self.refuses:
            raise Unavailable("away")
        if sequence > self.taken.get(reporter, 0):
            self.taken[reporter] = sequence
            for delta in deltas:
                names = Counts.__dataclass_fields__
                self.total = Counts(*(getattr(self.total, n) + getattr(delta.counts, n) for n in names))
        if self.loses_answers:
            raise Unavailable("the answer was lost")
        return sequence


class Memory:
    """A disk."""

    def __init__(self) -> None:
        self.document: Mapping[str, Any] | None = None

    async def save_usage(self, document: Mapping[str, Any]) -> None:
        self.document = document


class Reporting(RuleBasedStateMachine):
    """A proxy that serves, reports, stops and is killed, and a registry that comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.registry, self.memory = Registry(), Memory()
        self.next_id = 0
        self.ran: list[str] = []
        # What was counted, and of that what a crash may lose: all since the last interval.
        self.counted = 0
        self.unsent = 0
        self.lost = 0
        self._start()

    def _start(self) -> None:
        self.meter = Meter()
        self.reporter = UsageReporter(self.meter, self.registry, self.memory, self.memory.document, interval_seconds=30)

    @rule(count=st.integers(1, 3))
    def requests_start(self, count: int) -> None:
        for _ in range(count):
            self.next_id += 1
            self.ran.append(str(self.next_id))
            self.meter.started(self.ran[-1], "m", self.next_id % 3, is_ours=True)
            self.counted += 1
            self.unsent += 1

    @rule()
    def a_request_ends(self) -> None:
        if self.ran:
            self.meter.finished(self.ran.pop(), "m", 1, taken=TAKEN, status_code=0, is_ours=False)

    @rule(refuses=st.booleans(), loses_answers=st.booleans())
    def the_network_changes(self, refuses: bool, loses_answers: bool) -> None:
        self.registry.refuses, self.registry.loses_answers = refuses, loses_answers

    @rule()
    def an_interval_passes(self) -> None:
        asyncio.run(self.reporter.send())
        self.unsent = 0

    @rule()
    def the_proxy_restarts(self) -> None:
        asyncio.run(self.reporter.close())
        self.unsent = 0
        self._start()

    @rule()
    def the_proxy_is_killed(self) -> None:
        self.lost += self.unsent
        self.unsent = 0
        self.ran.clear()
        self._start()

    @invariant()
    def nothing_counts_twice(self) -> None:
        assert self.registry.total.requests <= self.counted - self.lost

    def teardown(self) -> None:
        self.registry.refuses = self.registry.loses_answers = False
        while self.ran:
            self.a_request_ends()
        asyncio.run(self.reporter.send())
        assert self.registry.total.requests == self.counted - self.lost
        assert self.registry.total.completion_tokens % TAKEN.completion_tokens == 0


TestReporting = Reporting.TestCase
TestReporting.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_tokens_of_requests_that_run_over_a_clean_restart_are_counted() -> None:
    registry, memory, meter = Registry(), Memory(), Meter()
    meter.started("r", "m@prod", 5, is_ours=True)
    asyncio.run(UsageReporter(meter, registry, memory, None, interval_seconds=30).close())
    assert registry.total == Counts(requests=1)
    meter = Meter()
    reporter = UsageReporter(meter, registry, memory, memory.document, interval_seconds=30)
    meter.finished("r", "m", 5, taken=TAKEN, status_code=0, is_ours=False)
    asyncio.run(reporter.send())
    assert registry.total == Counts(1, 7, 3, 0, 40)


def test_what_another_proxy_picked_is_not_counted_here() -> None:
    meter = Meter()
    meter.started("theirs", "m", 1, is_ours=False)
    meter.finished("theirs", "m", 1, taken=TAKEN, status_code=0, is_ours=False)
    assert meter.take() == {}


def test_a_request_that_goes_to_a_second_replica_is_one_request() -> None:
    meter = Meter()
    meter.started("r", "m", 1, is_ours=True)
    meter.finished("r", "m", 1, taken=Tally(busy_ms=5), status_code=14, is_ours=False)
    meter.started("r", "m", 1, is_ours=False)
    meter.finished("r", "m", 1, taken=TAKEN, status_code=0, is_ours=False)
    meter.finished("r", "m", 1, taken=TAKEN, status_code=0, is_ours=False)
    assert meter.take() == {("m", 1): Tally(1, 7, 3, 0, 45)}
    assert meter.running() == []


def test_a_request_that_is_over_before_its_start_was_told_is_counted() -> None:
    meter = Meter()
    meter.finished("r", "m@v2", 1, taken=TAKEN, status_code=0, is_ours=True)
    meter.cold_start("m", 2)
    assert meter.take() == {("m", 1): Tally(1, 7, 3, 0, 40), ("m", 2): Tally(cold_starts=1)}
    assert meter.take() == {}


def test_the_ledger_knows_its_own_also_when_a_body_was_slower_than_a_place_is_kept() -> None:
    ledger = Ledger(ttl_seconds=15)
    ledger.reserve("slow", "replica", now=0)
    assert ledger.is_ours("slow")
    ledger.expire(now=16)
    assert ledger.is_ours("slow")
    assert not ledger.is_ours("theirs")


def test_an_outage_takes_as_much_memory_as_there_are_models_and_hours() -> None:
    outgoing = Outgoing("p")
    first = None
    for _ in range(100):
        outgoing.add({("m", 1): Tally(1), ("n", 1): Tally(1)})
        first = outgoing.next()
    assert first is not None
    assert [report.sequence for report in outgoing.all()] == [1, 2]
    assert first.tallies[("m", 1)] == Tally(1), "what was tried is not changed"
    assert outgoing.all()[1].tallies[("m", 1)] == Tally(99)


def test_what_does_not_fit_any_more_is_the_oldest_and_is_told() -> None:
    outgoing = Outgoing("p")
    for hour in range(7):
        outgoing.add({(f"m{model}", hour): Tally(1) for model in range(9_000)})
        outgoing.next()
    kept = [key for report in outgoing.all() for key in report.tallies]
    assert len(kept) <= 50_000
    assert len(kept) + outgoing.lost_count == 63_000
    assert min(hour for _, hour in kept) > 0
    assert all(len(report.tallies) <= 10_000 for report in outgoing.all())


class Targets:
    """A registry that tells targets once."""

    def __init__(self, *targets: Target) -> None:
        self.targets = list(targets)

    async def watch_targets(self) -> AsyncGenerator[list[Target], None]:
        yield self.targets


async def test_the_registry_s_targets_become_the_scaler_s_with_a_time_of_this_process() -> None:
    told: list[Mapping[str, Expected]] = []
    targets = Targets(
        Target("a", Rung.READY, 2, "busy", NOW + timedelta(hours=1)),
        Target("b", Rung.MEMORY, 0, "soon", NOW + timedelta(hours=1), idle_seconds=60.0),
    )
    await watch_advice(targets, told.append, lambda: 500.0, wall=lambda: NOW)  # type: ignore[arg-type]
    assert told == [
        {
            "a": Expected(Warmth.READY, 2, "busy", 4100.0),
            "b": Expected(Warmth.STAGED, 0, "soon", 4100.0, idle_seconds=60.0),
        }
    ]
