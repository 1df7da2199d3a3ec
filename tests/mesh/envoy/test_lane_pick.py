"""The lane's picker chooses what `helios.proxy.routing.pick` chooses, for whatever it was told and has sent itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from helios.api.proxy.v1 import lane_service_pb2 as lane_pb
from helios.proxy.fleet.state import Load
from helios.proxy.routing.pick import MAX_CHOICES, Affinity, pick
from helios.proxy.routing.prefix import NO_BLOCKS, Blocks, blocks_of
from helios.proxy.routing.rules import Weights
from helios.proxy.routing.sessions import Ring
from helios.proxy.routing.table import Candidate, score
from tests.mesh.envoy.lane_gateway import LEASE_SECONDS, RENEW_SECONDS, Gateway, Request, answer, chat

# Among how many a gateway picks (lane.lua).
MAX_CANDIDATES = 32
# Scores that differ by less are sums of the same in another order.
ALIKE = 1e-9

loads = st.builds(
    Load,
    running_count=st.integers(0, 3) | st.integers(0, 1000),
    waiting_count=st.sampled_from([0, 0, 0, 1, 5]),
    kv_usage_ratio=st.sampled_from([0.0, 0.0, 0.5, 1.0]) | st.floats(0, 1),
)
weights = st.builds(
    Weights,
    prefix=st.sampled_from([0.0, 0.4]) | st.floats(0.01, 0.6),
    session=st.sampled_from([0.0, 0.2]) | st.floats(0.01, 0.4),
    locality=st.sampled_from([0.0, 0.25]),
)
# Conversations that have beginnings in common.
prompts = st.lists(st.sampled_from(["a" * 300, "b" * 300, "c" * 700, "d" * 2000]), max_size=5).map("".join)


@dataclass
class Sent:
    """What the gateway sent to a replica, and what of that counts."""

    has: set[int] = field(default_factory=set)
    count: int = 0
    told_count: int = 0

    def held(self, blocks: Blocks) -> int:
        """How many of a prompt's first blocks it has."""
        return next((count for count, block in enumerate(blocks) if block not in self.has), len(blocks))


class Told(NamedTuple):
    """What a proxy says of a replica."""

    load: Load
    room: int | None = None
    is_near: bool = False


