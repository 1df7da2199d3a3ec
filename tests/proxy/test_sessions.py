"""Sessions, nearness, contexts and draws: what a request says, and where its replica is, in a pick."""

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helios.mesh.routing import Choice
from helios.proxy.core import Core
from helios.proxy.fleet.state import Load, Replica, WorkerHello
from helios.proxy.routing.pick import Affinity, Wishes, pick
from helios.proxy.routing.rules import Rules, Weights
from helios.proxy.routing.sessions import Ring
from helios.proxy.routing.table import Candidate, Locality, score
from helios.proxy.traffic import LoadDelta, RoutingPolicy
from tests.proxy.support import core, entry, hello, policy, replica

IDS = st.sets(st.sampled_from([f"replica-{number}" for number in range(12)]), min_size=1)
KEYS = [f"talk {number}" for number in range(200)]


@given(replica_ids=IDS, other=st.sampled_from([f"replica-{number}" for number in range(12)]))
def test_only_keys_of_a_replica_that_comes_or_goes_move(replica_ids: set[str], other: str) -> None:
    without = Ring(sorted(replica_ids - {other}))
    before = {key: without.home(key) for key in KEYS}
    without.add(other)
    after = {key: without.home(key) for key in KEYS}
    assert all(after[key] in (before[key], other) for key in KEYS)
    without.remove(other)
    assert {key: without.home(key) for key in KEYS} == before


@given(replica_ids=IDS, seed=st.integers(0, 1000))
def test_homes_depend_on_the_replicas_and_not_on_their_order(replica_ids: set[str], seed: int) -> None:
    shuffled = sorted(replica_ids)
    random.Random(seed).shuffle(shuffled)
    one, other = Ring(sorted(replica_ids)), Ring()
    for replica_id in shuffled:
        other.add(replica_id)
    assert [one.home(key) for key in KEYS] == [other.home(key) for key in KEYS]


def test_keys_are_spread_over_replicas() -> None:
    ring = Ring([f"replica-{number}" for number in range(4)])
    homes = [ring.home(f"key {number}") for number in range(4000)]
    assert all(400 < homes.count(f"replica-{number}") < 2000 for number in range(4))
    assert Ring().home("key") == ""


