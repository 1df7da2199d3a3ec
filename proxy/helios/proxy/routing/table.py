"""The candidates of every model revision, kept up to date change by change.

A pick has tens of microseconds. Filtering and scoring a thousand replicas for each pick would take milliseconds, while
at most a few of them change between two picks. So a replica is filtered and scored when something about it changes, and
the table holds the outcome: immutable `Candidate`s, by model and revision. A snapshot is a tuple of them, a few
microseconds for a thousand.
"""

from collections.abc import Iterator
from typing import NamedTuple

from helios.proxy.fleet.state import Load, Replica, ReplicaState
from helios.proxy.routing.rules import USUAL_WEIGHTS, Weights
from helios.proxy.routing.sessions import Ring


class Candidate(NamedTuple):
    """A replica that may be picked. `score` and the scores it is made of lie in [0, 1]; more is better.

    A NamedTuple because making one is on the path of every pick, and costs a third of a frozen dataclass.
    """

    replica_id: str
    address: str
    score: float
    queue_score: float
    running_score: float
    kv_score: float
    prefix_score: float = 0.0
    """The share of a request's prompt that it has in its cache, where that was asked: never of the table's own."""
    session_score: float = 0.0
    """1 where the request's session is at home here: never of the table's own."""
    locality_score: float = 0.0
    """How near its worker is to the gateway, where that is known."""
    context_tokens: int = 0
    """The longest prompt plus answer; 0: not known."""


class Facts(NamedTuple):
    """What the proxy itself knows of a replica, beside what its worker told."""

    is_worker_reachable: bool
    is_drain_asked: bool
    is_published: bool
    is_breaker_closed: bool
    reserved_count: int


_UNREADY = {ReplicaState.DRAINING: "draining", ReplicaState.ASLEEP: "asleep", ReplicaState.WAKING: "waking"}


def exclusion(replica: Replica, facts: Facts) -> str | None:
    """Why a replica can't be picked, None where it can: the filters, cheapest and most telling first."""
    if replica.is_spare:
        return "compiling"
    if replica.state is not ReplicaState.READY:
        return _UNREADY.get(replica.state, "not_ready")
    if facts.is_drain_asked:
        return "draining"
    if not facts.is_worker_reachable:
        return "worker_unreachable"
    if not facts.is_published:
        return "endpoint_not_acknowledged"
    if not facts.is_breaker_closed:
        return "breaker_open"
    return None


class Locality(NamedTuple):
    """Where the gateway is; empty names: not known."""

    node: str = ""
    zone: str = ""

    @property
    def is_known(self) -> bool:
        """Whether anything can be said to be near."""
        return bool(self.node or self.zone)

    def score_of(self, node: str, zone: str) -> float:
        """How near a worker is: 1 on the gateway's node, half of it in its zone."""
        if self.node and node == self.node:
            return 1.0
        return 0.5 if self.zone and zone == self.zone else 0.0


def score(
    replica_id: str,
    address: str,
    load: Load,
    reserved_count: int,
    context_tokens: int = 0,
    *,
    weights: Weights = USUAL_WEIGHTS,
) -> Candidate:
    """Scores a replica by its load; requests that are on their way to it count as running."""
    queue_score = 1.0 / (1.0 + load.waiting_count)
    running_score = 1.0 / (1.0 + load.running_count + reserved_count)
    kv_score = 1.0 - load.kv_usage_ratio
    total = weights.queue * queue_score + weights.running * running_score + weights.kv * kv_score
    return Candidate(replica_id, address, total, queue_score, running_score, kv_score, 0.0, 0.0, 0.0, context_tokens)


def with_room(candidates: tuple[Candidate, ...], context_tokens: int) -> tuple[Candidate, ...]:
    """Candidates whose context so much fits into; all where it fits into none, which is a replica's to say."""
    fitting = tuple(c for c in candidates if not c.context_tokens or c.context_tokens > context_tokens)
    return fitting or candidates


class RoutingTable:
    """Candidates by model and revision.

    Invariant: a replica is in at most one group.
    """

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str], dict[str, Candidate]] = {}
        self._group_of: dict[str, tuple[str, str]] = {}
        # Made when a key is asked about first, and kept in step from then on.
        self._rings: dict[tuple[str, str], Ring] = {}

    def snapshot(self, model: str, revision: str) -> tuple[Candidate, ...]:
        """The candidates now; empty where there are none."""
        group = self._groups.get((model, revision))
        return tuple(group.values()) if group else ()

    def count(self, model: str, revision: str) -> int:
        """How many candidates there are now."""
        return len(self._groups.get((model, revision), ()))

    def home(self, model: str, revision: str, key: str) -> str:
        """The candidate at which a session is at home; empty where there is none."""
        ring = self._rings.get((model, revision))
        if ring is None:
            ring = self._rings[model, revision] = Ring(self._groups.get((model, revision), ()))
        return ring.home(key)

    def put(self, model: str, revision: str, candidate: Candidate) -> bool:
        """Adds or replaces a candidate; True where it was not one before."""
        key = (model, revision)
        replica_id = candidate.replica_id
        held = self._group_of.get(replica_id)
        if held != key:
            self.remove(replica_id)
            self._group_of[replica_id] = key
            if (ring := self._rings.get(key)) is not None:
                ring.add(replica_id)
            self._groups.setdefault(key, {})[replica_id] = candidate
            return True
        self._groups[key][replica_id] = candidate
        return False

    def remove(self, replica_id: str) -> None:
        """Removes a replica; harmless where it is no candidate."""
        key = self._group_of.pop(replica_id, None)
        if key is not None:
            group = self._groups[key]
            del group[replica_id]
            if (ring := self._rings.get(key)) is not None:
                ring.remove(replica_id)
            if not group:
                del self._groups[key]
                self._rings.pop(key, None)

    def __contains__(self, replica_id: str) -> bool:
        """Whether the replica may be picked now."""
        return replica_id in self._group_of

    def __iter__(self) -> Iterator[Candidate]:
        """All candidates."""
        for group in self._groups.values():
            yield from group.values()
