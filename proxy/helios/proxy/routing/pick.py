"""The pick: the best few candidates of a snapshot, with the reasons. Pure, a few microseconds plus 0.1 µs a
candidate.
"""

from collections.abc import Mapping
from heapq import nlargest
from operator import attrgetter
from typing import NamedTuple

from helios.proxy.routing.table import Candidate

# Candidates that a pick keeps for its explanation; all of a larger fleet's would cost memory, not tell more.
MAX_CONSIDERED = 16
# Envoy tries the second and third where the first refuses before its first byte; more would only hide an outage.
MAX_CHOICES = 3

_by_score = attrgetter("score")


class Pick(NamedTuple):
    """A routing decision: the model's own name, the revision, and the choices, best first.

    `considered` is the snapshot that it was made from, where that was small, else the choices. `split` says why
    a rollout sent the request to this revision, for people; empty: there is none. `is_express`: Envoy routed it by
    itself. A NamedTuple because one is made on the path of every request.
    """

    model: str
    revision: str
    choices: tuple[Candidate, ...]
    candidate_count: int
    considered: tuple[Candidate, ...] = ()
    split: str = ""
    is_express: bool = False

    @property
    def endpoints(self) -> str:
        """The choices as Envoy's override_host balancer reads them."""
        if len(self.choices) == 1:
            return self.choices[0].address
        return ",".join([choice.address for choice in self.choices])

    def explain(self) -> str:
        """Says, for people, why the first choice won."""
        if self.is_express:
            return "the model's only replica, by Envoy's express lane"
        best = self.choices[0]
        scores = f"queue {best.queue_score:.2f}, running {best.running_score:.2f}, kv {best.kv_score:.2f}"
        if best.prefix_score:
            scores += f", prefix {best.prefix_score:.2f}"
        return f"the best of {self.candidate_count}: {best.score:.3f} ({scores})"


class Affinity(NamedTuple):
    """Where a request's prompt is cached: its first blocks by replica, of so many, and what that weighs in a score.

    The weight is the share of a whole score that a wholly cached prompt is; load has the rest.
    """

    held: Mapping[str, int]
    block_count: int
    weight: float

    def rescored(self, candidate: Candidate) -> Candidate:
        """The candidate as this request sees it."""
        ratio = self.held.get(candidate.replica_id, 0) / self.block_count
        score = (1.0 - self.weight) * candidate.score + self.weight * ratio
        return candidate._replace(score=score, prefix_score=ratio)


def pick(model: str, revision: str, snapshot: tuple[Candidate, ...], affinity: Affinity | None = None) -> Pick | None:
    """Picks from a snapshot; None where it is empty. Equal scores go to the candidate that came first."""
    count = len(snapshot)
    if count == 1:
        return Pick(model, revision, snapshot, 1, snapshot)
    if not count:
        return None
    if affinity is not None:
        # The order of those that have nothing of the prompt is that of their own scores: only the best of them matter.
        snapshot = snapshot if count <= MAX_CONSIDERED else _contenders(snapshot, affinity.held)
        snapshot = tuple(map(affinity.rescored, snapshot))
    choices = tuple(nlargest(MAX_CHOICES, snapshot, key=_by_score))
    return Pick(model, revision, choices, count, snapshot if count <= MAX_CONSIDERED else choices)


def _contenders(snapshot: tuple[Candidate, ...], held: Mapping[str, int]) -> tuple[Candidate, ...]:
    others = [candidate for candidate in snapshot if candidate.replica_id not in held]
    holders = [candidate for candidate in snapshot if candidate.replica_id in held]
    return (*holders, *nlargest(MAX_CHOICES, others, key=_by_score))
