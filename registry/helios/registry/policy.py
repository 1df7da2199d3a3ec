"""What is asked of a model's replicas: how many, when, how warm they are kept, and which of them takes a request."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

from helios.mesh.errors import InvalidRequest
from helios.mesh.routing import USUAL_ROUTING, ModelRouting
from helios.mesh.windows import Window

# A typing error should not start a million replicas; far above what one mesh can hold.
MAX_REPLICAS: Final = 10_000
_MAX_WINDOWS: Final = 32
# Longer is for ever, which is 0.
_MAX_SECONDS: Final = 365 * 86_400


@dataclass(frozen=True, slots=True)
class ModelPolicy:
    """How many replicas a model has, how warm it is kept without a request, and how requests are routed.

    Attributes:
        min_replicas: At least so many.
        max_replicas: At most so many; 0: no bound.
        windows: Times with other bounds.
        idle_seconds: How long replicas stay ready that nobody uses; 0: for ever. None: as the proxies are set.
        asleep_seconds: The same of those that sleep.
        staged_seconds: The same of weights in host memory.
        is_durable: Streamed answers go on on another replica where their own dies or drains.
        routing: How one of its replicas is chosen.
    """

    min_replicas: int = 0
    max_replicas: int = 0
    windows: tuple[Window, ...] = ()
    idle_seconds: float | None = None
    asleep_seconds: float | None = None
    staged_seconds: float | None = None
    is_durable: bool = False
    routing: ModelRouting = USUAL_ROUTING

    def check(self) -> "ModelPolicy":
        """Returns itself. Raises InvalidRequest (INVALID_POLICY) where it contradicts itself."""
        _check_bounds(self.min_replicas, self.max_replicas)
        if len(self.windows) > _MAX_WINDOWS:
            raise _invalid(f"a policy has at most {_MAX_WINDOWS} windows")
        for window in self.windows:
            if problem := window.problem():
                raise _invalid(problem)
            if window.min_replicas is None and window.max_replicas is None:
                raise _invalid(f"the window {window.begins!r} changes nothing: give it min_replicas or max_replicas")
            least = self.min_replicas if window.min_replicas is None else window.min_replicas
            _check_bounds(least, window.max_replicas or 0)
        for seconds in (self.idle_seconds, self.asleep_seconds, self.staged_seconds):
            if seconds is not None and not 0 <= seconds <= _MAX_SECONDS:
                raise _invalid(f"times lie between 0 and {_MAX_SECONDS} s")
        if problem := self.routing.problem():
            raise _invalid(problem)
        return self

    @property
    def scaling_document(self) -> str:
        """What it says beside the two bounds, as it is kept: JSON, "{}" where that is nothing."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in _BOUNDS}
        said: dict[str, Any] = {name: value for name, value in values.items() if _says(value)}
        if self.windows:
            said["windows"] = [asdict(window) for window in self.windows]
        if self.routing != USUAL_ROUTING:
            said["routing"] = self.routing.as_fields()
        return json.dumps(said, sort_keys=True)


_BOUNDS: Final = frozenset({"min_replicas", "max_replicas"})


def policy_of(min_replicas: int, max_replicas: int, scaling_document: str) -> ModelPolicy:
    """Returns a policy as it was kept; what a newer registry kept and this one does not know is left out."""
    known = {field.name for field in fields(ModelPolicy)} - _BOUNDS
    said = {name: value for name, value in json.loads(scaling_document).items() if name in known}
    windows = tuple(Window(**window) for window in said.pop("windows", ()))
    routing = ModelRouting.of_fields(said.pop("routing", {}))
    return ModelPolicy(min_replicas, max_replicas, windows, routing=routing, **said)


def _says(value: object) -> bool:
    # 0 says something: for ever.
    return value is not None and value is not False and value not in ((), USUAL_ROUTING)


def _check_bounds(least: int, most: int) -> None:
    if not (0 <= least <= MAX_REPLICAS and 0 <= most <= MAX_REPLICAS):
        raise _invalid(f"replica counts lie between 0 and {MAX_REPLICAS}")
    if most and least > most:
        raise _invalid(f"min_replicas {least} is above max_replicas {most}")


def _invalid(message: str) -> InvalidRequest:
    return InvalidRequest(message, reason="INVALID_POLICY", metadata={"param": "policy"})
