"""What is done to rollouts, as values. Pure."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from helios.mesh.errors import InvalidRequest

MAX_PERCENT: Final = 100


class Act(StrEnum):
    """What was done."""

    WEIGHT = "weight"
    PROMOTE = "promote"
    ABORT = "abort"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True)
class RolloutStep:
    """One change of a rollout.

    Attributes:
        version: Number of the change.
        revision: The canary's digest.
        weight_percent: Its share from then on; 0 where the rollout ended.
    """

    version: int
    revision: str
    weight_percent: int
    act: Act
    actor: str
    at: datetime


def check_weight(percent: int) -> int:
    """Returns a weight that lies between 0 and 100. Raises InvalidRequest (INVALID_WEIGHT)."""
    if not 0 <= percent <= MAX_PERCENT:
        raise InvalidRequest(
            f"a weight is a share in percent, 0 to {MAX_PERCENT}; {percent} is none",
            reason="INVALID_WEIGHT",
            metadata={"param": "weight_percent"},
        )
    return percent
