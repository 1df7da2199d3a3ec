"""Several registries, agents at any of them, a database's clock: whatever fails meanwhile, it ends with one cluster.

The leases are the store's own decisions, the clusters what registries keep in memory; only what carries messages is
played. What is promised: the cloud is read once for a span while everything answers; nothing else depends on it.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.mesh.errors import Conflict, Unavailable
from helios.mesh.transfer.spans import Span
from helios.registry.coordination.seats import LEASE
from helios.registry.coordination.standing import ALONE_SECONDS, Seat, Standing
from helios.registry.leases.lease import Grant, Lease, Wish, acquired, released, renewed
from helios.registry.sync.cluster import Agent, Cluster

REGISTRIES = ("r1", "r2", "r3")
AGENTS = ("a", "b", "c", "d")
BLOB = "1" * 64
SPANS = tuple((start, start + 10) for start in range(0, 40, 10))
TTL_SECONDS = 10.0
AT = datetime(2026, 1, 1, tzinfo=UTC)

registry = st.sampled_from(REGISTRIES)
agent = st.sampled_from(AGENTS)


@dataclass
class Registry:
    """One process: what it knows, and whom it serves by itself."""

    standing: Standing = field(default_factory=Standing)
    cluster: Cluster = field(default_factory=lambda: Cluster(claim_seconds=1e9))
    grant: Grant | None = None
    is_up: bool = True
    has_database: bool = True


class Registries(RuleBasedStateMachine):
    """Looks, crashes, partitions, agents that come and claim, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.lease = Lease(LEASE)
        self.registries = {name: Registry() for name in REGISTRIES}
        # Which registry an agent has dialled, and which one serves it.
        self.dialled: dict[str, str] = {}
        self.served_by: dict[str, str] = {}
        self.cut: set[frozenset[str]] = set()

    @rule(seconds=st.sampled_from([1.0, TTL_SECONDS, ALONE_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(name=registry)
    def look(self, name: str) -> None:
        it = self.registries[name]
        if not it.is_up or not it.has_database:
            return
        change = it.standing.saw(self._take(name, it), self.now)
        for one, server in list(self.served_by.items()):
            is_here, is_passed_on = server == name, self.dialled[one] == name and server != name
            if (is_here and change.is_sent_away) or (is_passed_on and change.has_moved):
                self._end(one)

    @rule(name=registry)
    def crash_or_start(self, name: str) -> None:
        it = self.registries[name]
        if not it.is_up:
            self.registries[name] = Registry()
            return
        it.is_up = False
        for one, server in list(self.served_by.items()):
            if name in (server, self.dialled[one]):
                self._end(one)

    @rule(name=registry)
    def stop(self, name: str) -> None:
        it = self.registries[name]
        if it.is_up and it.has_database and it.grant is not None:
            self.lease = released(self.lease, it.grant)
        if it.is_up:
            self.crash_or_start(name)

    @rule(name=registry)
    def lose_or_find_the_database(self, name: str) -> None:
        self.registries[name].has_database = not self.registries[name].has_database

    @rule(one=registry, other=registry)
    def cut_or_join(self, one: str, other: str) -> None:
        if one == other:
            return
        self.cut ^= {frozenset((one, other))}
        if frozenset((one, other)) in self.cut:
            for name, server in list(self.served_by.items()):
                if {self.dialled[name], server} == {one, other}:
                    self._end(name)

    @rule(name=agent, at=registry)
    def dial(self, name: str, at: str) -> None:
        self._end(name)
        it = self.registries[at]
        if not it.is_up:
            return
        server = at
        address = it.standing.target(self.now, is_forwarded=False)
        if address is not None:
            if not self._answers(at, address):
                it.standing.unanswered(self.now)
            else:
                server = address
        self.dialled[name], self.served_by[name] = at, server
        cluster = self.registries[server].cluster
        cluster.join(Agent(name, f"{name}:1", AT))
        cluster.want(name, BLOB)

    @precondition(lambda self: self.served_by)
    @rule(data=st.data(), spans=st.lists(st.sampled_from(SPANS), min_size=1, max_size=4, unique=True))
    def claim(self, data: st.DataObject, spans: list[Span]) -> None:
        name = data.draw(st.sampled_from(sorted(self.served_by)))
        cluster = self.registries[self.served_by[name]].cluster
        granted = cluster.claim(name, BLOB, spans, limit=9, excluded=(), now=self.now)
        together = [other for other in self.served_by if self.served_by[other] == self.served_by[name]]
        assert {holder.node for holder in granted.holders} <= set(together) - {name}

    @rule(data=st.data())
    def everything_answers_again(self, data: st.DataObject) -> None:
        self.cut.clear()
        for name, it in self.registries.items():
            if not it.is_up:
                self.registries[name] = Registry()
            self.registries[name].has_database = True
        # A dead holder's lease ends, whoever looks first has it, and the others see that.
        for _ in range(6):
            self.now += 5.0
            for name in data.draw(st.permutations(REGISTRIES)):
                self.look(name)
        for name in AGENTS:
            if name not in self.served_by:
                self.dial(name, data.draw(registry))
        assert len(set(self.served_by.values())) == 1, "all agents meet at one registry"
        assert set(self.served_by) == set(AGENTS)
        cluster = self.registries[next(iter(self.served_by.values()))].cluster
        grants = [
            span
            for name in AGENTS
            for span in cluster.claim(name, BLOB, SPANS, limit=9, excluded=(), now=self.now).spans
        ]
        assert len(grants) == len(set(grants)), "no span is read twice"

    @invariant()
    def at_most_one_registry_can_renew(self) -> None:
        holders = [
            it for it in self.registries.values() if it.is_up and it.grant is not None and self._renews(it.grant)
        ]
        assert len(holders) <= 1

    def _take(self, name: str, it: Registry) -> Seat:
        if it.grant is not None:
            if self._renews(it.grant):
                self.lease = renewed(self.lease, it.grant, TTL_SECONDS, self._now_us())
                return Seat(is_mine=True, address=name, epoch=it.grant.epoch)
            it.grant = None
        before = self.lease
        # A process that was started again is another holder.
        self.lease = acquired(before, Wish(LEASE, f"{name}-{id(it)}", TTL_SECONDS, name), self._now_us())
        if self.lease.epoch != before.epoch:
            it.grant = Grant(LEASE, self.lease.holder, self.lease.epoch)
        return Seat(is_mine=it.grant is not None, address=self.lease.address, epoch=self.lease.epoch)

    def _renews(self, grant: Grant) -> bool:
        try:
            renewed(self.lease, grant, TTL_SECONDS, self._now_us())
        except Conflict:
            return False
        return True

    def _answers(self, at: str, address: str) -> bool:
        target = self.registries[address]
        if not target.is_up or frozenset((at, address)) in self.cut:
            return False
        try:
            return target.standing.target(self.now, is_forwarded=True) is None
        except Unavailable:
            return False

    def _end(self, name: str) -> None:
        self.dialled.pop(name, None)
        server = self.served_by.pop(name, None)
        if server is not None:
            self.registries[server].cluster.leave(name)

    def _now_us(self) -> int:
        return round(self.now * 1e6)


TestRegistries = Registries.TestCase
TestRegistries.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_is_passed_on_is_not_passed_on_again() -> None:
    standing = Standing()
    with pytest.raises(Unavailable) as refused:
        standing.target(0.0, is_forwarded=True)
    assert refused.value.reason == "NOT_COORDINATOR"
    standing.saw(Seat(is_mine=False, address="other:1", epoch=1), 0.0)
    with pytest.raises(Unavailable):
        standing.target(0.0, is_forwarded=True)
    assert standing.target(0.0, is_forwarded=False) == "other:1"
    standing.saw(Seat(is_mine=True, address="this:1", epoch=2), 0.0)
    assert standing.target(0.0, is_forwarded=True) is None


def test_sessions_leave_a_coordinator_that_lost_its_seat_without_knowing() -> None:
    standing = Standing()
    standing.saw(Seat(is_mine=False, address="first:1", epoch=1), 0.0)
    assert not standing.saw(Seat(is_mine=False, address="first:1", epoch=1), 1.0).has_moved
    assert standing.saw(Seat(is_mine=False, address="second:1", epoch=2), 2.0).has_moved


def test_whoever_is_served_here_because_the_coordinator_was_silent_goes_to_it_later() -> None:
    standing, seat = Standing(), Seat(is_mine=False, address="first:1", epoch=1)
    standing.saw(seat, 0.0)
    standing.unanswered(1.0)
    assert standing.target(2.0, is_forwarded=False) is None
    assert not standing.saw(seat, 2.0).is_sent_away
    assert standing.saw(seat, 1.0 + ALONE_SECONDS).is_sent_away
    assert standing.target(1.0 + ALONE_SECONDS, is_forwarded=False) == "first:1"
    assert not standing.saw(seat, 99.0).is_sent_away, "once is enough"
