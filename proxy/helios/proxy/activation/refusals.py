"""Which workers refused a model's start a short while ago. Pure; times are monotonic seconds.

A worker knows its room, its devices and its own end better than a proxy does, so what it refuses says nothing of the
model: the start is tried on another worker, and on this one again after a moment, for as long as somebody waits.
"""

from __future__ import annotations

from typing import Final

_MOMENT_SECONDS: Final = 5.0
"""For how long a worker is not asked again: its next reports tell what it lacks, and each try is a line in its log."""


class StartRefusals:
    """Refusals by worker and model. Invariant: none is older than a moment at the time of the newest."""

    def __init__(self) -> None:
        self._refused: dict[tuple[str, str], tuple[float, str]] = {}

    def note(self, worker_id: str, model: str, message: str, now: float) -> None:
        """A worker refused a start."""
        self._refused = {key: one for key, one in self._refused.items() if now - one[0] < _MOMENT_SECONDS}
        self._refused[worker_id, model] = now, message

    def by_worker(self, model: str, now: float) -> dict[str, str]:
        """The workers that refused the model's start a moment ago, each with what it said."""
        return {
            worker_id: message
            for (worker_id, name), (at, message) in self._refused.items()
            if name == model and now - at < _MOMENT_SECONDS
        }
