"""How many replicas policies promise and allow, as time goes on. Pure.

A model's entry in the catalogue has the bounds that hold now, so that nothing else need know of windows; what it has
at other times goes along with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from helios.mesh.windows import Window, bounds_at
from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.scaling.decisions import Cause, Scaled


def bounded(entry: ModelEntry, minute: int) -> tuple[ModelEntry, Window | None]:
    """The entry with the bounds of a minute since 1970, and the window that they are of."""
    scaling = entry.scaling
    if scaling is None or not scaling.windows:
        return entry, None
    least, most, window = bounds_at(
        minute, scaling.windows, min_replicas=scaling.min_replicas, max_replicas=scaling.max_replicas
    )
    if (least, most) == (entry.min_replicas, entry.max_replicas):
        return entry, window
    return replace(entry, min_replicas=least, max_replicas=most), window


class Bounds:
    """Has windows begin and end."""

    def __init__(self, catalogue: Catalogue, decide: Callable[[Scaled], None]) -> None:
        """``decide`` takes down what changes."""
        self._catalogue = catalogue
        self._decide = decide
        self._minute = 0

    def now(self, entry: ModelEntry) -> ModelEntry:
        """An entry that comes from the registry, with the bounds that hold now."""
        return bounded(entry, self._minute)[0]

    def follow(self, minute: int, now: float) -> None:
        """A minute since 1970 has begun, or goes on."""
        if minute == self._minute:
            return
        self._minute = minute
        for name in sorted(self._catalogue.scheduled()):
            entry = self._catalogue.get(name)
            assert entry is not None
            changed, window = bounded(entry, minute)
            if self._catalogue.upsert(changed):
                zone = f" {window.time_zone or 'UTC'}" if window is not None else ""
                why = f"the window {window.begins}{zone} is open" if window is not None else "no window is open"
                most = changed.max_replicas or "no bound"
                reason = f"{why}: at least {changed.min_replicas}, at most {most}"
                counts = entry.min_replicas, changed.min_replicas
                self._decide(Scaled(now, name, *counts, reason, is_advice=False, cause=Cause.SCHEDULE))
