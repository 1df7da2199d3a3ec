"""How many replicas a model should have now. Pure.

One while a model is in use, more where its load asks for them (`load`) or is expected to (`forecast`), none when it has
been idle for long enough, never fewer than its policy says. Two numbers come out, because they answer different
questions: `start_below` (start one where fewer exist, whoever has to give way) and `drain_above` (drain the surplus).
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from helios.proxy.fleet.state import Replica, ReplicaState


@dataclass(frozen=True, slots=True)
class Usage:
    """How a model is used now. `last_used_at` is None where it was never used, or was told to go to zero.

    `load_count` is how many replicas its load asks for, `forecast_count` how many what is expected of it does.
    `is_asked_for`: a start is under way that somebody asked for, who may have left. Stopped because the model was idle
    for less time than it takes to start, it would never come up.
    """

    held_count: int
    in_flight_count: int
    last_used_at: float | None
    is_failing: bool
    load_count: int = 1
    forecast_count: int = 0
    is_asked_for: bool = False


@dataclass(frozen=True, slots=True)
class Desired:
    """Start a replica where there are fewer than `start_below`; drain the surplus over `drain_above`.

    Between them, one more may be started where there is room that nobody has.
    """

    start_below: int
    drain_above: int


def desired_replicas(*, min_replicas: int, max_replicas: int, usage: Usage, idle_seconds: float, now: float) -> Desired:
    """Decides.

    Args:
        min_replicas: of the model's policy; started without a request.
        max_replicas: of the model's policy; 0 is no bound.
        usage: how the model is used.
        idle_seconds: a model that nothing used for this long goes to min_replicas; 0 is never.
        now: monotonic seconds.
    """
    is_recent = usage.last_used_at is not None and (not idle_seconds or now - usage.last_used_at < idle_seconds)
    is_wanted = usage.held_count > 0
    is_kept = is_wanted or usage.is_asked_for or usage.in_flight_count > 0 or is_recent
    keep = max(1, usage.load_count) if is_kept else 0
    keep = max(keep, usage.forecast_count)
    # A model that fails to start is tried again by requests and by its policy, not because it was used a while ago.
    start = 1 if is_wanted or ((is_recent or usage.forecast_count) and not usage.is_failing) else 0
    if max_replicas:
        keep, start = min(keep, max(max_replicas, 1)), min(start, max(max_replicas, 1))
    return Desired(max(min_replicas, start), max(min_replicas, keep))


def least_missed(replicas: Iterable[Replica], replaced: Container[str]) -> list[Replica]:
    """A model's replicas, those first that go first: not ready, then `replaced` by others, then with least to do."""

    def order(replica: Replica) -> tuple[bool, bool, int, str]:
        load = replica.load.running_count + replica.load.waiting_count
        is_replaced = replica.replica_id in replaced
        return replica.state is ReplicaState.READY, not is_replaced, load, replica.replica_id

    return sorted(replicas, key=order)


def idle_after(idle_seconds: float, advised_seconds: float | None) -> float:
    """How long a model stays that nobody uses, where it is known how long one is worth waiting for.

    Never longer than the policy says, and for ever where that says so (0).
    """
    return min(idle_seconds, advised_seconds) if advised_seconds else idle_seconds
