"""How a replica ended, for the activation that may have waited for it. Pure."""

from __future__ import annotations

from dataclasses import replace

from helios.proxy.activation.machine import Gone
from helios.proxy.fleet.state import Replica, ReplicaState

OF_THE_WORKER = frozenset({"NO_CAPACITY", "WORKER_DRAINING", "DEVICE_LOST", "STALE_LEADER"})
"""Why a worker refuses a start that another one may take, or itself later: it says nothing of the model."""
_LOST_IN_SLEEP = frozenset({"CANARY_FAILED", "WAKE_FAILED", "WAKE_TIMEOUT"})


def failed(replica: Replica, reason: str, message: str) -> Replica:
    """The replica as one that failed."""
    return replace(replica, state=ReplicaState.FAILED, failure_reason=reason, failure_message=message)


def gone(replica: Replica, *, is_worker_lost: bool) -> Gone:
    """What its activation is told."""
    if is_worker_lost and not replica.failure_reason:
        return Gone(replica.replica_id, "WORKER_LOST", "its worker went away", is_worker_lost=True)
    reason = replica.failure_reason or "STOPPED"
    # The first line is the cause. What follows, the end of a log, is for operators and not for clients.
    cause = replica.failure_message.partition("\n")[0]
    message = f"{reason}: {cause}" if cause else reason
    # A replica that can't wake is replaced at once, like one whose worker went away: the model itself starts well.
    is_refused = reason in OF_THE_WORKER
    return Gone(replica.replica_id, reason, message, is_worker_lost=reason in _LOST_IN_SLEEP, is_refused=is_refused)
