"""LoRA adapters of replicas that run: which each is to have, which it has, and who waits for one. Pure.

Settings of a model that gain, lose or change an adapter hold for its replicas at once. `follow` compares what each
ready replica says with what is wanted and orders the whole set where they differ: it is level-triggered, like
everything here, so a lost order, a worker or a proxy that restarts costs time and nothing else. A request for an
adapter goes only to replicas that have it in the revision that is served now; it waits while one is on its way, and is
refused with the engine's words where none of the model's replicas can have it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from helios.mesh.errors import HeliosError, NoReadyReplica, PreconditionFailed
from helios.proxy import actions
from helios.proxy.catalogue import Catalogue, ModelEntry
from helios.proxy.engine_needs import needs_of
from helios.proxy.fleet.commands import Order, SetAdapters
from helios.proxy.fleet.state import Adapter, AdapterState, HeldAdapter, Replica, ReplicaState
from helios.proxy.holds import Holds
from helios.proxy.refusals import model_not_found
from helios.proxy.traffic import Traffic

# What was ordered and is not seen is ordered again after this long.
_REPEAT_SECONDS: Final = 5.0
# Files that could not be had are asked for again by the worker.
_RETRY_SECONDS: Final = 2.0
# The same adapter at the same replica would fail again.
_PERMANENT_REASONS: Final = frozenset(
    {"ADAPTERS_NOT_ENABLED", "ADAPTERS_UNSUPPORTED", "ADAPTER_RANK_TOO_LARGE", "BAD_ADAPTER"}
)


class Adapters:
    """Orders sets of adapters, and tells those who wait for one that can't be.

    Invariant: a set is ordered of a replica only where what it says differs from what is wanted, and the same one at
    most once in `_REPEAT_SECONDS`.
    """

    def __init__(
        self,
        *,
        traffic: Traffic,
        catalogue: Catalogue,
        holds: Holds,
        send: Callable[[str, Order], None],
        report: Callable[[actions.Action], None],
    ) -> None:
        self._traffic = traffic
        self._catalogue = catalogue
        self._holds = holds
        self._send = send
        self._report = report
        self._asked: dict[str, tuple[tuple[Adapter, ...], float]] = {}
        self._refused: dict[str, HeldAdapter] = {}

    def wanted(self, entry: ModelEntry) -> tuple[Adapter, ...]:
        """What the model's settings name, each in the revision that is served now; what there is not is left out."""
        needs = needs_of(entry.engine_settings)
        found = ((name, model, self._catalogue.named(model)) for name, model in needs.named_adapters)
        return tuple(Adapter(name, model, other.revision) for name, model, other in found if other is not None)

    def find(self, entry: ModelEntry, name: str) -> Adapter | None:
        """The adapter that a request names, as a replica must have it; None where there is no such model."""
        model = dict(needs_of(entry.engine_settings).named_adapters).get(name, "")
        other = self._catalogue.named(model)
        return Adapter(name, model, other.revision) if other is not None else None

    def follow(self, entry: ModelEntry, now: float) -> None:
        """Does the next step for a model's replicas and for those who wait for its adapters."""
        replicas = self._ready(entry)
        lanes = [name for name in self._holds.lanes(entry.name) if name]
        if not entry.adapters and not lanes and not any(replica.adapters for replica in replicas):
            return
        wanted = self.wanted(entry)
        for replica in replicas:
            self._follow(replica, wanted, now)
        self.answer(entry)

    def answer(self, entry: ModelEntry) -> None:
        """Tells those who wait for an adapter that none of the model's replicas can have."""
        for name in [name for name in self._holds.lanes(entry.name) if name]:
            error = self.problem(entry, name)
            if error is not None:
                for hold in self._holds.take_lane(entry.name, name):
                    self._report(actions.Fail(hold, error))

    def refused(self, replica_id: str, reason: str, message: str) -> None:
        """The worker took no such order."""
        self._refused[replica_id] = HeldAdapter(Adapter("", "", ""), AdapterState.FAILED, reason, message)

    def forget(self, replica_id: str) -> None:
        """The replica is gone."""
        self._asked.pop(replica_id, None)
        self._refused.pop(replica_id, None)

    def problem(self, entry: ModelEntry, name: str) -> HeliosError | None:
        """Why no replica of the model can answer for an adapter; None while one can, or may soon."""
        if name not in entry.adapters:
            return model_not_found(name)
        adapter, metadata = self.find(entry, name), {"model": name, "param": "model"}
        if adapter is None:
            message = f"the adapter '{name}' of '{entry.name}' names a model that does not exist"
            return PreconditionFailed(message, reason="INVALID_ENGINE_SETTINGS", metadata=metadata)
        replicas = self._ready(entry)
        failures = [failed for replica in replicas if (failed := self._failure(replica, adapter)) is not None]
        if not failures or len(failures) < len(replicas):
            return None
        failed = failures[0]
        metadata["cause"] = failed.failure_reason
        message = failed.failure_message.partition("\n")[0]
        if failed.failure_reason in _PERMANENT_REASONS:
            # 400 and FAILED_PRECONDITION, which no client repeats by itself.
            return PreconditionFailed(message, reason=failed.failure_reason, metadata=metadata)
        return NoReadyReplica(
            f"the adapter '{name}' can't be loaded now: {message}",
            metadata=metadata,
            retry_after_seconds=_RETRY_SECONDS,
        )

    def _ready(self, entry: ModelEntry) -> list[Replica]:
        return [
            replica
            for replica in self._traffic.fleet.replicas_of(entry.name)
            if replica.state is ReplicaState.READY
            and replica.revision == entry.revision
            and not self._traffic.is_draining(replica)
        ]

    def _follow(self, replica: Replica, wanted: tuple[Adapter, ...], now: float) -> None:
        said = {held.adapter for held in replica.adapters if held.state is not AdapterState.UNLOADING}
        if said == set(wanted):
            self.forget(replica.replica_id)
            return
        asked, asked_at = self._asked.get(replica.replica_id, ((), -_REPEAT_SECONDS))
        if asked == wanted and now - asked_at < _REPEAT_SECONDS:
            return
        self._asked[replica.replica_id] = wanted, now
        self._send(replica.worker_id, SetAdapters(replica.replica_id, wanted))

    def _failure(self, replica: Replica, adapter: Adapter) -> HeldAdapter | None:
        held = next((held for held in replica.adapters if held.adapter == adapter), None)
        if held is None:
            return self._refused.get(replica.replica_id)
        return held if held.state is AdapterState.FAILED else None
