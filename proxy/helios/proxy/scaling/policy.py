"""What a model's policy says of its replicas beside the bounds that hold now. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from helios.mesh.windows import Window


@dataclass(frozen=True, slots=True)
class Scaling:
    """Bounds at other times, and cooldowns.

    Attributes:
        min_replicas: at least so many outside of every window.
        max_replicas: at most so many, 0 is no bound.
        windows: times with other bounds.
        idle_seconds: how long a replica that nobody uses stays ready, 0 is for ever; None: as all models'.
        asleep_seconds: the same of one that sleeps.
        staged_seconds: the same of weights in host memory.
    """

    min_replicas: int = 0
    max_replicas: int = 0
    windows: tuple[Window, ...] = ()
    idle_seconds: float | None = None
    asleep_seconds: float | None = None
    staged_seconds: float | None = None

    @classmethod
    def of_fields(cls, values: dict[str, Any]) -> Scaling:
        """What was kept on disk. Raises TypeError where it is something else."""
        windows = tuple(Window(**window) for window in values.get("windows", ()))
        return cls(**{**values, "windows": windows})
