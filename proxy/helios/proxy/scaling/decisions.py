"""What was decided about how many replicas models have, and how warm they are kept, each with its reason. Pure."""

import enum
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

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


def scaled_of(document: Mapping[str, Any], wall_offset: float) -> Scaled:
    """A decision as `Decisions.documents` wrote it. Raises KeyError, TypeError, ValueError where it is none."""
    return Scaled(
        float(document["at"]) - wall_offset,
        str(document["model"]),
        int(document["from_count"]),
        int(document["to_count"]),
        str(document["reason"]),
        bool(document["is_advice"]),
        Cause[document["cause"]],
    )


class Decisions:
    """The last thousand decisions, the newest last; each is told when it is made."""

    def __init__(self, tell: Callable[[Scaled], None]) -> None:
        self._tell = tell
        self.kept: deque[Scaled] = deque(maxlen=_MOST_DECISIONS)

    def add(self, decision: Scaled) -> None:
        """Takes a decision down."""
        self.kept.append(decision)
        self._tell(decision)

    def restore(self, decisions: Iterable[Scaled]) -> None:
        """Takes in those of an earlier run, which are older than all that there are; nobody is told again."""
        self.kept = deque([*decisions, *self.kept], maxlen=_MOST_DECISIONS)

    def documents(self, wall_offset: float) -> list[dict[str, Any]]:
        """All of them in JSON's types, their times since 1970: those of another run have another clock."""
        return [
            {
                "at": one.at + wall_offset,
                "model": one.model,
                "from_count": one.from_count,
                "to_count": one.to_count,
                "reason": one.reason,
                "is_advice": one.is_advice,
                "cause": one.cause.name,
            }
            for one in self.kept
        ]
