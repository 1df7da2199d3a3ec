"""How one of a model's replicas is chosen: as the proxy is set, and what the model's policy says over that. Pure.

A model's rules are made when the model changes, and its replicas are scored by them when these change, so a pick does
not see where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Final

from helios.mesh.routing import Choice, ModelRouting

LOW_BAND: Final = 1
NORMAL_BAND: Final = 2
HIGH_BAND: Final = 3
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
        kept_for_high_ratio: the share of a replica's places that is kept for requests of the highest band.
        kept_from_low_ratio: the share, beside it, that is kept from those of the lowest.
        normal_limit: a replica at which so many requests are takes none of a normal band; 0: any number.
        low_limit: the same of a low band; 0 where no place is kept.
    """

    weights: Weights = Weights()
    choice: Choice = Choice.BEST
    kept_for_high_ratio: float = 0.0
    kept_from_low_ratio: float = 0.0
    normal_limit: int = 0
    low_limit: int = 0

    @property
    def keeps_places(self) -> bool:
        """Whether some places are not for everybody."""
        return self.low_limit > 0

    def lowest_band(self, request_count: int, *, is_full: bool) -> int:
        """The lowest band whose requests go to a replica at which so many are. ``is_full``: some wait in its engine.

        One whose engine has no room for what it has keeps all that gets free, however many places it is said to have.
        """
        if self.normal_limit and (is_full or request_count >= self.normal_limit):
            return HIGH_BAND
        return NORMAL_BAND if self.low_limit and (is_full or request_count >= self.low_limit) else LOW_BAND

    def of_model(self, own: ModelRouting, place_count: int, *, knows_place: bool) -> Rules:
        """The rules of a model whose policy says ``own``, and of whose replicas each works on so many requests at once.

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
        places = place_count or USUAL_PLACE_COUNT
        normal_limit, low_limit = _limit(places, high), _limit(places, high + low)
        return Rules(weights, own.choice or self.choice, high, low, normal_limit, low_limit)


USUAL_WEIGHTS: Final = Weights()


def _limit(place_count: int, kept_ratio: float) -> int:
    """Places that a band may fill, at least one; 0: all."""
    # A share is a whole number of places; what computing adds to it behind the ninth digit is no place.
    kept_count = ceil(round(place_count * kept_ratio, 9))
    return max(1, place_count - kept_count) if kept_count else 0


def _first(own: float | None, usual: float) -> float:
    return usual if own is None else own


def _shared(one: float | None, usual_one: float, other: float | None, usual_other: float) -> tuple[float, float]:
    """Two shares that are at most 1 together: what the policy says, of the proxy's what that leaves."""
    if one is None:
        return min(usual_one, 1.0 - _first(other, usual_other)), _first(other, usual_other)
    return one, min(usual_other, 1.0 - one) if other is None else other
