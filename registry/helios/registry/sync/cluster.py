"""What the storage agents of a cluster hold, fetch, and may read from the cloud. Pure.

A *claim* makes one agent the reader of a span of a blob:

    free ──claim──▶ claimed ──done──▶ held by its agent, to whom others are sent
     ▲                 │
     └─ given up, time to live over, session ended ─┘

A span is granted when no agent that the claimer can read from holds it or has claimed it. Claims are by spans and not
by blobs, so that agents that fetch one blob at the same time read different parts of it from the cloud and the rest
from each other: all of their links to the cloud are used, and an agent that dies costs what it was just reading. They
are short and end by themselves, so nothing waits for an agent that is gone, and what is granted twice by a mistake
costs bytes, never correctness: every chunk is verified wherever it came from.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from helios.mesh.errors import InvalidRequest
from helios.mesh.transfer.spans import Span, Spans

MAX_TOLD: Final = 64
"""Holders that an agent is told of. BitTorrent's clients work with some 50 neighbours."""

MAX_WANTS: Final = 1_024
"""Blobs that an agent may fetch at a time."""

MAX_CLAIMS: Final = 1_024
"""Spans of one blob that an agent may have claimed at a time; ours claim some ten."""

MAX_BLOBS: Final = 1_000_000
"""Blobs that an agent may hold: a terabyte in pieces of a megabyte."""


@dataclass(frozen=True, slots=True)
class Agent:
    """A storage agent."""

    node: str
    address: str
    """Where other agents reach it; empty: nowhere."""
    connected_at: datetime


@dataclass(frozen=True, slots=True)
class Holder:
    """An agent that has a blob, or some of it."""

    node: str
    address: str
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Granted:
    """What a claim came to."""

    spans: tuple[Span, ...]
    holders: tuple[Holder, ...]
    """Who has, or reads, what was refused."""


@dataclass(frozen=True, slots=True)
class AgentView:
    """An agent and what it holds, for people."""

    agent: Agent
    blob_count: int
    revision_count: int
    wanted: tuple[str, ...]


@dataclass(slots=True)
class _Member:
    agent: Agent
    blobs: set[str] = field(default_factory=set)
    revisions: set[str] = field(default_factory=set)
    wants: dict[str, Spans] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Claim:
    node: str
    ends_at: float


