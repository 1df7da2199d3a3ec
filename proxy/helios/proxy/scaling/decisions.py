"""What was decided about how many replicas models have, and how warm they are kept, each with its reason. Pure."""

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

_MOST_DECISIONS: Final = 1000


class Cause(enum.Enum):
    """What a decision comes from; the values are the contract's."""

    LOAD = 1
    FORECAST = 2
    SCHEDULE = 3
    COOLDOWN = 4


@dataclass(frozen=True, slots=True)
class Scaled:
    """A decision: at `at` (monotonic seconds), from one number of replicas to another, and why.

    `is_advice`: nothing is done about it.
    """

    at: float
    model: str
    from_count: int
    to_count: int
    reason: str
    is_advice: bool
    cause: Cause = Cause.LOAD


class Decisions:
    """The last thousand decisions, the newest last; each is told when it is made."""

    def __init__(self, tell: Callable[[Scaled], None]) -> None:
        self._tell = tell
        self.kept: deque[Scaled] = deque(maxlen=_MOST_DECISIONS)

    def add(self, decision: Scaled) -> None:
        """Takes a decision down."""
        self.kept.append(decision)
        self._tell(decision)
