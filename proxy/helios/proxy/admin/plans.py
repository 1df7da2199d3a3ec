"""What operators' orders would do: the answers to dry runs. Nothing is changed here.

Each raises what its order would raise, because it asks the same functions that the order asks.
"""

from dataclasses import dataclass

from helios.mesh.errors import Unavailable
from helios.proxy.catalogue import ModelEntry
from helios.proxy.core import Core
from helios.proxy.fleet.state import Staged, StagedState
from helios.proxy.refusals import check_unpinned


@dataclass(frozen=True, slots=True)
class PreloadPlan:
    """Where a replica would be started: `worker_id` is empty where none would be, or nothing is free yet."""

    worker_id: str = ""
    placement: str = ""


def plan_preload(core: Core, entry: ModelEntry, now: float) -> PreloadPlan:
    """Says where a replica would be started.

    Raises:
        InvalidRequest: INVALID_ENGINE_SETTINGS.
        Unavailable: NO_WORKER, NO_CAPACITY; or this proxy has just started and knows too little.
    """
    if any(replica.revision == entry.revision for replica in core.traffic.staying(entry.name)):
        return PreloadPlan(placement="there is one")
    if not core.is_resynchronised:
        message = "this proxy has just started and waits for its workers; try again in a few seconds"
        raise Unavailable(message, reason="NOT_RESYNCHRONISED", retry_after_seconds=2)
    return PreloadPlan(*core.lifecycle.activating.preview(entry, now))


def plan_evict(core: Core, entry: ModelEntry) -> int:
    """Says how many replicas would drain. Raises PreconditionFailed."""
    check_unpinned(entry)
    return len(core.fleet.replicas_of(entry.name))


def plan_stage(core: Core, entry: ModelEntry) -> tuple[Staged, int]:
    """Says where a model would be staged, and how many replicas would drain. Raises PreconditionFailed, Unavailable."""
    check_unpinned(entry)
    home = core.lifecycle.warmth.home(entry)
    worker_id = home.hello.worker_id
    staged = Staged(entry.revision, entry.name, StagedState.STAGING, worker_id, entry.weights_bytes)
    return home.staged.get(entry.revision, staged), len(core.fleet.replicas_of(entry.name))


def plan_unstage(core: Core, entry: ModelEntry) -> int:
    """Says how many nodes would give memory back."""
    return sum(1 for worker in core.fleet.workers() if entry.revision in worker.staged)