class TheGatewayChoosesAsTheProxy(RuleBasedStateMachine):
    """A gateway is told of loads and losses, and sends; beside it, a model in the proxy's own words."""

    def __init__(self) -> None:
        super().__init__()
        self.gateway = Gateway()
        self.weights = Weights()
        self.seed, self.seed_told, self.sequence, self.forgets_all = 1, 0, 0, False
        # What a proxy says now, and what it said last.
        self.now: dict[str, Told] = {}
        self.told: dict[str, Told] = {}
        self.sent: dict[str, Sent] = {}
        # Blocks that replicas have lost; none: all.
        self.losses: list[tuple[str, list[int]]] = []
        # The gateway's hashes of blocks, and picks that it has not told of, with the seed of theirs.
        self.hash_of: dict[int, int] = {}
        self.untold: dict[str, tuple[Blocks, Candidate, int]] = {}
        self.lease_ends_at = 0.0

    @initialize(
        weights=weights, told=st.lists(st.builds(Told, loads, st.none(), st.booleans()), min_size=1, max_size=20)
    )
    def begins(self, weights: Weights, told: list[Told]) -> None:
        self.weights = weights
        self.now = {f"replica-{number}": one for number, one in enumerate(told)}
        self.renews("", 1.0)

    @rule(
        text=prompts,
        seconds=st.sampled_from([RENEW_SECONDS, RENEW_SECONDS, 0.25, 1.0]),
        meanwhile=st.lists(prompts, max_size=3),
    )
    def renews(self, text: str, seconds: float, meanwhile: Sequence[str] = ()) -> None:
        self.gateway.sleep(seconds)
        request = self.gateway.begin(chat(text))
        asked = request.asked
        assert asked.loss_sequence == self.sequence
        assert len(asked.picks) == len(self.untold)
        for told in asked.picks:
            self._hear(told)
        for sent in self.sent.values():
            sent.told_count = sent.count
        for other in meanwhile:
            self.sends(other, "")
        self.sequence += 1
        message = self._answer()
        self._is_told()
        request.answered(message)
        self._check(request, text, "")

    @rule(data=st.data(), one=st.builds(Told, loads, st.none() | st.integers(0, 3), st.booleans()))
    def its_load_changes(self, data: st.DataObject, one: Told) -> None:
        self.now[self._some_replica(data)] = one

    @rule(number=st.integers(0, 40), one=st.builds(Told, loads, st.none(), st.booleans()), is_first=st.booleans())
    def one_comes(self, number: int, one: Told, *, is_first: bool) -> None:
        if len(self.now) < MAX_CANDIDATES and f"replica-{number}" not in self.now:
            newcomer = {f"replica-{number}": one}
            self.now = newcomer | self.now if is_first else self.now | newcomer

    @precondition(lambda self: len(self.now) > 1)
    @rule(data=st.data())
    def one_goes(self, data: st.DataObject) -> None:
        del self.now[self._some_replica(data)]

    @rule(data=st.data(), count=st.integers(0, 12))
    def it_loses_blocks(self, data: st.DataObject, count: int) -> None:
        replica_id = self._some_replica(data)
        has = self.sent[replica_id].has if replica_id in self.sent else set()
        if lost := sorted(block for block in has if block in self.hash_of)[:count]:
            self.losses.append((replica_id, lost))

    @rule(data=st.data())
    def it_loses_everything(self, data: st.DataObject) -> None:
        self.losses.append((self._some_replica(data), []))

    @rule()
    def losses_are_missed(self) -> None:
        self.forgets_all = True

    @rule()
    def the_seed_changes(self) -> None:
        self.seed += 1
        self.forgets_all = True

    @rule(text=prompts, session=st.sampled_from(["", "", "anna", "bob", "ch\u00e9ri"]))
    def sends(self, text: str, session: str) -> None:
        headers = {"x-session-id": session} if session else {}
        self._check(self.gateway.send(chat(text), **headers), text, session)

    def _some_replica(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.now)))

    def _answer(self) -> lane_pb.RenewResponse:
        return answer(
            seed=self.seed,
            candidates=[
                lane_pb.LaneCandidate(
                    replica_id=replica_id,
                    address=f"address of {replica_id}",
                    fixed_score=self._fixed(one),
                    running_count=one.load.running_count,
                    room_plus_one=0 if one.room is None else one.room + 1,
                )
                for replica_id, one in self.now.items()
            ],
            running_weight=(1.0 - self.weights.locality) * self.weights.running,
            prefix_weight=self.weights.prefix,
            session_weight=self.weights.session,
            losses=[
                lane_pb.LaneLoss(replica_id=replica_id, blocks=[self.hash_of[block] for block in blocks])
                for replica_id, blocks in self.losses
            ],
            forgets_all=self.forgets_all and self.seed == self.seed_told,
            loss_sequence=self.sequence,
        )

    def _is_told(self) -> None:
        """What an answer changes in what is known of replicas."""
        if self.seed != self.seed_told:
            self.hash_of.clear()
        for sent in self.sent.values():
            sent.count -= sent.told_count
            if self.forgets_all:
                sent.has.clear()
        for replica_id, blocks in self.losses:
            if replica_id in self.sent:
                has = self.sent[replica_id].has
                has.difference_update(blocks or has.copy())
        self.losses, self.forgets_all, self.seed_told = [], False, self.seed
        self.told = dict(self.now)
        self.sent = {replica_id: self.sent.get(replica_id, Sent()) for replica_id in self.told}
        self.lease_ends_at = self.gateway.now_seconds + LEASE_SECONDS

    def _fixed(self, one: Told) -> float:
        scored = score("", "", one.load, 0)
        load = self.weights.queue * scored.queue_score + self.weights.kv * scored.kv_score
        return (1.0 - self.weights.locality) * load + self.weights.locality * one.is_near

    def _candidate(self, replica_id: str) -> Candidate:
        """As `helios.proxy.traffic` has it, what the gateway sent there being on its way."""
        one, sent = self.told[replica_id], self.sent[replica_id]
        found = score(replica_id, "", one.load, sent.count, weights=self.weights)
        near = self.weights.locality
        return found._replace(score=(1.0 - near) * found.score + near * one.is_near)

    def _check(self, request: Request, text: str, session: str) -> None:
        body = chat(text)
        blocks = blocks_of(body[body.index(b'"messages"') :], "") if self.weights.prefix else NO_BLOCKS
        found = {replica_id: sent.held(blocks) for replica_id, sent in self.sent.items()}
        held = {replica_id: count for replica_id, count in found.items() if count}
        home = Ring(self.told).home(session) if session and self.weights.session else ""
        drawn = (self.weights.prefix if held else 0.0, self.weights.session if home else 0.0)
        affinity = Affinity(held, len(blocks), drawn[0], home, drawn[1]) if held or home else None
        free = [
            replica_id
            for replica_id, one in self.told.items()
            if one.room is None or one.room > self.sent[replica_id].count
        ]
        expected = pick("m", "", tuple(map(self._candidate, free)), affinity, weights=self.weights)
        if expected is None or self.gateway.now_seconds >= self.lease_ends_at:
            assert not request.is_picked
            return
        chosen = [address.removeprefix("address of ") for address in request.endpoints]
        scores = {replica_id: self._score(replica_id, affinity) for replica_id in free}
        in_order = sorted(scores, key=lambda replica_id: -scores[replica_id])
        assert chosen == in_order[:MAX_CHOICES], "of equal ones, the first"
        if len(free) > 1:
            assert [scores[one] for one in chosen] == pytest.approx([one.score for one in expected.choices], abs=ALIKE)
        if all(scores[one] - scores[other] > ALIKE for one, other in pairwise(in_order[: MAX_CHOICES + 1])):
            assert chosen == [one.replica_id for one in expected.choices]
        self._note(request, chosen[0], blocks)
        best = Candidate(chosen[0], "", scores[chosen[0]], 0, 0, 0, held.get(chosen[0], 0), float(chosen[0] == home))
        self.untold[request.headers["x-request-id"]] = (blocks, best, self.seed_told)

    def _score(self, replica_id: str, affinity: Affinity | None) -> float:
        """In the contract's words (`RenewResponse`), computed in that order: equal ones must be equal here, too."""
        one, sent = self.told[replica_id], self.sent[replica_id]
        running_weight = (1.0 - self.weights.locality) * self.weights.running
        load = one.load.running_count + sent.count
        own = self._fixed(one) + running_weight / (1 + load)
        if affinity is None:
            return own
        found = (1 - affinity.weight - affinity.home_weight) * own
        if affinity.weight:
            found += affinity.weight * (affinity.held.get(replica_id, 0) / affinity.block_count)
        return found + affinity.home_weight if replica_id == affinity.home else found

    def _note(self, request: Request, replica_id: str, blocks: Blocks) -> None:
        sent = self.sent[replica_id]
        sent.count += 1
        sent.has.update(blocks)

    def _hear(self, told: lane_pb.LanePick) -> None:
        blocks, best, seed = self.untold.pop(told.request_id)
        assert told.replica_id == best.replica_id
        assert told.score == best.score
        assert told.held_count == best.prefix_score
        assert told.is_home == bool(best.session_score)
        assert len(told.blocks) == len(blocks)
        if seed != self.seed_told:
            return
        for block, told_hash in zip(blocks, told.blocks, strict=True):
            assert self.hash_of.setdefault(block, told_hash) == told_hash, "equal beginnings are equal hashes"
        assert len(set(self.hash_of.values())) == len(self.hash_of), "equal hashes are equal beginnings"


