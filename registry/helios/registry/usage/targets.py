"""How warm a model is best kept, from what is expected of it. Pure.

A rung costs what it holds: a replica holds a device, staged weights hold host memory, a disk next to nothing. So the
rungs ask for more the higher they are: that several requests come before an idle replica would go, that one comes
soon, that one comes today.
"""

import math
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from helios.registry.usage.records import HOUR, Counts, Forecast, start_of


class Rung(IntEnum):
    """How warm, the coldest first; the values are the contract's."""

    DISK = 1
    MEMORY = 2
    READY = 3


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """When a rung is worth it.

    Attributes:
        ready_requests: Requests in an hour that are worth a replica which waits for them.
        memory_ratio: Chance of a request within an hour that is worth host memory, 0..1.
        disk_ratio: The same, within a day, that is worth a place on disks.
        concurrency: Requests that a replica works on at once.
    """

    ready_requests: float = 6.0
    memory_ratio: float = 0.3
    disk_ratio: float = 0.05
    concurrency: float = 8.0


@dataclass(frozen=True, slots=True)
class Target:
    """Keep a model on a rung, with so many replicas where it is READY, until ``expires_at``."""

    model: str
    rung: Rung
    replica_count: int
    reason: str
    expires_at: datetime


def target_of(
    model: str, forecast: Forecast, recent: Counts, *, hour: int, policy: TargetPolicy, max_replicas: int = 0
) -> Target | None:
    """Returns how warm a model is best kept in an hour; None where it is as well left cold.

    Args:
        model: Its name.
        forecast: What is expected.
        recent: What was counted of it lately: how long its requests take.
        hour: The hour that runs.
        policy: When a rung is worth it.
        max_replicas: The model's own bound; 0: none.
    """
    # The hour that runs and the next: what comes at its beginning must find the model warm.
    soon = [expected for index in (0, 1) if (expected := forecast.at(hour + index)) is not None]
    if not soon:
        return None
    busiest = max(soon, key=lambda expected: expected.requests)
    # Two hours without news, and nobody makes forecasts any more.
    expires_at = start_of(hour) + 2 * HOUR
    told = f"{busiest.requests:.1f} requests expected in the hour ({busiest.low:.0f} to {busiest.high:.0f})"
    if busiest.requests >= policy.ready_requests:
        seconds = recent.busy_ms / 1000 / recent.requests if recent.requests else 0.0
        at_once = busiest.high * seconds / HOUR.total_seconds()
        count = max(1, math.ceil(at_once / policy.concurrency))
        count = min(count, max_replicas) if max_replicas else count
        return Target(model, Rung.READY, count, f"{told}, each of {seconds:.1f} s", expires_at)
    chance = 1.0 - math.exp(-busiest.requests)
    if chance >= policy.memory_ratio:
        return Target(model, Rung.MEMORY, 0, f"{told}: one comes with a chance of {chance:.0%}", expires_at)
    day = forecast.expected_requests(hour, 24)
    chance = 1.0 - math.exp(-day)
    if chance >= policy.disk_ratio:
        reason = f"{day:.1f} requests expected in a day: one comes with a chance of {chance:.0%}"
        return Target(model, Rung.DISK, 0, reason, expires_at)
    return None
