"""Events, and which of the core's actions are some. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from helios.proxy import actions


class EventKind(enum.Enum):
    """What happened."""

    WORKER_CONNECTED = 1
    WORKER_UNREACHABLE = 2
    WORKER_GONE = 3
    WORKER_CORDONED = 4
    WORKER_UNCORDONED = 5
    REPLICA_CHANGED = 6
    START_BEGUN = 7
    START_DELAYED = 8
    START_DONE = 9
    START_FAILED = 10
    SCALED = 11
    SWAP_BEGUN = 12
    SWAP_DONE = 13
    SWAP_ENDED = 14
    BREAKER_OPENED = 15
    BREAKER_CLOSED = 16


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a worker or replica.

    Attributes:
        kind: what.
        model: the model that it happened to; empty: none. So with the next two.
        replica_id: the replica.
        worker_id: the worker.
        reason: a word for programs; empty where the kind says all.
        message: for people; may be empty.
    """

    kind: EventKind
    model: str = ""
    replica_id: str = ""
    worker_id: str = ""
    reason: str = ""
    message: str = ""


def event_of(action: actions.Action) -> Event | None:
    """Returns what an action tells operators; None: nothing."""
    match action:
        case actions.WorkerChanged(worker_id, news):
            return Event(EventKind[f"WORKER_{news.name}"], worker_id=worker_id)
        case actions.ReplicaChanged(replica):
            cause = replica.failure_message.partition("\n")[0]
            failure = f"{replica.failure_reason}: {cause}" if replica.failure_reason and cause else cause
            return Event(
                EventKind.REPLICA_CHANGED,
                replica.model,
                replica.replica_id,
                replica.worker_id,
                replica.state.name,
                failure or replica.failure_reason,
            )
        case actions.BreakerChanged(model, replica_id, worker_id, is_open):
            kind = EventKind.BREAKER_OPENED if is_open else EventKind.BREAKER_CLOSED
            return Event(kind, model, replica_id, worker_id)
        case actions.ModelScaled(decision):
            advice = " (advice only)" if decision.is_advice else ""
            change = f"{decision.from_count} to {decision.to_count} replicas{advice}: {decision.reason}"
            return Event(EventKind.SCALED, decision.model, reason=decision.cause.name, message=change)
        case actions.ActivationBegun() | actions.ActivationDelayed() | actions.ActivationDone():
            return _of_start(action)
        case actions.ActivationFailed(model, reason, message):
            return Event(EventKind.START_FAILED, model, reason=reason, message=message)
        case actions.SwapBegun() | actions.SwapDone() | actions.SwapStopped() | actions.SwapFailed():
            return _of_swap(action)
        case _:
            return None


def _of_start(action: actions.ActivationBegun | actions.ActivationDelayed | actions.ActivationDone) -> Event:
    match action:
        case actions.ActivationBegun(model, replica_id, worker_id, _, placement):
            return Event(EventKind.START_BEGUN, model, replica_id, worker_id, message=placement)
        case actions.ActivationDelayed(model, reason, message):
            return Event(EventKind.START_DELAYED, model, reason=reason, message=message)
        case actions.ActivationDone(model, replica_id, seconds):
            return Event(EventKind.START_DONE, model, replica_id, message=f"ready after {seconds:.2f} s")


def _of_swap(action: actions.SwapBegun | actions.SwapDone | actions.SwapStopped | actions.SwapFailed) -> Event:
    match action:
        case actions.SwapBegun(model, replica_id, worker_id, placement):
            return Event(EventKind.SWAP_BEGUN, model, replica_id, worker_id, message=placement)
        case actions.SwapDone(model, replica_id):
            return Event(EventKind.SWAP_DONE, model, replica_id, message="it drains in favour of a compiled one")
        case actions.SwapStopped(model, replica_id, why):
            return Event(EventKind.SWAP_ENDED, model, replica_id, reason="STOPPED", message=why)
        case actions.SwapFailed(model, reason, message):
            return Event(EventKind.SWAP_ENDED, model, reason=reason, message=message)