TestTheGatewayChoosesAsTheProxy = TheGatewayChoosesAsTheProxy.TestCase
TestTheGatewayChoosesAsTheProxy.settings = settings(max_examples=60, stateful_step_count=40)


@given(
    steps=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True), min_size=1, max_size=4),
    key=st.text(min_size=1, max_size=40).map(str.strip).filter(bool),
)
def test_a_session_is_at_home_where_the_proxy_says(steps: list[list[int]], key: str) -> None:
    """Whoever comes or goes, by whatever of the places for it in a request the session is named."""
    gateway = Gateway()
    for numbers in steps:
        gateway.sleep(1.0)
        replicas = [
            lane_pb.LaneCandidate(replica_id=f"replica-{number}", address=f"at-{number}", running_count=place)
            for place, number in enumerate(numbers)
        ]
        gateway.renew(answer(candidates=replicas, session_weight=0.9, prefix_weight=0.0))
        home = Ring(replica.replica_id for replica in replicas).home(key)
        by_header = gateway.send(chat(), **{"x-session-id": key})
        by_field = gateway.send(orjson.dumps({"model": "m", "messages": [], "user": key}))
        by_narrower = gateway.send(orjson.dumps({"prompt_cache_key": key, "safety_identifier": "x", "user": "y"}))
        for request in (by_header, by_field, by_narrower):
            assert request.endpoints[0] == home.replace("replica", "at")
        gateway.sleep(RENEW_SECONDS)
        asked = gateway.renew(answer(candidates=replicas, session_weight=0.9, prefix_weight=0.0))
        assert [pick.is_home for pick in asked.picks[1:]] == [True] * 3
        assert not asked.picks[0].is_home