def fleet(count: int, routing: RoutingPolicy, **hello_fields: str) -> Core:
    """A core with so many replicas of one model, a worker each."""
    subject = core(replace(policy(), routing=routing))
    subject.models_replaced([entry("m", min_replicas=count)], 0.0, is_synced=True)
    for number in range(count):
        held = at(number)
        subject.worker_hello(named(hello(held.worker_id, replicas=(held,)), number, **hello_fields), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    return subject


def at(number: int) -> Replica:
    """The replica of a worker."""
    return replica(f"r{number}", worker_id=f"w{number}", address=f"127.0.0.1:{1000 + number}")


def named(told: WorkerHello, number: int, **fields: Any) -> WorkerHello:
    """A worker's hello with a node, and a zone, of its own."""
    values: dict[str, Any] = {name: f"{prefix}{number}" for name, prefix in fields.items()}
    return replace(told, **values)


def first(subject: Core, wishes: Wishes, request_id: str = "q") -> str:
    """The replica that a request is sent to; nothing is left of it."""
    chosen = subject.pick(entry("m"), request_id, 1.0, "", wishes)
    assert chosen is not None
    best = chosen.choices[0].replica_id
    subject.load_report([LoadDelta(best, Load(), started=(request_id,), finished=((request_id, 0),))], 1.0)
    return best


def test_a_session_stays_at_its_replica_and_sessions_are_spread() -> None:
    subject = fleet(4, RoutingPolicy())
    homes = {session: {first(subject, Wishes(session=session)) for _ in range(5)} for session in KEYS[:40]}
    assert all(len(places) == 1 for places in homes.values())
    assert len({place for places in homes.values() for place in places}) == 4


def test_a_session_leaves_a_replica_that_has_too_much_to_do() -> None:
    subject = fleet(2, RoutingPolicy())
    home = first(subject, Wishes(session="talk"))
    subject.load_report([LoadDelta(home, Load(running_count=8, waiting_count=2))], 1.0)
    assert first(subject, Wishes(session="talk")) != home
    subject.load_report([LoadDelta(home, Load())], 1.0)
    assert first(subject, Wishes(session="talk")) == home


def test_a_session_is_explained() -> None:
    subject = fleet(2, RoutingPolicy())
    chosen = subject.pick(entry("m"), "q", 1.0, "", Wishes(session="talk"))
    assert chosen is not None
    assert chosen.choices[0].session_score == 1.0
    assert "session" in chosen.explain()


def test_the_nearest_replica_is_taken_until_it_has_more_to_do() -> None:
    routing = RoutingPolicy(Rules(Weights(locality=0.2)), locality=Locality(node="node2"))
    subject = fleet(3, routing, node="node")
    assert {first(subject, Wishes(), f"q{number}") for number in range(5)} == {"r2"}
    subject.load_report([LoadDelta("r2", Load(running_count=8, waiting_count=2))], 1.0)
    assert first(subject, Wishes()) != "r2"


@pytest.mark.parametrize(
    ("own", "worker", "expected"),
    [
        (Locality(), ("a", "z"), 0.0),
        (Locality(), ("", ""), 0.0),
        (Locality("a", "z"), ("a", "z"), 1.0),
        (Locality("a", "z"), ("b", "z"), 0.5),
        (Locality("a", "z"), ("b", "y"), 0.0),
        (Locality("", "z"), ("", ""), 0.0),
        (Locality("a", ""), ("b", ""), 0.0),
    ],
)
def test_nearness(own: Locality, worker: tuple[str, str], expected: float) -> None:
    assert own.score_of(*worker) == expected


def test_a_long_answer_goes_where_there_is_room_for_it() -> None:
    subject = core()
    subject.models_replaced([entry("m", min_replicas=2)], 0.0, is_synced=True)
    for number, tokens in enumerate((1024, 8192)):
        held = replace(at(number), max_context_tokens=tokens)
        subject.worker_hello(hello(held.worker_id, replicas=(held,)), 0.0)
    subject.endpoints_acknowledged(subject.fleet.endpoints(), 0.0)
    assert {first(subject, Wishes(context_tokens=4096), f"q{number}") for number in range(5)} == {"r1"}
    assert first(subject, Wishes(context_tokens=100_000)) in ("r0", "r1"), "a replica says that it is too long"


def candidates(loads: list[int]) -> tuple[Candidate, ...]:
    """Candidates with so many running requests."""
    return tuple(score(f"r{n}", f"127.0.0.1:{n}", Load(running_count=load), 0) for n, load in enumerate(loads))


@given(loads=st.lists(st.integers(0, 9), min_size=3, max_size=40), seed=st.integers(0, 1000))
def test_of_two_that_are_drawn_the_better_one_is_taken(loads: list[int], seed: int) -> None:
    snapshot = candidates(loads)
    chosen = pick("m", "r", snapshot, None, random.Random(seed).randrange)
    assert chosen is not None
    assert chosen.candidate_count == len(loads)
    best, other = chosen.choices
    assert best.replica_id != other.replica_id
    assert best.score >= other.score


@given(loads=st.lists(st.integers(0, 9), min_size=3, max_size=40), seed=st.integers(0, 1000))
def test_what_draws_a_request_to_a_replica_counts_beside_the_draw(loads: list[int], seed: int) -> None:
    home = f"r{seed % len(loads)}"
    affinity = Affinity({}, 0, 0.0, home, 0.49)
    chosen = pick("m", "r", candidates(loads), affinity, random.Random(seed).randrange)
    assert chosen is not None
    assert home in {choice.replica_id for choice in chosen.choices}


def test_draws_spread_what_one_look_would_send_to_one_replica() -> None:
    subject = fleet(10, RoutingPolicy(Rules(choice=Choice.POWER_OF_TWO), draw=random.Random(1).randrange))
    assert len({first(subject, Wishes(), f"q{number}") for number in range(60)}) > 5
