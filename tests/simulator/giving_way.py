"""Who gives way to a start that finds no room, and in which order starts wait: what `Room` says of replicas, and
`Line` of models, over the scalable driver's nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from helios.proxy.activation.estimate import StartEstimates
from helios.proxy.activation.turns import Line, TurnPolicy
from helios.proxy.placement.workers import Occupant
from tests.simulator.nodes import DEVICE, GivingWay, ModelState, Node, Replica

# What is never free of charge: see `helios.proxy.room`.
_LEAST_VALUE = 1e-6


class Turns:
    """Models that wait for room, and who gives way to them."""

    def __init__(
        self, policy: TurnPolicy, residency_seconds: float, estimates: StartEstimates, arrivals: Sequence[float]
    ) -> None:
        """``arrivals`` are the times of requests, which wait by their index."""
        self._policy = policy
        self._residency_seconds = residency_seconds
        self._estimates = estimates
        self._arrivals = arrivals
        self.line = Line()
        self.in_turn: ModelState | None = None
        """The model of the line that is looked at."""

    @property
    def has_turns(self) -> bool:
        """Whether what is in use gives way."""
        return self._policy.turn_seconds > 0

    def look(self, now: float, demand: Callable[[ModelState, float], None], states: dict[str, ModelState]) -> None:
        """Has those in the line looked at in their order; nothing happens while one is."""
        if self.in_turn is None:
            for model in self.line.models():
                self.in_turn = states[model]
                demand(self.in_turn, now)
                self.in_turn = None

    def on(self, node: Node, wanting: ModelState, now: float) -> GivingWay:
        """Who may give way at a node to a model that waits."""
        victims: list[Occupant] = []
        turn_over: list[Occupant] = []
        in_turn: list[Occupant] = []
        has_waited = self.line.waited_seconds(wanting.name, now) >= self._policy.turn_seconds
        for replica in node.replicas.values():
            if replica.is_draining or replica.state is wanting:
                continue
            if self._is_victim(replica, now):
                unused_seconds = now - (replica.state.last_used_at or 0.0)
                victims.append(self._occupant(replica, unused_seconds))
            elif self.has_turns and replica.asleep_at is None:
                is_over = has_waited and self._is_turn_over(replica, now)
                served_seconds = now - (now if replica.ready_at is None else replica.ready_at)
                (turn_over if is_over else in_turn).append(self._occupant(replica, served_seconds))
        if self.has_turns:
            in_turn += [claim.as_occupant() for claim in self.line.claims_on(node.name, wanting.name)]
        return GivingWay(tuple(victims), tuple(turn_over), tuple(in_turn))

    def _is_victim(self, replica: Replica, now: float) -> bool:
        if replica.state.held:
            return False
        if replica.asleep_at is not None:
            return True
        is_old = replica.ready_at is not None and now - replica.ready_at >= self._residency_seconds
        return replica.is_ready and replica.is_idle and is_old

    def _is_turn_over(self, replica: Replica, now: float) -> bool:
        """Whether it has served for as long as its start took, and all that waited when it got ready."""
        if not replica.is_ready or replica.ready_at is None:
            return False
        held = replica.state.held
        is_served = not held or self._arrivals[held[0]] > replica.ready_at
        return is_served and now - replica.ready_at >= max(self._residency_seconds, self._start_seconds(replica.state))

    def _start_seconds(self, state: ModelState) -> float:
        return self._estimates.expected_seconds(state.name, state.model.entry.weights_bytes)

    def _occupant(self, replica: Replica, seconds: float) -> Occupant:
        """Its model's start is lost with it, the less the longer it was not used, or has served."""
        value = max(_LEAST_VALUE, self._start_seconds(replica.state) * 3600 / max(1.0, seconds))
        return Occupant(str(replica.number), replica.booked_bytes, (DEVICE,), value)
