"""Nodes that fetch one blob at the same time, with the registry's own rules, in any order: no threads, no clock.

Each node is the policy and what it has; the registry is its pure core. Faults: the node that brought most from the
cloud is killed, a node sends wrong bytes, a node sends none, the registry is away.
"""

import random
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from helios.mesh.transfer.spans import Span
from helios.registry.sync.cluster import Agent, Cluster
from helios.storage.sync.policy import STORE, SwarmPolicy

CHUNKS: tuple[Span, ...] = tuple((start, start + 10) for start in range(0, 300, 10))
WINDOW, PARALLEL = 12, 4
HASH = "a" * 64
STEP_SECONDS = 0.05
STALL_SECONDS = 20.0
MAX_STEPS = 100_000


@dataclass
class Node:
    """One agent's fetch."""

    name: str
    policy: SwarmPolicy
    fault: str = ""
    """`lies` or `stalls`, where others read from it."""
    is_dead: bool = False
    have: set[Span] = field(default_factory=set)
    reading: dict[Span, tuple[str, float]] = field(default_factory=dict)
    cloud: Counter[Span] = field(default_factory=Counter)

    @property
    def is_done(self) -> bool:
        return len(self.have) == len(CHUNKS)


class World:
    """The nodes, the registry and the order of events."""

    def __init__(self, seed: int, count: int, *, has_registry: bool = True) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.cluster = Cluster(claim_seconds=60.0)
        self.has_registry = has_registry
        self.nodes = {
            f"n{number}": Node(f"n{number}", SwarmPolicy(parallel=PARALLEL, salt=number, now=0.0))
            for number in range(count)
        }
        for name in self.nodes:
            self.join(name)

    def join(self, name: str) -> None:
        self.cluster.join(Agent(name, name, datetime(2026, 1, 1, tzinfo=UTC)))
        self.cluster.want(name, HASH)

    def kill(self, node: Node) -> None:
        node.is_dead = True
        self.cluster.leave(node.name)

    def alive(self) -> list[Node]:
        return [node for node in self.nodes.values() if not node.is_dead]

    def run(self, *, kill_at: int = -1) -> Counter[Span]:
        """Runs until all have all; returns how often each chunk was read from the cloud."""
        for step in range(MAX_STEPS):
            alive = self.alive()
            if all(node.is_done for node in alive):
                return sum((node.cloud for node in self.nodes.values()), Counter())
            if step == kill_at:
                self.kill(max(alive, key=lambda node: node.cloud.total()))
                continue
            self.now += STEP_SECONDS
            self.act(self.random.choice(alive))
        raise AssertionError({node.name: len(node.have) for node in self.alive()})

    def act(self, node: Node) -> None:
        match self.random.randrange(4):
            case 0 | 1:
                self.begin(node)
            case 2:
                self.end_one(node)
            case _:
                self.hear(node)

    def begin(self, node: Node) -> None:
        missing = [chunk for chunk in CHUNKS if chunk not in node.have]
        if len(node.reading) == PARALLEL or not missing:
            return
        first = CHUNKS.index(missing[0])
        free = [chunk for chunk in missing if chunk in CHUNKS[first : first + WINDOW] and chunk not in node.reading]
        if not free:
            return
        old = node.policy.take_old_claims(self.now)
        self.cluster.end_claims(node.name, HASH, done=(), given_up=old)
        choice = node.policy.choose(free, self.now)
        if choice is not None:
            place, source = choice
            assert (
                source == STORE
                or self.nodes[source].fault
                or free[place] in self.nodes[source].have
                or (self.nodes[source].is_dead)
            ), "nobody is asked for what it does not have"
            node.reading[free[place]] = source, self.now
        asked = node.policy.take_asked()
        if asked is not None:
            granted: tuple[Span, ...] = asked.spans[: asked.limit]
            if self.has_registry:
                granted = self.cluster.claim(
                    node.name, HASH, asked.spans, limit=asked.limit, excluded=asked.excluded_nodes, now=self.now
                ).spans
            node.policy.answered(granted, self.now)

    def end_one(self, node: Node) -> None:
        if not node.reading:
            return
        chunk, (source, begun_at) = self.random.choice(list(node.reading.items()))
        peer = self.nodes.get(source)
        if peer is not None and peer.fault == "stalls" and self.now - begun_at < STALL_SECONDS:
            return
        del node.reading[chunk]
        if peer is not None and (peer.fault or peer.is_dead):
            node.policy.failed(chunk[0], self.now, is_dropped=bool(peer.fault))
            return
        node.cloud[chunk] += source == STORE
        node.have.add(chunk)
        node.policy.succeeded(chunk[0], self.now)
        self.cluster.end_claims(node.name, HASH, done=[chunk], given_up=())

    def hear(self, node: Node) -> None:
        """What the registry and each peer say; the news of some come late."""
        if self.has_registry:
            holders = self.cluster.holders(node.name, HASH)
            node.policy.meet([(h.address, h.node, h.is_whole) for h in holders], self.now)
        else:
            node.policy.meet([(n.name, n.name, False) for n in self.alive() if n is not node], self.now)
        for other in self.nodes.values():
            if other is node:
                continue
            if other.is_dead:
                node.policy.unreached(other.name, self.now)
            elif self.random.random() < 0.7:
                node.policy.has(other.name, sorted(other.have), is_whole=False)