class Cluster:
    """The agents that are connected, by node. Not thread-safe.

    What changes for whom is kept until it is asked for: `take_news`.
    """

    def __init__(self, *, claim_seconds: float) -> None:
        """Takes how long a claim holds, in seconds."""
        self._claim_seconds = claim_seconds
        self._members: dict[str, _Member] = {}
        self._whole: dict[str, set[str]] = {}
        self._wanting: dict[str, set[str]] = {}
        self._claims: dict[str, dict[Span, _Claim]] = {}
        self._news: set[tuple[str, str]] = set()

    def join(self, agent: Agent) -> None:
        """Takes an agent in, of which nothing is known; what one of the same node had said is forgotten."""
        self.leave(agent.node)
        self._members[agent.node] = _Member(agent)

    def leave(self, node: str) -> None:
        """Forgets an agent with its claims. Idempotent."""
        member = self._members.get(node)
        if member is None:
            return
        for hash_ in list(member.wants):
            self.unwant(node, hash_, is_whole=False)
        self.hold(node, gone_blobs=list(member.blobs))
        del self._members[node]
        self._news = {(other, hash_) for other, hash_ in self._news if other != node}

    def hold(
        self,
        node: str,
        *,
        blobs: Collection[str] = (),
        gone_blobs: Iterable[str] = (),
        revisions: Iterable[str] = (),
        gone_revisions: Iterable[str] = (),
    ) -> None:
        """Notes what an agent has more, and what it has no longer.

        Raises:
            InvalidRequest: TOO_MANY_BLOBS.
        """
        member = self._members[node]
        if len(member.blobs) + len(blobs) > MAX_BLOBS:
            raise InvalidRequest(f"an agent holds at most {MAX_BLOBS} blobs", reason="TOO_MANY_BLOBS")
        for hash_ in set(gone_blobs) & member.blobs:
            member.blobs.discard(hash_)
            self._drop(self._whole, hash_, node)
            self._tell(hash_)
        for hash_ in set(blobs) - member.blobs:
            member.blobs.add(hash_)
            self._whole.setdefault(hash_, set()).add(node)
            self._tell(hash_)
        member.revisions.difference_update(gone_revisions)
        member.revisions.update(revisions)

    def want(self, node: str, hash_: str, held: Iterable[Span] = ()) -> None:
        """An agent fetches a blob, of which it has some spans.

        Raises:
            InvalidRequest: TOO_MANY_BLOBS.
        """
        wants = self._members[node].wants
        if hash_ not in wants and len(wants) >= MAX_WANTS:
            raise InvalidRequest(f"an agent fetches at most {MAX_WANTS} blobs at a time", reason="TOO_MANY_BLOBS")
        is_new = hash_ not in wants
        wants[hash_] = Spans(held)
        self._wanting.setdefault(hash_, set()).add(node)
        if is_new:
            self._tell(hash_)

    def unwant(self, node: str, hash_: str, *, is_whole: bool) -> None:
        """An agent's fetch of a blob has ended: it has all of it now, or what it had counts for nothing. Idempotent."""
        member = self._members[node]
        if member.wants.pop(hash_, None) is None:
            return
        self._drop(self._wanting, hash_, node)
        claims = self._claims.get(hash_, {})
        left = {span: claim for span, claim in claims.items() if claim.node != node}
        if left and hash_ in self._wanting:
            self._claims[hash_] = left
        else:
            self._claims.pop(hash_, None)
        if is_whole:
            member.blobs.add(hash_)
            self._whole.setdefault(hash_, set()).add(node)
        self._news.discard((node, hash_))
        self._tell(hash_)

    def claim(
        self, node: str, hash_: str, spans: Sequence[Span], *, limit: int, excluded: Collection[str], now: float
    ) -> Granted:
        """Grants at most `limit` of some spans, in their order; those that the agent has claimed already count anew.

        `excluded` are nodes that the agent can't read from. An agent that does not want the blob gets nothing.
        """
        if hash_ not in self._members[node].wants:
            return Granted((), ())
        claims = {span: claim for span, claim in self._claims.get(hash_, {}).items() if claim.ends_at > now}
        self._claims[hash_] = claims
        # Twice over the same spans count once too often, which only a strange agent does.
        limit = min(limit, MAX_CLAIMS - sum(claim.node == node for claim in claims.values()))
        granted: list[Span] = []
        holders: dict[str, Holder] = {}
        others = [other for other in self._nodes_with(hash_) if other != node and other not in excluded]
        for span in spans:
            if len(granted) >= limit:
                break
            if (other := self._reader_of(hash_, span, node, others)) is not None:
                if len(holders) < MAX_TOLD:
                    holders[other] = self._holder(other, hash_)
                continue
            claims[span] = _Claim(node, now + self._claim_seconds)
            granted.append(span)
        return Granted(tuple(granted), tuple(holders.values()))

    def end_claims(self, node: str, hash_: str, *, done: Iterable[Span], given_up: Iterable[Span]) -> None:
        """Spans that an agent has now, and spans that it will not read. Spans that it had not claimed are taken too."""
        held = self._members[node].wants.get(hash_)
        claims = self._claims.get(hash_, {})
        for span in (*(done := tuple(done)), *given_up):
            if span in claims and claims[span].node == node:
                del claims[span]
        if held is not None:
            for span in done:
                held.add(*span)

    def holders(self, node: str, hash_: str) -> list[Holder]:
        """Who else has a blob or fetches it, and can be reached; of many, different ones for each who asks."""
        others = [other for other in self._nodes_with(hash_) if other != node]
        if len(others) > MAX_TOLD:
            others = sorted(others, key=lambda other: hashlib.blake2b(f"{node}\0{other}".encode()).digest())[:MAX_TOLD]
        return [self._holder(other, hash_) for other in sorted(others)]

    def holds(self, node: str, revision: str) -> bool:
        """Whether an agent says that it has a revision."""
        return node in self._members and revision in self._members[node].revisions

    def agents(self) -> list[AgentView]:
        """The agents, by node."""
        return [
            AgentView(m.agent, len(m.blobs), len(m.revisions), tuple(sorted(m.wants)))
            for _, m in sorted(self._members.items())
        ]

    def take_news(self) -> set[tuple[str, str]]:
        """Nodes, and blobs that they want whose holders have changed since the last call."""
        news, self._news = self._news, set()
        return news

    def _nodes_with(self, hash_: str) -> list[str]:
        nodes = self._whole.get(hash_, set()) | self._wanting.get(hash_, set())
        return [node for node in nodes if self._members[node].agent.address]

    def _holder(self, node: str, hash_: str) -> Holder:
        return Holder(node, self._members[node].agent.address, hash_ in self._members[node].blobs)

    def _reader_of(self, hash_: str, span: Span, node: str, others: Sequence[str]) -> str | None:
        """Who else has a span or reads it, or some of it."""
        for other in others:
            member = self._members[other]
            if hash_ in member.blobs or (hash_ in member.wants and member.wants[hash_].overlaps(*span)):
                return other
        claims = self._claims[hash_]
        # Agents of one cluster cut a blob in the same way, nearly always: the same span, or none that overlaps.
        if span in claims:
            owner = claims[span].node
            return owner if owner != node and owner in others else None
        for (start, end), claim in claims.items():
            if start < span[1] and span[0] < end and claim.node != node and claim.node in others:
                return claim.node
        return None

    def _tell(self, hash_: str) -> None:
        self._news.update((node, hash_) for node in self._wanting.get(hash_, ()))

    @staticmethod
    def _drop(table: dict[str, set[str]], hash_: str, node: str) -> None:
        nodes = table.get(hash_)
        if nodes is not None:
            nodes.discard(node)
            if not nodes:
                del table[hash_]
