"""What drivers give back: decisions, and what a policy made of a load."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from tests.simulator.world import Tier


@dataclass(frozen=True, slots=True)
class Decision:
    """Something that was decided: ``start``, ``drain``, ``sleep``, ``wake`` or ``stage``, of a model, at a node."""

    at: float
    what: str
    model: str
    node: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a policy made of a load, of the judged hours.

    Attributes:
        first_token_seconds: by request, in the order of arrival; NaN: it was refused, or had no answer at the end.
        cold: by request: 0: it met a replica that was ready; 1: it waited for a start, or for ever; 2: for a wake.
        device_seconds: devices that were booked, by the share of their memory, times how long.
        asleep_seconds: of these, what replicas booked that slept.
        starts: by where weights came from.
        wake_count: sleeping replicas that were woken.
        decisions: all of them, where they were to be kept.
    """

    first_token_seconds: array[float]
    cold: array[int]
    device_seconds: float
    asleep_seconds: float
    starts: dict[Tier, int]
    wake_count: int
    decisions: list[Decision]
