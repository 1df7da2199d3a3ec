"""How many replicas a model's load asks for. Pure; time comes in as monotonic seconds.

What counts is how many requests there are at once: those that run, wait in an engine, wait here, or are on their way. A
replica takes a share of what its engine runs at once (`target_ratio`), so that the next requests find it with room. The
mean over a minute says how many replicas that is. Where the mean of the last seconds asks for twice as many as there
are, a minute is too long to wait: that is a panic, in which the short mean counts and nothing goes. Where KV caches
are nearly full and requests queue for that, one more is asked for, whatever the number of requests: long prompts.

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
        stable_seconds: the mean over this time counts.
        panic_seconds: the mean over this time counts in a panic.
        panic_ratio: a panic is where the short mean asks for this many times the replicas that there are.
        keep_seconds: as many replicas stay as were asked for at any time in so long.
    """

    mode: ScalingMode = ScalingMode.ON
    target_ratio: float = 0.7
    kv_ratio: float = 0.9
    stable_seconds: float = 60.0
    panic_seconds: float = 6.0
    panic_ratio: float = 2.0
    keep_seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class LoadSample:
    """A model's load at one moment.

    Attributes:
        request_count: requests that run, wait in engines, are held, or are on their way.
        waiting_count: those of them that wait in engines.
        kv_usage_ratio: mean of its replicas' KV caches, 0 to 1.
        replica_count: replicas that take requests.
        replica_capacity: requests that one of them runs at once.
    """

    request_count: int
    waiting_count: int
    kv_usage_ratio: float
    replica_count: int
    replica_capacity: int


@dataclass(frozen=True, slots=True)
class LoadDecision:
    """How many replicas a model's load asks for, and why, for people. `asked` is by what there is now, without those
    that are kept for a while.
    """

    count: int
    reason: str
    asked: int = 1


class LoadScaler:
    """What one model's load was, and what it asks for.

    Invariants: `count` is at least 1; it never falls in a panic, nor below what was asked for within `keep_seconds`.
    """

    def __init__(self, policy: LoadPolicy, count: int = 1, now: float = 0.0) -> None:
        """Begins as if `count` replicas had been asked for `now`: those that an earlier proxy had started."""
        self._policy = policy
        self._samples: deque[tuple[float, int]] = deque(maxlen=_MOST_SAMPLES)
        # Asked-for counts that are still kept, falling from left to right: the first is the most.
        self._asked: deque[tuple[float, int]] = deque([(now, count)])
        self._panic_until = 0.0
        self.decision = LoadDecision(count, "as many as there were")

    def observe(self, sample: LoadSample, now: float) -> LoadDecision:
        """Takes in a moment and decides; once a second."""
        policy = self._policy
        self._samples.append((now, sample.request_count))
        while self._samples[0][0] < now - policy.stable_seconds:
            self._samples.popleft()
        target = max(1.0, sample.replica_capacity * policy.target_ratio)
        stable, short = self._mean(now, policy.stable_seconds), self._mean(now, policy.panic_seconds)
        asked, reason = self._wanted(stable, target), f"{stable:.1f} requests at once, {target:.0f} a replica"
        hurried = self._wanted(short, target)
        if hurried >= policy.panic_ratio * max(1, sample.replica_count):
            self._panic_until = now + policy.stable_seconds
        if now < self._panic_until and hurried > asked:
            asked = hurried
            reason = f"{short:.1f} requests at once in {policy.panic_seconds:.0f} s, {target:.0f} a replica"
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

    def _mean(self, now: float, seconds: float) -> float:
        counts = [count for at, count in self._samples if at > now - seconds]
        # Of a model that has just come into use there is no past; what comes within a second says little.
        return sum(counts) / max(len(counts), min(seconds, self._policy.panic_seconds))

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
