"""How warm a model is best kept, from what is expected of it. Pure.

A rung costs what it holds: a replica holds a device, staged weights hold host memory, a disk next to nothing. So the
rungs ask for more the higher they are: that several requests come in the hour, and some almost surely; that one comes
soon; that one comes today.

What a replica that waits saves is starts, and a start is saved for each conversation, not for each request of one. Only
requests are counted, but hours tell: ten requests that come each for itself swing by three, ten in three conversations
by seven. So what counts is the least that comes in nine of ten hours. After a burst the mean is high and the least is
nothing.

How long an idle replica waits is part of it. It costs the same each second, and saves a start if a request comes. Where
conversations begin independently of each other, the chance that one begins in the next second does not depend on how
long none has: a replica is worth keeping for the whole hour, or not at all. What is worth waiting for are the pauses
within a conversation. So a model that is not to be ready has a short idle time, and with what that saves, more models
are ready; tests/simulator/REPORT.md has the figures.
"""

import math
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum

from helios.registry.usage.records import HOUR, Counts, Forecast, start_of


class Rung(IntEnum):
    """How warm; the values are the contract's. ASLEEP lies between MEMORY and READY."""

    DISK = 1
    MEMORY = 2
    READY = 3
    ASLEEP = 4


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """When a rung is worth it.

    Attributes:
        ready_requests: Requests in an hour that are worth a replica which waits for them, where they come for sure.
        sure_requests: The least that comes in nine of ten hours of which as much was expected, for that.
        asleep_requests: Requests in an hour that are worth a replica which sleeps, where its engine can; 0: none are.
        memory_ratio: Chance of a request within an hour that is worth host memory, 0..1.
        disk_ratio: The same, within a day, that is worth a place on disks.
        concurrency: Requests that a replica works on at once.
        idle_seconds: How long a replica without requests waits for the next one where its model is not to be ready;
            0: as long as the proxy's setting says.
    """

    ready_requests: float = 4.0
    sure_requests: float = 2.0
    memory_ratio: float = 0.3
    disk_ratio: float = 0.05
    concurrency: float = 8.0
    idle_seconds: float = 240.0
    asleep_requests: float = 0.0


@dataclass(frozen=True, slots=True)
class Target:
    """Keep a model on a rung, with so many replicas where it is READY, until ``expires_at``.

    Below READY a replica is worth keeping for ``idle_seconds`` after its last request; 0: nothing is said of that.
    """

    model: str
    rung: Rung
    replica_count: int
    reason: str
    expires_at: datetime
    idle_seconds: float = 0.0


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
    if busiest.requests >= policy.ready_requests and busiest.low >= policy.sure_requests:
        seconds = recent.busy_ms / 1000 / recent.requests if recent.requests else 0.0
        at_once = busiest.high * seconds / HOUR.total_seconds()
        count = max(1, math.ceil(at_once / policy.concurrency))
        count = min(count, max_replicas) if max_replicas else count
        return Target(model, Rung.READY, count, f"{told}, each of {seconds:.1f} s", expires_at)
    if policy.asleep_requests and busiest.requests >= policy.asleep_requests:
        return Target(model, Rung.ASLEEP, 0, f"{told}, none for sure", expires_at, policy.idle_seconds)
    chance = 1.0 - math.exp(-busiest.requests)
    if chance >= policy.memory_ratio:
        reason = f"{told}: one comes with a chance of {chance:.0%}"
        return Target(model, Rung.MEMORY, 0, reason, expires_at, policy.idle_seconds)
    day = forecast.expected_requests(hour, 24)
    chance = 1.0 - math.exp(-day)
    if chance >= policy.disk_ratio:
        reason = f"{day:.1f} requests expected in a day: one comes with a chance of {chance:.0%}"
        return Target(model, Rung.DISK, 0, reason, expires_at, policy.idle_seconds)
    return None
