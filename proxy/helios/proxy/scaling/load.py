"""How many replicas a model's load asks for. Pure; time comes in as monotonic seconds.

What counts is how many requests there are at once: those that run, wait in an engine, wait here, or are on their way. A
replica takes a share of what its engine runs at once (`target_ratio`), so that the next requests find it with room. The
mean over a minute says how many replicas that is. Where the mean of the last seconds asks for twice as many as there
are, a minute is too long to wait: that is a panic, in which the short mean counts and nothing goes. Where KV caches
are nearly full and requests queue for that, one more is asked for, whatever the number of requests: long prompts.

Beside the number of requests, a target may be set for how full KV caches, batches and devices are; the one that asks
for the most replicas counts. What is averaged is the demand, in replicas that would be full: a mean of ratios would
forget that there were fewer replicas a minute ago, and ask for ever more.

Replicas go slowly: as many stay as were asked for at any time of the last minutes, since a replica that comes back
costs a start, and one that stays costs room that others take from it where they need it.
"""

import enum
import math
from collections import deque
from dataclasses import dataclass
from typing import Final

# Samples are taken once a second.
_MOST_SAMPLES: Final = 3600


class ScalingMode(enum.Enum):
    """What is done about load."""

    OFF = "off"
    ADVISE = "advise"
    """Decisions are made, stored and logged; nothing is started for them."""
    ON = "on"


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    """How load becomes replicas.

    Attributes:
        mode: what is done about it.
        target_ratio: share of the requests that an engine runs at once which a replica should have.
        kv_ratio: a KV cache that is fuller than this is full.
        kv_target_ratio: how full KV caches should be, on the mean; 0: whatever they are.
        batch_target_ratio: how full batches should be, of the requests that an engine runs at once; 0: whatever.
        device_target_ratio: how busy devices should be; 0: whatever they are.
        stable_seconds: the mean over this time counts.
        panic_seconds: the mean over this time counts in a panic.
        panic_ratio: a panic is where the short mean asks for this many times the replicas that there are.
        keep_seconds: as many replicas stay as were asked for at any time in so long.
        drain_seconds: how long requests may go on at a replica that is needed no more.
    """

    mode: ScalingMode = ScalingMode.ON
    target_ratio: float = 0.7
    kv_ratio: float = 0.9
    kv_target_ratio: float = 0.8
    batch_target_ratio: float = 0.0
    device_target_ratio: float = 0.0
    stable_seconds: float = 60.0
    panic_seconds: float = 6.0
    panic_ratio: float = 2.0
    keep_seconds: float = 300.0
    drain_seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class LoadSample:
    """A model's load at one moment.

    Attributes:
        request_count: requests that run, wait in engines, are held, or are on their way.
        waiting_count: those of them that wait in engines.
        kv_usage_ratio: mean of its replicas' KV caches, 0 to 1.
        replica_count: replicas that take requests.
        replica_capacity: requests that one of them runs at once.
        running_count: requests that engines work on.
        device_busy_ratio: mean of how busy its replicas' devices are, 0 to 1.
    """

    request_count: int
    waiting_count: int
    kv_usage_ratio: float
    replica_count: int
    replica_capacity: int
    running_count: int = 0
    device_busy_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class LoadDecision:
    """How many replicas a model's load asks for, and why, for people. `asked` is by what there is now, without those
    that are kept for a while.
    """

    count: int
    reason: str
    asked: int = 1


class _Mean:
    """The mean of what was told within some seconds, each time at the cost of one addition."""

    def __init__(self, seconds: float, least_seconds: float) -> None:
        """What was told within less than `least_seconds` is taken for as long: of what comes in a second, one can't
        say how long it lasts.
        """
        self._seconds = seconds
        self._least = min(seconds, least_seconds)
        self._samples: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def add(self, value: float, now: float) -> float:
        """Takes in a sample, one a second; returns the mean."""
        samples = self._samples
        samples.append((now, value))
        self._sum += value
        while samples[0][0] <= now - self._seconds or len(samples) > _MOST_SAMPLES:
            self._sum -= samples.popleft()[1]
        return self._sum / max(len(samples), self._least)


