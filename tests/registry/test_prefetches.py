"""Whom the registry tells to fetch what ahead: within the budget, once, again after a reconnect, and what is asked."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.mesh.errors import ModelNotFound, NotFound
from helios.registry.client import Counts, Delta, hour_of
from helios.registry.store import Store
from helios.registry.sync.cluster import Agent, AgentView
from helios.registry.usage import forecast_run
from helios.registry.usage.prefetches import Prefetches
from helios.registry.usage.settings import UsageSettings
from helios.registry.usage.store import UsageStore
from helios.registry.usage.usage import Usage
from tests.registry.stores import Templates, opened
from tests.registry.test_store import A, B, new

NOW = datetime(2026, 3, 2, 10, 5, tzinfo=UTC)
HOUR = hour_of(NOW)
# Of each of the revisions of `new`.
SIZE = 107


@dataclass
class Agents:
    """Agents that are connected, what they have, and what they were told."""

    since: dict[str, datetime] = field(default_factory=dict)
    held: dict[str, set[str]] = field(default_factory=dict)
    told: list[tuple[str, pb.PrefetchPlan]] = field(default_factory=list)

    def agents(self) -> list[AgentView]:
        return [AgentView(Agent(node, "", since), 0, 0, ()) for node, since in sorted(self.since.items())]

    def holds(self, node: str, revision: str) -> bool:
        return revision in self.held.get(node, ())

    def post(self, node: str, message: pb.SessionResponse) -> bool:
        self.told.append((node, message.prefetch_plan))
        return True

    def take(self) -> list[tuple[str, list[str]]]:
        told, self.told = self.told, []
        return [(node, [order.revision for order in plan.orders]) for node, plan in told]


@dataclass
class Clock:
    now: datetime = NOW

    def __call__(self) -> datetime:
        return self.now


async def test_who_was_away_is_asked_for_what_it_was_asked_for_and_has_the_budget_that_was_left(
    templates: Templates, tmp_path: Path
) -> None:
    agents, clock = Agents({"one": NOW - timedelta(minutes=1)}), Clock()

    async def come_back(prefetches: Prefetches, after: timedelta) -> list[tuple[bool, str]]:
        """Has the node go, lets somebody look meanwhile, has it come back; returns what it is told to fetch."""
        del agents.since["one"]
        assert prefetches.nodes() == []
        clock.now += after
        await prefetches.look()
        agents.since["one"] = clock.now
        clock.now += timedelta(seconds=10)
        agents.told.clear()
        await prefetches.look()
        return [(order.is_asked, order.revision) for _, plan in agents.told for order in plan.orders]

    with templates.place("sqlite", tmp_path, is_empty=False) as place:
        async with opened(place) as database:
            for name, seed in (("a", "a"), ("b", "b")):
                await Store(database).put_model(name, (), new(seed), NOW)
            rows = UsageStore(database)
            deltas = [Delta(name, HOUR - back, Counts(9)) for name in ("a", "b") for back in range(1, 30)]
            await rows.report("p", 1, deltas, now=NOW)
            await forecast_run.run(database, since=0, hour=HOUR)
            usage = Usage(rows, UsageSettings(), database="", now=clock)
            prefetches = Prefetches(usage, rows, agents, bytes_per_hour=SIZE)
            await prefetches.look()
            ((_, (first,)),) = agents.take()
            agents.held["one"] = {first}
            assert await come_back(prefetches, timedelta(seconds=5)) == [], "the hour's budget is used"
            (second,) = {A, B} - {first}
            asked = {A: "a", B: "b"}[second]
            await prefetches.ask(asked, "one", is_dry=False)
            assert await come_back(prefetches, timedelta(seconds=5)) == [(True, second)]
            assert (True, second) not in await come_back(prefetches, timedelta(days=1)), "for a day at most"
            assert prefetches._away == {}


async def test_nodes_are_told_what_is_best_fetched_ahead(templates: Templates, tmp_path: Path) -> None:
    agents, clock = Agents({"one": NOW}), Clock()
    with templates.place("sqlite", tmp_path, is_empty=False) as place:
        async with opened(place) as database:
            for name, seed in (("a", "a"), ("twin", "a"), ("b", "b")):
                await Store(database).put_model(name, (), new(seed), NOW)
            rows = UsageStore(database)
            usage = Usage(rows, UsageSettings(), database="", now=clock)
            prefetches = Prefetches(usage, rows, agents, bytes_per_hour=SIZE)
            await prefetches.look()
            assert agents.take() == [], "what it has was not told yet"
            deltas = [Delta(name, HOUR - back, Counts(9)) for name in ("a", "twin", "b") for back in range(1, 30)]
            await rows.report("p", 1, deltas, now=NOW)
            await forecast_run.run(database, since=0, hour=HOUR)
            await rows.claim_run(HOUR)
            await usage.look()
            clock.now += timedelta(seconds=10)
            await prefetches.look()
            # Two models expect the first one, and the budget is one revision's.
            assert agents.take() == [("one", [A])]
            (view,) = prefetches.nodes()
            assert view.budget_bytes == 0
            clock.now += timedelta(seconds=10)
            await prefetches.look()
            assert agents.take() == [], "nothing is another"
            agents.since["one"] = clock.now
            clock.now += timedelta(seconds=10)
            await prefetches.look()
            assert agents.take() == [("one", [A])], "who comes back is told again"
            asked = await prefetches.ask("b", "", is_dry=True)
            assert (asked.revision, asked.asked_nodes) == (B, ("one",))
            await prefetches.look()
            assert agents.take() == []
            await prefetches.ask("b", "one", is_dry=False)
            await prefetches.look()
            assert agents.take() == [("one", [B, A])], "what people ask for comes first, and is in no budget"
            agents.held["one"] = {A, B}
            clock.now += timedelta(minutes=2)
            await prefetches.look()
            assert agents.take() == [("one", [])]
            report = pb.PrefetchReport(fetched_bytes=7)
            prefetches.take_report("one", report)
            prefetches.take_report("gone", report)
            assert [replace(view, plan=None, reported_at=None).report for view in prefetches.nodes()] == [report]
            with pytest.raises(NotFound):
                await prefetches.ask("b", "nowhere", is_dry=False)
            with pytest.raises(ModelNotFound):
                await prefetches.ask("nobody", "", is_dry=False)
            clock.now += timedelta(hours=3)
            await prefetches.look()
            assert [plan.expires_at.ToDatetime(UTC) > clock.now for _, plan in agents.told] == [True]
