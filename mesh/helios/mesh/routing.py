"""What a model's policy says of how one of its replicas is chosen, where that is to differ from how proxies are set.

The registry checks it and keeps it, proxies route by it. Pure.
"""

import enum
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Self


class Choice(enum.StrEnum):
    """Among which replicas the best one is looked for."""

    BEST = "best"
    POWER_OF_TWO = "power_of_two"


@dataclass(frozen=True, slots=True)
class ModelRouting:
    """How a model's replicas are chosen among; None: as the proxies are set.

    Attributes:
        queue_weight: What few waiting requests weigh in a replica's load, beside the next two: only their ratio counts.
        running_weight: What few running requests weigh.
        kv_weight: What an empty KV cache weighs.
        prefix_weight: The share of a whole score that a wholly cached prompt is.
        session_weight: The share that a session's own replica has.
        locality_weight: Of the rest, the share that nearness is, where a gateway knows its place.
        choice: Among which replicas the best one is looked for.
        kept_for_high_ratio: The share of a replica's places that only requests of high priority take.
        kept_from_low_ratio: The share, beside it, that requests of low priority leave free.
    """

    queue_weight: float | None = None
    running_weight: float | None = None
    kv_weight: float | None = None
    prefix_weight: float | None = None
    session_weight: float | None = None
    locality_weight: float | None = None
    choice: Choice | None = None
    kept_for_high_ratio: float | None = None
    kept_from_low_ratio: float | None = None

    @classmethod
    def of_fields(cls, values: dict[str, Any]) -> Self:
        """What `as_fields` returned; what only a newer version knows is left out."""
        known = {name: value for name, value in values.items() if name in NAMES}
        known["choice"] = next((choice for choice in Choice if choice == known.get("choice")), None)
        return cls(**known)

    def as_fields(self) -> dict[str, Any]:
        """What it says, fit for JSON."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def problem(self) -> str:
        """Says, for people, what is wrong with it; empty: nothing."""
        load = {name: getattr(self, name) for name in LOAD_WEIGHTS}
        for name, value in load.items():
            # A comparison with no number is false.
            if value is not None and not 0 <= value <= 1:
                return f"{name} lies between 0 and 1, not {value:g}"
        if all(value == 0 for value in load.values()):
            return f"of {', '.join(LOAD_WEIGHTS)} one must be above 0"
        for name in SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                return f"{name} is at least 0 and below 1, not {value:g}"
        for pair in (DRAWN, KEPT):
            if sum(getattr(self, name) or 0 for name in pair) >= 1:
                return f"{' and '.join(pair)} are below 1 together"
        return ""


NAMES: Final = tuple(field.name for field in fields(ModelRouting))
LOAD_WEIGHTS: Final = ("queue_weight", "running_weight", "kv_weight")
"""Parts of a replica's load, each of what it is beside the others."""
DRAWN: Final = ("prefix_weight", "session_weight")
"""What draws a request to some replicas; load and nearness have the rest of the score."""
KEPT: Final = ("kept_for_high_ratio", "kept_from_low_ratio")
"""Shares of a replica's places."""
SHARES: Final = (*DRAWN, "locality_weight", *KEPT)
USUAL_ROUTING: Final = ModelRouting()
"""As the proxies are set."""
