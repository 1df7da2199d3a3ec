"""How one of a model's replicas is chosen: as the proxy is set, and what the model's policy says over that. Pure.

A model's rules are made when the model changes, and its replicas are scored by them when these change, so a pick does
not see where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from helios.mesh.routing import Choice, ModelRouting

HIGH_BAND: Final = 3
LOW_BAND: Final = 1
# What an engine runs at once where its settings don't say (ReplicaSpec).
USUAL_PLACE_COUNT: Final = 64


@dataclass(frozen=True, slots=True)
class Weights:
    """What scorers weigh in a score of 1.

    `prefix` and `session` are shares of the whole where a request is drawn somewhere; of what they leave, `locality` is
    a share, where the gateway knows its place; load has the rest, in which `queue`, `running` and `kv` add up to 1.

    Waiting in an engine's queue costs whole requests of time, running costs a share of a batch, a full KV cache warns
    of preemption: hence the order of the defaults.
    """

    queue: float = 0.5
    running: float = 0.3
    kv: float = 0.2
    prefix: float = 0.4
    session: float = 0.2
    locality: float = 0.0

    def shares(self, prefix: float, session: float) -> dict[str, float]:
        """What each scorer had of the whole score of a request that was drawn so much; those with nothing are left out.

        They add up to 1.
        """
        table = 1.0 - prefix - session
        load = table * (1.0 - self.locality)
        found = {
            "queue": load * self.queue,
            "running": load * self.running,
            "kv_usage": load * self.kv,
            "prefix": prefix,
            "session": session,
            "locality": table * self.locality,
        }
        return {name: share for name, share in found.items() if share > 0}


@dataclass(frozen=True, slots=True)
class Rules:
    """How a model's replicas are chosen among.

    Attributes:
        weights: what scorers weigh.
        choice: among which candidates the best one is looked for.
        kept_for_high_ratio: the share of a replica's places that only requests of the highest band take.
        kept_from_low_ratio: the share, beside it, that requests of the lowest band leave free.
        place_count: requests that a replica works on at once.
    """

    weights: Weights = Weights()
    choice: Choice = Choice.BEST
    kept_for_high_ratio: float = 0.0
    kept_from_low_ratio: float = 0.0
    place_count: int = USUAL_PLACE_COUNT

    @property
    def keeps_places(self) -> bool:
        """Whether some places are not for everybody."""
        return bool(self.kept_for_high_ratio or self.kept_from_low_ratio)

    def of_model(self, own: ModelRouting, place_count: int, *, knows_place: bool) -> Rules:
        """The rules of a model whose policy says ``own``.

        What a policy says of a prefix or a session goes before what the proxy is set to of the other one, where both
        together would leave nothing to load. ``knows_place``: the gateway knows where it is.
        """
        usual = self.weights
        queue, running = _first(own.queue_weight, usual.queue), _first(own.running_weight, usual.running)
        kv = _first(own.kv_weight, usual.kv)
        load = queue + running + kv
        if not load:
            # The policy says that two of them are nothing, and the proxy the third.
            queue, running, kv, load = usual.queue, usual.running, usual.kv, 1.0
        prefix, session = _shared(own.prefix_weight, usual.prefix, own.session_weight, usual.session)
        high, low = _shared(
            own.kept_for_high_ratio, self.kept_for_high_ratio, own.kept_from_low_ratio, self.kept_from_low_ratio
        )
        locality = _first(own.locality_weight, usual.locality) if knows_place else 0.0
        weights = Weights(queue / load, running / load, kv / load, prefix, session, locality)
        return Rules(weights, own.choice or self.choice, high, low, place_count or USUAL_PLACE_COUNT)


USUAL_WEIGHTS: Final = Weights()


def _first(own: float | None, usual: float) -> float:
    return usual if own is None else own


def _shared(one: float | None, usual_one: float, other: float | None, usual_other: float) -> tuple[float, float]:
    """Two shares that are at most 1 together: what the policy says, of the proxy's what that leaves."""
    if one is None:
        return min(usual_one, 1.0 - _first(other, usual_other)), _first(other, usual_other)
    return one, min(usual_other, 1.0 - one) if other is None else other
