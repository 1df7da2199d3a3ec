"""What agents may read from the cloud: any calls in any order, with time, against the promise of each grant."""

from datetime import UTC, datetime

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from helios.mesh.errors import InvalidRequest
from helios.mesh.transfer.spans import Span
from helios.registry.sync import cluster as cluster_module
from helios.registry.sync.cluster import Agent, Cluster, Holder

NODES = ("a", "b", "c", "unreachable")
BLOBS = ("1" * 64, "2" * 64)
SPANS = tuple((start, start + 10) for start in range(0, 50, 10))
CLAIM_SECONDS = 60.0
AT = datetime(2026, 1, 1, tzinfo=UTC)

node = st.sampled_from(NODES)
blob = st.sampled_from(BLOBS)
spans = st.lists(st.sampled_from(SPANS), max_size=5, unique=True)


def agent(name: str) -> Agent:
    return Agent(name, "" if name == "unreachable" else f"{name}:1", AT)


class ClusterMachine(RuleBasedStateMachine):
    """A model of who has what: sets of spans by node and blob."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster(claim_seconds=CLAIM_SECONDS)
        self.now = 0.0
        self.whole: dict[str, set[str]] = {}
        self.wants: dict[str, dict[str, set[Span]]] = {}
        self.claims: dict[tuple[str, Span], tuple[str, float]] = {}

    @rule(name=node)
    def join(self, name: str) -> None:
        self.cluster.join(agent(name))
        self._forget(name)
        self.whole[name], self.wants[name] = set(), {}

    @rule(name=node)
    def leave(self, name: str) -> None:
        self.cluster.leave(name)
        self._forget(name)

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), hash_=blob, is_here=st.booleans())
    def hold(self, data: st.DataObject, hash_: str, *, is_here: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.whole)))
        self.cluster.hold(name, **{"blobs" if is_here else "gone_blobs": [hash_]})
        (self.whole[name].add if is_here else self.whole[name].discard)(hash_)

    @precondition(lambda self: self.wants)
    @rule(data=st.data(), hash_=blob, held=spans)
    def want(self, data: st.DataObject, hash_: str, held: list[Span]) -> None:
        name = data.draw(st.sampled_from(sorted(self.wants)))
        self.cluster.want(name, hash_, held)
        self.wants[name][hash_] = set(held)

    @precondition(lambda self: self.wants)
    @rule(data=st.data(), hash_=blob, is_whole=st.booleans())
    def unwant(self, data: st.DataObject, hash_: str, *, is_whole: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.wants)))
        self.cluster.unwant(name, hash_, is_whole=is_whole)
        if self.wants[name].pop(hash_, None) is None:
            return
        self.claims = {key: claim for key, claim in self.claims.items() if (key[0], claim[0]) != (hash_, name)}
        if is_whole:
            self.whole[name].add(hash_)

    @precondition(lambda self: self.wants)
    @rule(data=st.data(), hash_=blob, asked=spans, limit=st.integers(0, 4), excluded=st.sets(node, max_size=2))
    def claim(self, data: st.DataObject, hash_: str, asked: list[Span], limit: int, excluded: set[str]) -> None:
        name = data.draw(st.sampled_from(sorted(self.wants)))
        granted = self.cluster.claim(name, hash_, asked, limit=limit, excluded=excluded, now=self.now)
        if hash_ not in self.wants[name]:
            assert not granted.spans
            return
        others = {other for other in self.whole if other not in {name, "unreachable", *excluded}}
        free = [span for span in asked if not self._is_taken(hash_, span, others)]
        assert list(granted.spans) == free[:limit], "all that nobody else has or reads, and nothing else"
        assert {holder.node for holder in granted.holders} <= others
        for span in granted.spans:
            self.claims[hash_, span] = name, self.now + CLAIM_SECONDS

    @precondition(lambda self: self.wants)
    @rule(data=st.data(), hash_=blob, done=spans, given_up=spans)
    def end_claims(self, data: st.DataObject, hash_: str, done: list[Span], given_up: list[Span]) -> None:
        name = data.draw(st.sampled_from(sorted(self.wants)))
        self.cluster.end_claims(name, hash_, done=done, given_up=given_up)
        for span in (*done, *given_up):
            if self.claims.get((hash_, span), ("", 0.0))[0] == name:
                del self.claims[hash_, span]
        if hash_ in self.wants[name]:
            self.wants[name][hash_].update(done)

    @rule(seconds=st.sampled_from([1.0, CLAIM_SECONDS]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def whoever_can_be_reached_is_told_of(self) -> None:
        for name in self.wants:
            for hash_ in self.wants[name]:
                expected = [
                    Holder(other, f"{other}:1", hash_ in self.whole[other])
                    for other in sorted(self.whole)
                    if other not in {name, "unreachable"} and hash_ in {*self.whole[other], *self.wants[other]}
                ]
                assert self.cluster.holders(name, hash_) == expected

    @invariant()
    def news_are_for_those_who_want(self) -> None:
        assert all(hash_ in self.wants.get(name, {}) for name, hash_ in self.cluster.take_news())

    def _is_taken(self, hash_: str, span: Span, others: set[str]) -> bool:
        owner, ends_at = self.claims.get((hash_, span), ("", 0.0))
        if ends_at > self.now and owner in others:
            return True
        return any(hash_ in self.whole[other] or span in self.wants[other].get(hash_, ()) for other in others)

    def _forget(self, name: str) -> None:
        self.whole.pop(name, None)
        self.wants.pop(name, None)
        self.claims = {key: claim for key, claim in self.claims.items() if claim[0] != name}


TestCluster = ClusterMachine.TestCase


def test_those_who_fetch_are_told_of_changes() -> None:
    cluster = Cluster(claim_seconds=CLAIM_SECONDS)
    for name in NODES:
        cluster.join(agent(name))
    cluster.want("a", BLOBS[0])
    assert cluster.take_news() == {("a", BLOBS[0])}
    cluster.want("a", BLOBS[0], [(0, 10)])
    assert cluster.take_news() == set()
    cluster.want("b", BLOBS[0])
    assert cluster.take_news() == {("a", BLOBS[0]), ("b", BLOBS[0])}
    cluster.hold("c", blobs=[BLOBS[0]])
    assert cluster.take_news() == {("a", BLOBS[0]), ("b", BLOBS[0])}
    cluster.leave("b")
    assert cluster.take_news() == {("a", BLOBS[0])}


def test_spans_of_another_grid_are_not_read_twice() -> None:
    cluster = Cluster(claim_seconds=CLAIM_SECONDS)
    for name in ("a", "b"):
        cluster.join(agent(name))
        cluster.want(name, BLOBS[0])
    assert cluster.claim("a", BLOBS[0], [(0, 100)], limit=1, excluded=(), now=0).spans == ((0, 100),)
    assert cluster.claim("b", BLOBS[0], [(50, 60), (90, 110), (100, 110)], limit=3, excluded=(), now=0).spans == (
        (100, 110),
    )
    cluster.end_claims("a", BLOBS[0], done=[(0, 100)], given_up=[])
    assert cluster.claim("b", BLOBS[0], [(50, 60)], limit=1, excluded=(), now=0).spans == ()


def test_of_many_holders_each_agent_is_told_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "MAX_TOLD", 8)
    cluster = Cluster(claim_seconds=CLAIM_SECONDS)
    names = [f"node-{number}" for number in range(40)]
    for name in names:
        cluster.join(agent(name))
        cluster.want(name, BLOBS[0])
    told = [{holder.node for holder in cluster.holders(name, BLOBS[0])} for name in names]
    assert all(len(nodes) == 8 for nodes in told)
    assert len(set.union(*told)) > 30


def test_what_an_agent_may_say_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "MAX_BLOBS", 1)
    monkeypatch.setattr(cluster_module, "MAX_WANTS", 1)
    monkeypatch.setattr(cluster_module, "MAX_CLAIMS", 2)
    cluster = Cluster(claim_seconds=CLAIM_SECONDS)
    cluster.join(agent("a"))
    cluster.hold("a", blobs=BLOBS[:1])
    cluster.want("a", BLOBS[0])
    for _ in range(2):
        assert len(cluster.claim("a", BLOBS[0], SPANS, limit=5, excluded=(), now=0).spans) in (0, 2)
    with pytest.raises(InvalidRequest):
        cluster.hold("a", blobs=BLOBS[1:])
    with pytest.raises(InvalidRequest):
        cluster.want("a", BLOBS[1])