def _demand(name: str, sample: LoadSample) -> float:
    """How many replicas would be full with what there is."""
    match name:
        case "KV caches":
            return sample.kv_usage_ratio * sample.replica_count
        case "batches":
            return sample.running_count / max(1, sample.replica_capacity)
        case _:
            return sample.device_busy_ratio * sample.replica_count


class LoadScaler:
    """What one model's load was, and what it asks for.

    Invariants: `count` is at least 1; it never falls in a panic, nor below what was asked for within `keep_seconds`.
    """

    def __init__(self, policy: LoadPolicy, count: int = 1, now: float = 0.0) -> None:
        """Begins as if `count` replicas had been asked for `now`: those that an earlier proxy had started."""
        self._policy = policy
        self._requests = _Mean(policy.stable_seconds, policy.panic_seconds)
        self._hurried = _Mean(policy.panic_seconds, policy.panic_seconds)
        # What is averaged of each ratio, for people; its target; the replicas that would be full.
        self._demands = tuple(
            (name, target, _Mean(policy.stable_seconds, policy.panic_seconds))
            for name, target in (
                ("KV caches", policy.kv_target_ratio),
                ("batches", policy.batch_target_ratio),
                ("devices", policy.device_target_ratio),
            )
            if target
        )
        # Asked-for counts that are still kept, falling from left to right: the first is the most.
        self._asked: deque[tuple[float, int]] = deque([(now, count)])
        self._panic_until = 0.0
        self.decision = LoadDecision(count, "as many as there were")

    def observe(self, sample: LoadSample, now: float) -> LoadDecision:
        """Takes in a moment and decides; once a second."""
        policy = self._policy
        target = max(1.0, sample.replica_capacity * policy.target_ratio)
        stable, short = self._requests.add(sample.request_count, now), self._hurried.add(sample.request_count, now)
        asked, reason = self._wanted(stable, target), f"{stable:.1f} requests at once, {target:.0f} a replica"
        hurried = self._wanted(short, target)
        if hurried >= policy.panic_ratio * max(1, sample.replica_count):
            self._panic_until = now + policy.stable_seconds
        if now < self._panic_until and hurried > asked:
            asked = hurried
            reason = f"{short:.1f} requests at once in {policy.panic_seconds:.0f} s, {target:.0f} a replica"
        for name, ratio, mean in self._demands:
            demand = mean.add(_demand(name, sample), now)
            if (needed := self._wanted(demand, ratio)) > asked:
                asked = needed
                reason = f"{name} would fill {demand:.1f} replicas, each is to be {ratio:.0%} full"
        if sample.kv_usage_ratio >= policy.kv_ratio and sample.waiting_count and asked <= sample.replica_count:
            asked = sample.replica_count + 1
            reason = f"KV caches are {sample.kv_usage_ratio:.0%} full and {sample.waiting_count} requests wait for them"
        kept = self._keep(asked, now)
        if kept > asked:
            reason = f"{kept} were asked for in the last {policy.keep_seconds:.0f} s; now {asked}: {reason}"
        self.decision = LoadDecision(kept, reason, asked)
        return self.decision

    @staticmethod
    def _wanted(mean: float, target: float) -> int:
        return max(1, math.ceil(mean / target - 1e-9))

    def _keep(self, asked: int, now: float) -> int:
        """Returns the most that was asked for within `keep_seconds`, which in a panic begin anew."""
        while self._asked and self._asked[0][0] < now - self._policy.keep_seconds:
            self._asked.popleft()
        if now < self._panic_until and self._asked:
            asked = max(asked, self._asked[0][1])
        while self._asked and self._asked[-1][1] <= asked:
            self._asked.pop()
        self._asked.append((now, asked))
        return self._asked[0][1]
