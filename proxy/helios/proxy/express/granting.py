"""How Envoy is to pick among a model's replicas for the next half second: what `Traffic.pick` would go by, laid open.

The score of a candidate is laid out as a sum of which only one part changes with each request that is sent there, so
that whoever picks by it for a while can follow what it sends itself. Pure.
"""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple

from helios.proxy.breaker import BreakerState
from helios.proxy.routing.pick import MAX_CHOICES

if TYPE_CHECKING:
    from helios.proxy.catalogue import ModelEntry
    from helios.proxy.routing.rules import Weights
    from helios.proxy.routing.table import Candidate
    from helios.proxy.traffic import Traffic

_by_score: Final = attrgetter("score")


class LaneCandidate(NamedTuple):
    """A replica that Envoy may pick.

    Its score is ``fixed_score + running_weight / (1 + running_count)``. ``room`` is how many more requests it takes;
    None: any number.
    """

    replica_id: str
    address: str
    fixed_score: float
    running_count: int
    room: int | None


class LaneView(NamedTuple):
    """How to pick: among which candidates, the first of equals first, and by what.

    ``retry_count`` candidates may be tried after the first; ``context_tokens`` is what every candidate has room for; 0:
    nobody knows.
    """

    revision: str
    candidates: tuple[LaneCandidate, ...]
    retry_count: int
    running_weight: float
    prefix_weight: float
    session_weight: float
    context_tokens: int
    tokens_per_byte: float


def lane_view(traffic: Traffic, entry: ModelEntry) -> LaneView | None:
    """How to pick a replica for a model's next requests; None: only the picker can."""
    snapshot = traffic.table.snapshot(entry.name, entry.revision)
    usable = _usable(traffic, entry.name, snapshot)
    if not usable:
        return None
    weights = traffic.rules_of(entry.name).weights
    contexts = [one.context_tokens for one in snapshot if one.context_tokens]
    return LaneView(
        entry.revision,
        # Who takes none is told of, too: what it holds is not to be forgotten for that, and sessions keep their homes.
        tuple(_laid_open(traffic, one, weights, is_usable=one.replica_id in usable) for one in snapshot),
        MAX_CHOICES - 1 if traffic.retries.allows(entry.name) else 0,
        (1.0 - weights.locality) * weights.running,
        weights.prefix,
        weights.session,
        min(contexts, default=0),
        traffic.quotas.history.tokens_per_byte(entry.name),
    )


def _usable(traffic: Traffic, model: str, snapshot: tuple[Candidate, ...]) -> frozenset[str]:
    """Candidates that take requests of the lane; none where the next request may be one for the picker."""
    free = tuple(one for one in snapshot if one.replica_id not in traffic.busy)
    if traffic.fleet.cordoned:
        free = traffic.uncordoned(model, free)
    if not free:
        return frozenset()
    half_open = {one.replica_id for one in free if traffic.breakers.state(one.replica_id) is not BreakerState.CLOSED}
    if half_open and max(free, key=_by_score).replica_id in half_open:
        # Only the picker sends a replica the one request that it is tried with, and it would with the next one.
        return frozenset()
    return frozenset(one.replica_id for one in free) - half_open


def _laid_open(traffic: Traffic, candidate: Candidate, weights: Weights, *, is_usable: bool) -> LaneCandidate:
    replica = traffic.fleet.replica(candidate.replica_id)
    assert replica is not None
    reserved_count, waiting_count = traffic.ledger.reserved_count(candidate.replica_id), replica.load.waiting_count
    room = None if is_usable else 0
    if is_usable and waiting_count and traffic.routing.queue_count:
        room = max(0, traffic.routing.queue_count - waiting_count - reserved_count)
    load = weights.queue * candidate.queue_score + weights.kv * candidate.kv_score
    return LaneCandidate(
        candidate.replica_id,
        candidate.address,
        (1.0 - weights.locality) * load + weights.locality * candidate.locality_score,
        replica.load.running_count + reserved_count,
        room,
    )
