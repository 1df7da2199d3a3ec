"""Has storage agents fetch ahead what is expected, and what people ask for; keeps what they say of it.

Plans are states: an agent is told anew whenever its plan is another one, and whenever it comes back. What was ordered
in an hour is remembered, so that an agent which drops what it fetched is not asked for more than the hour's budget. So
is what people asked for: an agent that restarts, or loses its connection, finds both as they were.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

import structlog

from helios.api.registry.v1 import sync_service_pb2 as pb
from helios.mesh.errors import ModelNotFound, NotFound
from helios.registry.sync.cluster import AgentView
from helios.registry.usage.prefetch_plan import Order, Plan, Wanted, most_useful, place
from helios.registry.usage.prefetch_wire import plan_to_proto
from helios.registry.usage.records import Forecast, hour_of, start_of
from helios.registry.usage.store import UsageStore
from helios.registry.usage.targets import Target
from helios.registry.usage.usage import Usage

log = structlog.get_logger()

_LOOK_SECONDS: Final = 5.0
# What a person asked for and no node has taken by then, is not wanted any more.
_ASKED_FOR: Final = timedelta(days=1)
_DAY_HOURS: Final = 24
# Models that serve another revision can wait for so long.
_READ_AGAIN: Final = timedelta(minutes=1)
_SETTLED_AFTER: Final = timedelta(seconds=3)
# The contract's.
_MAX_ORDERS: Final = 1_000
_MAX_USES: Final = 10_000
# Nodes that are away and of which something is remembered; of more, who left first is forgotten.
_MAX_AWAY: Final = 1_000
# As much as nodes can fetch in an hour, and what a hundred nodes are compared with in some ten milliseconds.
_MAX_WANTED: Final = 2_000


class Agents(Protocol):
    """The storage agents that are connected. `SyncServicer` with its cluster is one."""

    def agents(self) -> list[AgentView]:
        """Who is connected, by node."""
        ...

    def holds(self, node: str, revision: str) -> bool:
        """Whether an agent has a revision."""
        ...

    def post(self, node: str, message: pb.SessionResponse) -> bool:
        """Sends a message; returns whether the agent is connected."""
        ...


@dataclass(slots=True)
class _Node:
    """What is known of a node: since when it is connected, what it was told and said, and what is ordered."""

    connected_at: datetime
    told: Plan | None = None
    asked: dict[str, tuple[Order, datetime]] = field(default_factory=dict)
    ordered: dict[str, int] = field(default_factory=dict)
    report: pb.PrefetchReport | None = None
    reported_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class _Expectations:
    wanted: tuple[Wanted, ...]
    uses: tuple[tuple[str, float], ...]
    expires_at: datetime
    run_count: int
    read_until: datetime


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node for people: its plan, what it said last and when, and what may be ordered for it in this hour."""

    node: str
    plan: Plan | None
    report: pb.PrefetchReport | None
    reported_at: datetime | None
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class Asked:
    """Who is asked for a revision, and who has it."""

    revision: str
    size_bytes: int
    asked_nodes: tuple[str, ...]
    holding_nodes: tuple[str, ...]