SEED = st.integers(0, 10**9)


@given(seed=SEED, count=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_each_chunk_comes_from_the_cloud_once(seed: int, count: int) -> None:
    world = World(seed, count)
    assert world.run() == Counter(CHUNKS)


@pytest.mark.parametrize("seed", range(3))
def test_two_nodes_that_begin_together_share_the_cloud(seed: int) -> None:
    world = World(seed, 2)
    world.run()
    assert min(node.cloud.total() for node in world.nodes.values()) > len(CHUNKS) // 5


@given(seed=SEED, count=st.integers(2, 5), kill_at=st.integers(0, 400))
@settings(max_examples=40, deadline=None)
def test_when_a_node_is_killed_the_others_bring_what_only_it_had(seed: int, count: int, kill_at: int) -> None:
    world = World(seed, count)
    read = world.run(kill_at=kill_at)
    dead = [node for node in world.nodes.values() if node.is_dead]
    lost = {chunk for node in dead for chunk in (*node.have, *node.reading)}
    assert set(read) == set(CHUNKS)
    assert all(times == 1 or (times == 2 and chunk in lost) for chunk, times in read.items())


@given(seed=SEED, count=st.integers(2, 5), fault=st.sampled_from(["lies", "stalls"]))
@settings(max_examples=30, deadline=None)
def test_a_node_that_lies_or_stalls_costs_what_it_brought(seed: int, count: int, fault: str) -> None:
    world = World(seed, count)
    world.nodes["n0"].fault = fault
    read = world.run()
    assert sum(read.values()) <= len(CHUNKS) + 2 * PARALLEL + world.nodes["n0"].cloud.total()


@given(seed=SEED, count=st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_without_a_registry_everybody_has_everything_in_the_end(seed: int, count: int) -> None:
    world = World(seed, count, has_registry=False)
    read = world.run()
    assert set(read) == set(CHUNKS)
    assert max(read.values()) <= count


def test_what_a_registry_wrongly_says_that_others_have_is_read_after_all() -> None:
    """Whoever is said to hold a chunk answers that it does not: nothing waits for ever."""
    world = World(1, 2)
    world.cluster.want("n1", HASH, CHUNKS)
    world.nodes["n1"].is_dead = True

    def hear(node: Node) -> None:
        holders = world.cluster.holders(node.name, HASH)
        node.policy.meet([(h.address, h.node, h.is_whole) for h in holders], world.now)
        node.policy.has("n1", [], is_whole=False)

    world.hear = hear
    assert world.run() == Counter(CHUNKS)
    assert world.now < 120.0


def test_whom_the_registry_does_not_know_reads_for_itself_in_the_end() -> None:
    """Its wants were lost on the way, and every claim is refused."""
    world = World(1, 1)
    world.cluster.unwant("n0", HASH, is_whole=False)
    assert world.run() == Counter(CHUNKS)
    assert world.now < 120.0


@pytest.mark.parametrize(("asked_seconds", "rest_seconds"), [(0.0, 0.5), (1.0, 1.0), (121.0, 2.0)])
def test_a_peer_rests_for_as_long_as_it_asks_and_no_longer_than_others_can_wait(
    asked_seconds: float, rest_seconds: float
) -> None:
    policy = SwarmPolicy(parallel=PARALLEL, salt=0, now=0.0)
    policy.meet([("a", "a", True), ("b", "b", True)], 0.0)
    _, source = policy.choose(CHUNKS[:1], 0.0) or (0, STORE)
    policy.failed(CHUNKS[0][0], 0.0, rest_seconds=asked_seconds)
    other = policy.choose(CHUNKS[:1], rest_seconds - 0.01)
    assert other is not None
    assert {source, other[1]} == {"a", "b"}
    policy.ended(CHUNKS[0][0])
    # Reads go to whom fewest go to.
    again = [policy.choose([chunk], rest_seconds) for chunk in CHUNKS[:2]]
    assert {choice[1] for choice in again if choice is not None} == {"a", "b"}
