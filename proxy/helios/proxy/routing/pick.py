"""The pick: the best few candidates of a snapshot, with the reasons. Pure, a few microseconds plus 0.1 µs a
candidate.
"""

from collections.abc import Callable, Mapping
from heapq import nlargest
from operator import attrgetter
from typing import Final, NamedTuple

from helios.proxy.routing.prefix import NO_BLOCKS, Blocks
from helios.proxy.routing.rules import NORMAL_BAND, USUAL_WEIGHTS, Weights
from helios.proxy.routing.table import Candidate

# Candidates that a pick keeps for its explanation; all of a larger fleet's would cost memory, not tell more.
MAX_CONSIDERED = 16
# Envoy tries the second and third where the first refuses before its first byte; more would only hide an outage.
MAX_CHOICES = 3
_DRAWN = 2

_by_score = attrgetter("score")


class Pick(NamedTuple):
    """A routing decision: the model's own name, the revision, and the choices, best first.

    `considered` is the snapshot that it was made from, where that was small, else the choices. `split` says why
    a rollout sent the request to this revision, for people; empty: there is none. `is_express`: Envoy routed it by
    itself; where it has not told how, nothing was considered. `weights` are the model's, of which `prefix_weight` and
    `session_weight` counted for this request. A NamedTuple because one is made on the path of every request.
    """

    model: str
    revision: str
    choices: tuple[Candidate, ...]
    candidate_count: int
    considered: tuple[Candidate, ...] = ()
    split: str = ""
    is_express: bool = False
    weights: Weights = USUAL_WEIGHTS
    prefix_weight: float = 0.0
    session_weight: float = 0.0

    @property
    def shares(self) -> dict[str, float]:
        """What each scorer had of the score."""
        return self.weights.shares(self.prefix_weight, self.session_weight)

    @property
    def is_untold(self) -> bool:
        """Whether Envoy routed it by itself and has not told how."""
        return self.is_express and not self.considered

    @property
    def endpoints(self) -> str:
        """The choices as Envoy's override_host balancer reads them."""
        if len(self.choices) == 1:
            return self.choices[0].address
        return ",".join([choice.address for choice in self.choices])

    def explain(self) -> str:
        """Says, for people, why the first choice won."""
        count, lane = self.candidate_count, ", by Envoy's express lane" if self.is_express else ""
        if self.is_untold:
            return ("the model's only replica" if count == 1 else f"one of {count} replicas") + lane
        best = self.choices[0]
        scores = []
        if not self.is_express:
            # Of the lane's nobody told what their load was.
            scores = [f"queue {best.queue_score:.2f}", f"running {best.running_score:.2f}", f"kv {best.kv_score:.2f}"]
        if best.prefix_score:
            scores.append(f"prefix {best.prefix_score:.2f}")
        if best.session_score:
            scores.append("its session's")
        if best.locality_score:
            scores.append(f"locality {best.locality_score:.2f}")
        reasons = f" ({', '.join(scores)})" if scores else ""
        return f"the best of {count}{lane}: {best.score:.3f}{reasons}"


class Wishes(NamedTuple):
    """What a request says that bears on where it goes.

    `blocks` are its prompt's, where that was asked for; `session` stands for a conversation or a user, empty: none is
    known; `context_tokens` is what its prompt is likely to have and its answer may have at most; `band` is its rank.
    """

    blocks: Blocks = NO_BLOCKS
    session: str = ""
    context_tokens: int = 0
    band: int = NORMAL_BAND


NO_WISHES: Final = Wishes()


class Affinity(NamedTuple):
    """What draws a request to some replicas, and what that weighs in a score; load has the rest.

    `held` are its prompt's first blocks by replica, of `block_count`; the weight is the share of a whole score that a
    wholly cached prompt is. `home` is its session's replica, empty: it has none.
    """

    held: Mapping[str, int]
    block_count: int
    weight: float
    home: str = ""
    home_weight: float = 0.0

    def rescored(self, candidate: Candidate) -> Candidate:
        """The candidate as this request sees it."""
        held, block_count, weight, home, home_weight = self
        replica_id, address, score, queue, running, kv, _, _, locality, context = candidate
        ratio = held.get(replica_id, 0) / block_count if held else 0.0
        at_home = 1.0 if replica_id == home else 0.0
        score = (1.0 - weight - home_weight) * score + weight * ratio + home_weight * at_home
        # A third of the time of `_replace`, and each candidate of each request comes by here.
        return Candidate(replica_id, address, score, queue, running, kv, ratio, at_home, locality, context)

    def draws_to(self, replica_id: str) -> bool:
        """Whether anything draws the request to a replica."""
        return replica_id in self.held or replica_id == self.home


def pick(
    model: str,
    revision: str,
    snapshot: tuple[Candidate, ...],
    affinity: Affinity | None = None,
    draw: Callable[[int], int] | None = None,
    *,
    weights: Weights = USUAL_WEIGHTS,
) -> Pick | None:
    """Picks from a snapshot; None where it is empty. Equal scores go to the candidate that came first.

    With ``draw``, which returns a number below its argument, two candidates are drawn and the better one is taken
    (Source: Mitzenmacher, The Power of Two Choices): proxies that do not know of each other's picks do not all send to
    the one that looked best. What draws a request to a replica counts beside. ``weights`` are what the snapshot was
    scored by, for who wants to know.
    """
    count = len(snapshot)
    if count == 1:
        return Pick(model, revision, snapshot, 1, snapshot, "", False, weights)
    if not count:
        return None
    if draw is not None and count > _DRAWN:
        snapshot = _drawn(snapshot, affinity, draw)
    if affinity is not None:
        # The order of those that nothing draws it to is that of their own scores: only the best of them matter.
        snapshot = snapshot if count <= MAX_CONSIDERED else _contenders(snapshot, affinity)
        snapshot = tuple(map(affinity.rescored, snapshot))
    choices = tuple(nlargest(MAX_CHOICES, snapshot, key=_by_score))
    considered = snapshot if count <= MAX_CONSIDERED else choices
    if affinity is None:
        return Pick(model, revision, choices, count, considered, "", False, weights)
    drawn = (affinity.weight, affinity.home_weight)
    return Pick(model, revision, choices, count, considered, "", False, weights, *drawn)


def _contenders(snapshot: tuple[Candidate, ...], affinity: Affinity) -> tuple[Candidate, ...]:
    others = [candidate for candidate in snapshot if not affinity.draws_to(candidate.replica_id)]
    holders = [candidate for candidate in snapshot if affinity.draws_to(candidate.replica_id)]
    return (*holders, *nlargest(MAX_CHOICES, others, key=_by_score))


def _drawn(
    snapshot: tuple[Candidate, ...], affinity: Affinity | None, draw: Callable[[int], int]
) -> tuple[Candidate, ...]:
    first, second = draw(len(snapshot)), draw(len(snapshot) - 1)
    # Two different ones: the second draw is among the others.
    places = (first, second + (second >= first))
    drawn = tuple(snapshot[place] for place in places)
    if affinity is None:
        return drawn
    ids = {candidate.replica_id for candidate in drawn}
    sought = (c for c in snapshot if c.replica_id not in ids and affinity.draws_to(c.replica_id))
    return (*drawn, *sought)