class Prefetches:
    """Orders. ``run`` must be running; used on one event loop."""

    def __init__(self, usage: Usage, store: UsageStore, agents: Agents, *, bytes_per_hour: int) -> None:
        self._usage = usage
        self._store = store
        self._agents = agents
        self._bytes_per_hour = bytes_per_hour
        self._nodes: dict[str, _Node] = {}
        # Those that are not connected, by when they left.
        self._away: dict[str, _Node] = {}
        self._hour = 0
        self._changed = asyncio.Event()
        self._expected: _Expectations | None = None
        self._forecasts: list[tuple[Target, Forecast]] = []
        self._forecasts_of: tuple[int, int] | None = None
        # Plans are made anew where this is another one: what is expected, and who is there since when.
        self._planned_for: tuple[datetime, tuple[tuple[str, datetime], ...]] | None = None

    def take_report(self, node: str, report: pb.PrefetchReport) -> None:
        """Notes what an agent says."""
        if (known := self._nodes.get(node)) is not None:
            known.report, known.reported_at = report, datetime.now(UTC)

    async def ask(self, model: str, node: str, *, is_dry: bool) -> Asked:
        """Has a node, or all of them, fetch a model. Raises ModelNotFound, NotFound (NODE_NOT_FOUND)."""
        served = await self._store.served([model])
        if model not in served:
            raise ModelNotFound(f"no model '{model}'", metadata={"model": model})
        revision, size_bytes = served[model]
        self._meet()
        if node and node not in self._nodes:
            raise NotFound(
                f"no storage agent of a node '{node}' is connected", reason="NODE_NOT_FOUND", metadata={"node": node}
            )
        nodes = [node] if node else sorted(self._nodes)
        holding = tuple(one for one in nodes if self._agents.holds(one, revision))
        asked = tuple(one for one in nodes if one not in holding)
        order = Order(revision, size_bytes, is_asked=True, reason=f"somebody asked for {model}")
        if not is_dry:
            for one in asked:
                self._nodes[one].asked[revision] = order, self._usage.now() + _ASKED_FOR
            self._planned_for = None
            self._changed.set()
        return Asked(revision, size_bytes, asked, holding)

    def nodes(self) -> list[NodeView]:
        """Returns the nodes that are connected, by name."""
        self._meet()
        return [
            NodeView(
                name,
                node.told,
                node.report,
                node.reported_at,
                max(0, self._bytes_per_hour - sum(node.ordered.values())),
            )
            for name, node in sorted(self._nodes.items())
        ]

    async def run(self) -> None:
        """Tells agents of their plans, for ever."""
        while True:
            await self.look()
            try:
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._changed.wait()
            except TimeoutError:
                continue
            self._changed.clear()

    async def look(self) -> None:
        """Makes plans, and tells them to those whose plan is another one."""
        self._meet()
        if not self._nodes:
            return
        now = self._usage.now()
        hour = hour_of(now)
        if hour != self._hour:
            self._hour = hour
            for node in (*self._nodes.values(), *self._away.values()):
                node.ordered.clear()
        self._forget(now)
        expected = await self._expectations(now)
        # Agents may have come and gone meanwhile.
        self._meet()
        # One that has just come has not said yet what it has.
        settled = [name for name, node in self._nodes.items() if now - node.connected_at >= _SETTLED_AFTER]
        planned_for = expected.read_until, tuple((name, self._nodes[name].connected_at) for name in settled)
        if planned_for == self._planned_for:
            return
        self._planned_for = planned_for
        held = {
            name: {one.revision for one in expected.wanted if self._agents.holds(name, one.revision)}
            for name in settled
        }
        ordered = {name: node.ordered for name, node in self._nodes.items()}
        wanted = expected.wanted if self._bytes_per_hour else ()
        orders = place(wanted, held, ordered, bytes_per_hour=self._bytes_per_hour)
        for name in held:
            node = self._nodes[name]
            mine = [*self._asked(name, node, now), *orders.get(name, ())][:_MAX_ORDERS]
            node.ordered |= {order.revision: order.size_bytes for order in mine if not order.is_asked}
            self._tell(name, node, Plan(tuple(mine), expected.uses, expected.expires_at))

    def _meet(self) -> None:
        connected = {view.agent.node: view.agent.connected_at for view in self._agents.agents()}
        for name in self._nodes.keys() - connected.keys():
            self._away[name] = self._nodes.pop(name)
        for name, since in connected.items():
            node = self._nodes.get(name) or self._away.pop(name, None) or _Node(since)
            self._nodes[name] = node
            if node.connected_at != since:
                node.connected_at, node.told, node.report, node.reported_at = since, None, None, None

    def _forget(self, now: datetime) -> None:
        """Drops the nodes that are away and have nothing to come back to."""
        kept = [
            (name, node)
            for name, node in self._away.items()
            if node.ordered or any(now < until for _, until in node.asked.values())
        ]
        self._away = dict(kept[-_MAX_AWAY:])

    async def _expectations(self, now: datetime) -> _Expectations:
        """Returns what is expected: forecasts are read once an hour, and served revisions once a minute."""
        known = self._expected
        if known is not None and now < known.read_until and known.run_count == self._usage.run_count:
            return known
        hour, run_count = hour_of(now), self._usage.run_count
        if self._forecasts_of != (hour, run_count):
            self._forecasts = await self._usage.expected()
            self._forecasts_of = hour, run_count
        served = await self._store.served([target.model for target, _ in self._forecasts])
        wanted: dict[str, Wanted] = {}
        for target, forecast in self._forecasts:
            if target.model in served:
                revision, size_bytes = served[target.model]
                uses, copies = _expected_uses(forecast, hour), max(1, target.replica_count)
                one = Wanted(revision, size_bytes, uses, copies, f"{target.model}: {target.reason}")
                wanted[revision] = one.also(wanted[revision]) if revision in wanted else one
        most = sorted(wanted.values(), key=lambda one: (-one.uses, one.revision))
        uses_told = tuple((one.revision, one.uses) for one in most[:_MAX_USES])
        expires_at = max((target.expires_at for target, _ in self._forecasts), default=start_of(hour + 2))
        best = tuple(most_useful(wanted.values())[:_MAX_WANTED])
        self._expected = _Expectations(best, uses_told, expires_at, run_count, now + _READ_AGAIN)
        return self._expected

    def _asked(self, name: str, node: _Node, now: datetime) -> list[Order]:
        node.asked = {
            revision: (order, until)
            for revision, (order, until) in node.asked.items()
            if now < until and not self._agents.holds(name, revision)
        }
        return [order for order, _ in node.asked.values()]

    def _tell(self, name: str, node: _Node, plan: Plan) -> None:
        if plan == node.told:
            return
        if self._agents.post(name, pb.SessionResponse(prefetch_plan=plan_to_proto(plan))):
            if plan.orders and (node.told is None or plan.orders != node.told.orders):
                log.info(
                    "node is to fetch ahead",
                    node=name,
                    orders=len(plan.orders),
                    size_bytes=sum(order.size_bytes for order in plan.orders),
                )
            node.told = plan


def _expected_uses(forecast: Forecast, hour: int) -> float:
    """Returns how many starts are expected in a day: at most one an hour, since what is used more often stays up."""
    hours = (forecast.at(hour + index) for index in range(_DAY_HOURS))
    return sum(min(1.0, expected.requests) for expected in hours if expected is not None)
