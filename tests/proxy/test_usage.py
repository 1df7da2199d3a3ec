"""Usage as the proxy counts and reports it: each request once, nothing lost or twice; and advice, as far as taken."""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from helios.mesh.errors import Unavailable
from helios.proxy.core import Core
from helios.proxy.fleet.commands import Order, StageRevision, StartReplica
from helios.proxy.ledger import Ledger
from helios.proxy.usage.advice import Advice, WarmPoolMode
from helios.proxy.usage.meter import Meter, Outgoing, Tally
from helios.proxy.usage.reporter import UsageReporter
from helios.registry.client import Counts, Delta, Rung, Target
from tests.proxy.support import entry
from tests.proxy.test_warmth import orders, world

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


def target(rung: Rung, count: int = 0, *, lasts: timedelta = timedelta(hours=1)) -> Target:
    return Target("m", rung, count, "because", NOW + lasts)


def advice(mode: WarmPoolMode, *targets: Target) -> Advice:
    made = Advice(mode, now=lambda: NOW)
    made.take(targets)
    return made


def tick(subject: Core, told: Advice, now: float) -> list[Order]:
    """As the runtime does each second."""
    subject.worker_seen("w", now)
    told.follow(subject.lifecycle, now)
    return orders(subject.tick(now))


def test_advice_that_expired_is_none() -> None:
    assert advice(WarmPoolMode.ADVISE, target(Rung.READY, 1)).of("m") is not None
    assert advice(WarmPoolMode.ADVISE, target(Rung.READY, 1, lasts=timedelta(0))).of("m") is None
    assert advice(WarmPoolMode.OFF, target(Rung.READY, 1)).of("m") is None


def test_a_model_that_is_to_be_ready_is_started_and_does_not_go_for_idleness() -> None:
    for mode, expected in ((WarmPoolMode.ADVISE, 0), (WarmPoolMode.ON, 1)):
        subject, told, started = world(), advice(mode, target(Rung.READY, 1)), 0
        for now in range(1, 200, 20):
            started += sum(isinstance(order, StartReplica) for order in tick(subject, told, now))
        assert started == expected
        assert len(subject.fleet.replicas_of("m")) == expected


def test_a_model_that_is_to_be_in_memory_is_staged_where_it_is_free_and_once() -> None:
    def staged(host_gib: int, mode: WarmPoolMode = WarmPoolMode.ON) -> int:
        model = replace(entry(), weights_bytes=4 << 30)
        subject, told, count = world(models=(model,), host_gib=host_gib), advice(mode, target(Rung.MEMORY)), 0
        for now in range(1, 5):
            count += sum(isinstance(order, StageRevision) for order in tick(subject, told, now))
        return count

    assert staged(16) == 1
    assert staged(0) == 0
    assert staged(16, WarmPoolMode.ADVISE) == 0
