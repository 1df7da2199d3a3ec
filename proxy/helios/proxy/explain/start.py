"""The start of one replica, as the proxy hears of it: laid out on the proxy's clock.

    request ── schedule ──┬── order ──┬── fetch, fork, … (measured by worker and replica) ──┬── publish ──▶ released
                     start command   worker has it                            ready, as the worker knows

A worker sends durations and one anchor, the wall-clock time at which it got the order; its durations leave nothing out
(`report` is its last, until it knew that the replica was ready). So what two network legs took together is known by
this process's clock alone: from the command to the news, less the worker's own time. How the two share it is read from
the anchor, which two clocks measured, and is cut to what is possible. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from helios.proxy.explain.timeline import Segment

if TYPE_CHECKING:
    from helios.proxy.fleet.state import Replica

# Measured by this process, on one clock.
_OWN_PHASES: Final = frozenset({"schedule"})
_REASONS: Final = {
    "fetch": "the storage agent lent the weights",
    "fork": "the launcher, which has imported the engine, forked the replica",
    "prepare": "the new process set itself up",
    "fetch_artifact": "compiled code was asked for that another node may have made, and brought here if there was any",
    "config": "the engine read and checked the model's configuration",
    "spawn": "the process that computes was forked",
    "engine": "the engine was built, without weights",
    "tokenizer": "the model's tokenizer was read",
    "kv_cache": "room for the KV cache",
    "connect": "the front and the process that computes found each other",
    "api": "the engine's OpenAI interface",
    "await_bytes": "the load waited for weights that were still on their way",
    "load": "weights to where the engine computes",
    "compile": "kernels and graphs that no cache had",
    "warm_up": "first steps of the engine, so that no request pays for them",
    "commit": "the digests of weights that were loaded on their way were compared, and the weights lent",
    "serve": "the replica's gRPC server",
    "report": "from ready at the replica to its worker",
}


@dataclass(frozen=True, slots=True)
class Wait:
    """Something that a start had to wait for before it was placed, from `since` on."""

    since: float
    reason: str


@dataclass(slots=True)
class Start:
    """One start. Times are monotonic seconds of this process; None where it has not happened.

    Attributes:
        asked_at: when the need for it arose.
        ordered_at: when the start command was issued; None too for a start that this process did not order.
        received_at: when the worker got the order, by the worker's wall clock, brought to this process's clock.
        is_adopted: another proxy ordered it, or this one before its restart.
    """

    model: str
    asked_at: float
    requested_by: str = ""
    cause: str = ""
    replica_id: str = ""
    worker_id: str = ""
    address: str = ""
    placement: str = ""
    waits: list[Wait] = field(default_factory=list)
    ordered_at: float | None = None
    received_at: float | None = None
    ready_at: float | None = None
    published_at: float | None = None
    ended_at: float | None = None
    failure: str = ""
    state: str = "pending"
    phases: tuple[tuple[str, float], ...] = ()
    is_adopted: bool = False

    def follow(self, replica: Replica, wall_offset: float) -> None:
        """Takes in what its worker says; `wall_offset` is wall clock less monotonic clock of this process."""
        self.state, self.phases, self.address = replica.state.name.lower(), replica.phases, replica.address
        if replica.created_at:
            self.received_at = replica.created_at - wall_offset

    def end(self, now: float) -> float:
        """When it was over, or now."""
        return next((at for at in (self.published_at, self.ended_at) if at is not None), now)

    def segments(self, now: float) -> list[Segment]:
        """All of it, in order and without gaps, from the need to the acknowledged endpoint, the failure, or now."""
        found = self._before_order(now)
        begin = self.ordered_at
        if self.is_adopted:
            begin = min(now, self.received_at) if self.received_at is not None else None
        return found if begin is None else found + self._after_order(begin, now)

    def _before_order(self, now: float) -> list[Segment]:
        if self.is_adopted:
            return []
        end = self.ordered_at if self.ordered_at is not None else self.end(now)
        marks = [wait.since for wait in self.waits] + [end]
        placed = f"; {self.placement}" if self.placement else ""
        found = [Segment("schedule", self.asked_at, marks[0], f"{self.cause}{placed}")]
        for wait, until in zip(self.waits, marks[1:], strict=True):
            found.append(Segment("wait_room", wait.since, until, wait.reason))
        return found

    def _after_order(self, ordered_at: float, now: float) -> list[Segment]:
        told_at = self.ready_at if self.ready_at is not None else self.end(now)
        measured = [(name, seconds) for name, seconds in self.phases if name not in _OWN_PHASES]
        legs = max(0.0, told_at - ordered_at - sum(seconds for _, seconds in measured))
        order = min(max(0.0, (self.received_at or ordered_at) - ordered_at), legs)
        found = [Segment("order", ordered_at, ordered_at + order, f"the start command's way to {self.worker_id}")]
        at = ordered_at + order
        for name, seconds in measured:
            found.append(Segment(name, at, at + seconds, _REASONS.get(name, "")))
            at += seconds
        if self.ready_at is not None:
            acked_at = max(at, self.end(now))
            way, ack = max(0.0, self.ready_at - at) * 1e3, (acked_at - max(at, self.ready_at)) * 1e3
            reason = f"{way:.1f} ms for the news to come here, {ack:.1f} ms until every Envoy knew the endpoint"
            found.append(Segment("publish", at, acked_at, reason))
        elif self.ended_at is not None:
            found.append(Segment("starting", at, max(at, self.ended_at), f"came to nothing: {self.failure}"))
        else:
            found.append(Segment("starting", at, max(at, now), f"goes on; the replica is {self.state}"))
        return found
